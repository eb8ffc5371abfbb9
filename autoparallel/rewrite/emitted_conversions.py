"""The conversions in the program of one rank: how a value that an op reads gets into its layout.

A conversion is emitted once, where its copy is first read, and stands before a recomputed block
unless the block alone reads it. Those that leave a gap name the products that fill it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph, Node, Sym, Value
from autoparallel.placement import (
    Layout,
    Partial,
    Shard,
    Step,
    layout_text,
)
from autoparallel.plan import Conversion, Plan
from autoparallel.rewrite.conversions import (
    Conversions,
    Deferred,
    begun_ahead,
    begun_steps,
    find_deferred,
    layouts_made,
)
from autoparallel.rewrite.expressions import ExpressionWriter
from autoparallel.rewrite.gaps import find_gaps
from autoparallel.rewrite.joined_lines import MoveLine
from autoparallel.rewrite.local_calls import LocalCalls
from autoparallel.rewrite.names import Names, layout_name
from autoparallel.rewrite.outermost_dims import MemoryOrder
from autoparallel.rewrite.program import Block, Line
from autoparallel.rules.lookup import known_rule
from autoparallel.rules.ops.contraction import LATE_PRODUCTS
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.runtime.ranks import Ranks

__all__ = ["ConversionEmitter", "fusable"]


class ConversionEmitter:
    """Writes conversions of values, and knows all that is written so far of a rank's program.

    choices: the plan's choice for each op. deferred, made: see conversions.py. lines: of the
    program. block: the recomputed block that is open, if one is; inside: values produced in it.
    open: the op that is being written. blocks: number and members of the recomputed block of each
    op. converted: the names of conversions that are in the text already, by value, steps and scope.
    ahead: see `begun_ahead`; begun: the names of those that have begun, and what else ends them.
    cuts: every sharded size, where dropped copies must be redistributed alike on all ranks
    (`drops`). fused: see `find_fused`. gaps: see `find_gaps`. order: of dims in memory. filled:
    the identifiers of gaps, and the products in them, by number (see `fill`).
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        ranks: Ranks,
        name: str,
        rules: Mapping[str, ShardingRule | None],
        entering: Mapping[str, Layout] | None = None,
        deferred: Deferred | None = None,
    ) -> None:
        self.graph, self.plan, self.ranks, self.name = graph, plan, ranks, name
        self.choices = {op.name: op for op in plan.ops}
        self.routes = Conversions(plan, entering)
        self.deferred = find_deferred(graph, plan, self.routes) if deferred is None else deferred
        self.made = layouts_made(graph, plan, self.deferred, entering)
        self.speller = ExpressionWriter()
        self.symbols = _symbols(graph)
        self.names = Names(ranks.names, (text for text, _, _ in self.symbols), graph.values)
        self.lines: list[Line | Block] = []
        self.block: Block | None = None
        self.open = ""
        self.drops = False
        self.cuts: dict[str, None] = {}
        self.inside: set[str] = set()
        self.gaps = find_gaps(plan)
        self.order = MemoryOrder(graph)
        self.filled: dict[int, tuple[str, tuple[str, ...]]] = {}
        self.nodes = {node.name: node for node in graph.nodes}
        self.blocks = {
            op: (index, group) for index, group in enumerate(plan.recomputed) for op in group
        }
        self.remade, self.count = frozenset(plan.remade), 0
        self.converted: dict[tuple[str, tuple[Step, ...], str], str] = {}
        self.ahead = begun_ahead(plan)
        self.begun: dict[tuple[str, tuple[Step, ...], str], tuple[str, str]] = {}
        self.rules = {
            node.name: rules[node.name]
            if node.name in rules
            else known_rule(OpCall.of(graph, node))
            for node in graph.calls
        }
        self.local = LocalCalls(graph, ranks, self.names, self.speller, self.rules)
        self.fused = self.find_fused()

    def add(self, text: str, reads: tuple[str, ...], makes: tuple[str, ...]) -> None:
        """Append one statement to the block that is open, or to the program."""
        self.append(Line(text, reads, makes))

    def append(self, line: Line) -> None:
        """Append one line to the block that is open, or to the program."""
        (self.lines if self.block is None else self.block.lines).append(line)

    def find_fused(self) -> dict[str, str]:
        """Return products whose bias can be added in the same call:
        from the product's node to the addition's.

        Nothing may happen in between: the product has one reader, which reads it in the layout in
        which it is produced.
        """
        fused: dict[str, str] = {}
        for product, addition in fusable(self.graph, self.rules).items():
            choice, addition_choice = self.choices[product], self.choices[addition]
            # A pending sum is reduced first, or the bias would count on every rank.
            same = (
                addition_choice.operands[0] == choice.results[0]
                and Partial() not in choice.results[0]
            )
            together = self.blocks.get(product) == self.blocks.get(addition)
            if same and together and not self.remade & {product, addition}:
                fused[product] = addition
        return fused

    def read(self, name: str, layout: Layout) -> str:
        """Return the identifier of a value in `layout`; emits its conversion at the first use.

        Raises PlanError where the plan has no steps to the layout.
        """
        current, steps = self.made[name], self.routes.steps(name, layout, self.deferred)
        read = self.names.values[name]
        again = self.routes.is_again(name, layout)
        scope, outside = self.scope(name, again, self.open if self.block is not None else "")
        value = self.graph.values[name]
        for count, step in enumerate(steps):
            # By the steps so far, so that two layouts share the copies on the way to both.
            key = (name, steps[: count + 1], scope)
            target = step.applied(current)
            if key not in self.converted:
                target_name = self.names.fresh(f"{self.names.values[name]}_{layout_name(target)}")
                gap = self.gaps.conversions.get((name, steps[: count + 1]), 0)
                if key in self.begun:
                    handle, rest = self.begun[key]
                    # As it has begun: another conversion of the value may go the same way first.
                    function = "end_again" if rest else "end"
                    text = f"{target_name} = {function}({handle}{rest})"
                    line = Line(text, (handle,), (target_name,))
                else:
                    line = self.step(value, read, target_name, current, step, again, gap, outside)
                self.place(line, outside)
                self.converted[key] = target_name
            read, current = self.converted[key], target
        if current != layout and name not in self.deferred:
            raise PlanError(
                f"the plan does not say how {name} gets from {layout_text(current)} to "
                f"{layout_text(layout)}",
                why="it takes several steps, and the plan lists none",
                fix="plan again",
            )
        return read

    def place(self, line: Line, outside: bool) -> None:
        """Add the line of a conversion. outside: before the block that is open, so that the copy is
        kept when the block is recomputed.
        """
        if outside:
            self.lines.insert(len(self.lines) - 1, line)
        else:
            self.append(line)

    def begin(self, conversion: Conversion) -> None:
        """Emit the beginning of a conversion that is ended where its copy is first read.

        Raises PlanError where it is read in a recomputed block, and is to begin outside of it.
        """
        name, again = conversion.value, conversion.again
        steps = self.routes.steps(name, conversion.target, self.deferred)
        reader = next(reader for reader in conversion.readers if reader in self.choices)
        block = self.blocks.get(reader)
        scope, _ = self.scope(name, again, reader if block is not None else "")
        open_name = "" if self.block is None else self.block.name
        if scope.startswith("block_") and scope != open_name:
            raise PlanError(
                f"{name} is read by {reader} in ops that are recomputed together, and begins to be "
                f"gathered outside of these, at {conversion.begins}",
                fix="plan again",
            )
        # What is read outside of a block, or by several, begins before the one that is open.
        outside = self.block is not None and scope != open_name
        count = begun_steps(steps)
        value, read, current = self.graph.values[name], self.names.values[name], self.made[name]
        for at, step in enumerate(steps[:count], 1):
            key = (name, steps[:at], scope)
            target = step.applied(current)
            if at == count:
                if key not in self.begun and key not in self.converted:
                    self.begun[key] = self.started(value, read, current, step, conversion, outside)
                return
            if key not in self.converted:
                made = self.names.fresh(f"{self.names.values[name]}_{layout_name(target)}")
                self.place(self.step(value, read, made, current, step, again, 0, outside), outside)
                self.converted[key] = made
            read, current = self.converted[key], target

    def started(
        self,
        value: Value,
        read: str,
        current: Layout,
        step: Step,
        conversion: Conversion,
        outside: bool,
    ) -> tuple[str, str]:
        """Emit the start of one step on one axis, and return its name, and what else ends it.

        value, read, current, step, outside: as of `step`.
        """
        axis = self.names.axes[step.axis]
        handle = self.names.fresh(f"{self.names.values[value.name]}_over_{axis}")
        source, target = map(self.speller.placement, (step.source, step.target))
        size = ""
        if isinstance(step.source, Shard):
            local = self.local.dim(value, step.source.dim, current, without=step.axis)
            size = f", {self.speller.size(local)}"
        text = f"{handle} = begin({read}, {axis}, {source}, {target}{size})"
        self.place(Line(text, (read,), (handle,)), outside)
        if not conversion.again:
            return handle, ""
        self.drops = True
        return handle, f", alike, {conversion.distance}" if conversion.distance else ", alike"

    def scope(self, name: str, again: bool, reader: str) -> tuple[str, bool]:
        """Return the block in which a conversion may be read ("" for everywhere), and whether its
        lines belong before the block that is open.

        reader: the op that reads it in a block; "" outside of all. In a block are the copies of
        values that only the block reads, and those that are dropped and redistributed again.
        """
        if not reader:
            return ("again" if again else ""), False
        block = self.blocks[reader]
        if again:
            return f"block_{block[0]}", False
        if name in self.inside:
            return "", False
        alone = all(self.blocks.get(other.name) == block for other in self.graph.readers[name])
        if alone and name not in self.graph.outputs:
            return f"block_{block[0]}", False
        return "", True

    def step(
        self,
        value: Value,
        read: str,
        target_name: str,
        current: Layout,
        step: Step,
        again: bool,
        gap: int,
        outside: bool,
    ) -> Line:
        """Return the line of one step on one axis.

        value: the whole tensor. read, made: names before and after. current: the layout before the
        step. again: the copy is dropped after the forward pass. gap: of the step; 0 for none.
        outside: the line is not in the block that is open.
        """
        function = "convert" if value.requires_grad else "move"
        function = "convert_again" if again else function
        # Nothing else can run in a gap without products.
        gap = gap if gap in self.gaps.products.values() else 0
        weights = self.fill(gap, outside) if gap and not again else []
        if gap and not again:
            function = "overlap.convert_filled" if weights else "overlap.convert"
        placements = [step.source, step.target]
        if not again:
            placements = [self.order.placed(value, placement) for placement in placements]
        source, target = map(self.speller.placement, placements)
        size = ", 0" if again or gap else ""
        if isinstance(step.source, Shard):
            local = self.local.dim(value, step.source.dim, current, without=step.axis)
            # A gather must know the whole size, because uneven parts do not tell it.
            size = f", {self.speller.size(local)}"
        if again:
            self.drops = True
            size += ", alike"
        axis = self.names.axes[step.axis]
        ends = f"{axis}, {source}, {target}{size}"
        if gap and not weights:
            ends += f", {gap}"
        if weights:
            gap_name, pairs = self.filled[gap][0], ", ".join(f"({pair})" for pair in weights)
            text = f"{target_name}, {gap_name} = {function}({read}, {ends}, [{pairs}])"
            held = dict.fromkeys(name for pair in weights for name in pair.split(", "))
            reads = (read, *(name for name in held if name != "None"))
            makes = (target_name, gap_name)
            return MoveLine(text, reads, makes, axis, ends, tuple(weights), gap_name)
        text = f"{target_name} = {function}({read}, {ends})"
        if function == "convert":
            return MoveLine(text, (read,), (target_name,), axis, ends if size else f"{ends}, 0")
        return Line(text, (read,), (target_name,))

    def late(self, node: Node) -> str:
        """Return the call of a product that leaves the gradient of its weight to a gap, "{}"
        standing for its arguments; "" where it leaves none.
        """
        gap = self.gaps.products.get(node.name, 0)
        factors = [self.graph.values[name] for name in node.operands()[:2]]
        if not gap or not all(factor.requires_grad for factor in factors):
            return ""
        name, place = self.place_in_gap(node)
        where = f"{name}, place={place}" if name else str(gap)
        return f"overlap.{LATE_PRODUCTS[node.target]}({{}}, gap={where})"

    def place_in_gap(self, node: Node) -> tuple[str, int]:
        """Return the identifier of the gap that a product was given to fill, and its place in it;
        "" where it was given none.
        """
        name, members = self.filled.get(self.gaps.products.get(node.name, 0), ("", ()))
        return (name, members.index(node.name)) if node.name in members else ("", 0)

    def fill(self, gap: int, outside: bool) -> list[str]:
        """Return the weights and biases of the products that leave their gradients to a gap, as the
        text names them; none where some product must have a number instead.

        outside: the conversion's line is not in the block that is open. A weight that is gathered
        is not at hand yet, and a gap does not pass from one recomputed block to another.
        """
        rows: list[str] = []
        members = [
            name
            for name, number in self.gaps.products.items()
            if number == gap and self.late(self.nodes[name])
        ]
        block = None if outside or self.block is None else self.blocks[self.open]
        for name in members:
            node, addition = self.nodes[name], self.fused.get(name)
            held = [(node.operands()[1], self.choices[name].operands[1])]
            if addition is not None:
                choice = self.choices[addition]
                held.append((self.nodes[addition].operands()[1], choice.operands[1]))
            names = [self.parameter(value, layout) for value, layout in held]
            if self.blocks.get(name) != block or None in names:
                return []
            rows.append(", ".join([*map(str, names), *["None"] * (2 - len(names))]))
        self.filled[gap] = (self.names.fresh(f"gap_{gap}"), tuple(members))
        return rows

    def parameter(self, name: str, layout: Layout) -> str | None:
        """Return the identifier of a parameter that is read as it is stored; None of others."""
        if self.graph.producers[name].kind != "parameter":
            return None
        is_moved = bool(self.routes.steps(name, layout, self.deferred))
        return None if is_moved else self.names.values[name]


def fusable(graph: Graph, rules: Mapping[str, ShardingRule | None]) -> dict[str, str]:
    """Products that nothing but the addition of a bias reads: product's node -> add's node."""
    found: dict[str, str] = {}
    for node in graph.calls:
        addition = rules.get(node.name)
        if addition is None or not addition.adds:
            continue
        first, second = node.operands()
        product = graph.producers[first]
        rule = rules.get(product.name)
        if rule is None or not rule.takes_bias:
            continue
        alone = len(graph.readers[first]) == 1 and first not in graph.outputs
        vector = len(graph.values[second].shape) == 1
        wide = graph.values[second].shape == node.result.shape[-1:]
        if alone and vector and wide and first != second:
            found[product.name] = node.name
    return found


def _symbols(graph: Graph) -> tuple[tuple[str, str, int], ...]:
    """Return the names of the inputs' symbolic sizes, each with an input and a dim that has it."""
    symbols: dict[Any, tuple[str, str, int]] = {}
    for node in graph.nodes:
        for dim, size in enumerate(node.result.shape if node.kind == "input" else ()):
            if isinstance(size, Sym) and size.expr.is_Symbol:
                symbols.setdefault(size.expr, (str(size.expr), node.result.name, dim))
    return tuple(symbols.values())
