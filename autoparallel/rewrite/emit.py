"""The program of one rank as readable Python: the graph's ops on local tensors, with conversions.

No op is known by name here: what an op's arguments become on a part is its rule's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph, Node, Sym, Value
from autoparallel.graph.operators import makes_list
from autoparallel.placement import (
    Layout,
    Partial,
    Shard,
    Step,
    layout_gradient,
    layout_text,
    whole_layout,
)
from autoparallel.plan import OpChoice, Plan
from autoparallel.plan.plan_cuts import cuts_of
from autoparallel.rewrite.conversions import (
    Conversions,
    Deferred,
    find_deferred,
    layouts_made,
)
from autoparallel.rewrite.expressions import ExpressionWriter, own_reduction, spelled
from autoparallel.rewrite.gaps import Summed, find_gaps
from autoparallel.rewrite.joined_lines import MoveLine, ProductLine, with_joined_lines
from autoparallel.rewrite.local_calls import LocalCalls
from autoparallel.rewrite.names import Names, layout_name
from autoparallel.rewrite.outermost_dims import MemoryOrder
from autoparallel.rewrite.program import Block, Line, Program, compiled, lines_of, names_of
from autoparallel.rules.any_order import IN_ORDER
from autoparallel.rules.lookup import known_rule
from autoparallel.rules.ops.contraction import LATE_PRODUCTS
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.runtime.ranks import Ranks

__all__ = ["Program", "emit", "fusable"]


def emit(
    graph: Graph,
    plan: Plan,
    ranks: Ranks,
    name: str = "model",
    alter: Callable[[str], str] | None = None,
    rules: Mapping[str, ShardingRule | None] | None = None,
    *,
    entering: Mapping[str, Layout] | None = None,
    deferred: Deferred | None = None,
) -> Program:
    """Return the program of one rank.

    graph, plan: what to run and how; the plan must be of this graph. ranks: the rank's place on
    each mesh axis. name: of the program, in tracebacks. alter: a function that changes the text
    before it is compiled, for tests that break it. rules: of calls, by node name, that are used in
    place of those that are known. entering: the layouts of inputs that are no whole values.
    deferred: the parameters whose gradients the caller sums, where others than this program decide
    on that too (see rewrite/conversions.py).

    Raises PlanError where the plan was made for another graph or another mesh.

    Example: `print(emit(graph, plan, one_axis(group)).source)`.
    """
    if plan.fingerprint != graph.fingerprint:
        raise PlanError(
            "the plan was made for another model",
            why=f"the model's graph is {graph.fingerprint}, the plan's {plan.fingerprint}",
            fix="plan again with this model and these example inputs",
        )
    if tuple(size for _, size in plan.mesh.axes) != ranks.sizes:
        raise PlanError(
            f"a plan for {plan.mesh} on {' x '.join(map(str, ranks.sizes))} ranks", fix="plan again"
        )
    return _Emitter(graph, plan, ranks, name, rules or {}, entering, deferred).program(alter)


class _Emitter:
    """Writes the program of one rank, line by line.

    choices: the plan's choice for each op. deferred, made: see conversions.py. lines: of the
    program. block: the recomputed block that is open, if one is; inside: values produced in it.
    open: the op that is being written. blocks: number and members of the recomputed block of each
    op. converted: the names of conversions that are in the text already, by value, steps and scope.
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
        self.rules = {
            node.name: rules[node.name]
            if node.name in rules
            else known_rule(OpCall.of(graph, node))
            for node in graph.calls
        }
        self.local = LocalCalls(graph, ranks, self.names, self.speller, self.rules)
        self.fused = self.find_fused()

    def program(self, alter: Callable[[str], str] | None) -> Program:
        """Return the whole program: its head, the calls, and what it returns. alter: see `emit`."""
        kinds: dict[str, list[Node]] = {"parameter": [], "buffer": [], "constant": [], "input": []}
        for node in self.graph.nodes:
            if node.kind != "call":
                kinds[node.kind].append(node)
        head = []
        for kind, nodes in kinds.items():
            names = ", ".join(self.names.values[node.result.name] for node in nodes)
            if nodes:
                head.append(f"[{names}] = {kind}s")
        for text, value, dim in self.symbols:
            # Symbolic sizes are read off the inputs, before anything else.
            head.append(f"{text} = {self.names.values[value]}.size({dim})")
        self.speller.symbols = {
            self.graph.values[value].shape[dim].expr: text  # type: ignore[union-attr]
            for text, value, dim in self.symbols
        }
        self.calls()
        returned = []
        for value, layout in zip(self.graph.outputs, self.plan.outputs, strict=True):
            # Reading emits a conversion where the output has another layout than its producer gives
            # it.
            name = self.read(value, layout)
            # The user gets it as the unsplit model returns it.
            returned.append(self.order.returned(self.graph.values[value], name))
        # Buffers are the same on every rank, so that all write the whole value.
        whole = whole_layout(len(self.ranks.sizes))
        written = [self.read(value, whole) for _, value in self.graph.mutations]
        if self.drops:
            self.collect_cuts()
            head.append(f"alike = parts_are_alike(ranks, {', '.join(self.cuts)})")
        ends = (*(name.removesuffix(".contiguous()") for name in returned), *written)
        body = [*head, *lines_of(with_joined_lines(self.lines, ends), ends)]
        body.append(f"return [{', '.join(returned)}], [{', '.join(written)}]")
        source = "def forward(parameters, buffers, constants, inputs, device):\n" + "".join(
            f"    {line}\n" for line in body
        )
        source = alter(source) if alter is not None else source
        shapes = tuple(
            (layout, self.graph.values[value].shape)
            for value, layout in zip(self.graph.outputs, self.plan.outputs, strict=True)
        )
        known = names_of(self.ranks, self.names.axes, self.speller.constants)
        return Program(
            source,
            compiled(source, self.name, self.ranks, known),
            tuple(node.target for node in kinds["parameter"]),
            tuple(layout_gradient(self.made[node.result.name]) for node in kinds["parameter"]),
            tuple(node.target for node in kinds["buffer"]),
            tuple(node.target for node in kinds["constant"]),
            shapes,
            tuple(path for path, _ in self.graph.mutations),
            known,
            tuple(self.local.drawn),
        )

    def calls(self) -> None:
        """Emit all ops, those to be recomputed in blocks.

        Raises PlanError where other ops lie in between.
        """
        group: tuple[str, ...] = ()
        left: set[str] = set()
        for node in self.graph.calls:
            index, members = self.blocks.get(node.name, (0, ()))
            if left and members != group:
                raise PlanError(
                    f"{node.name} lies between ops that are to be recomputed together",
                    where=node.where,
                    why="a recomputed block is one function, and nothing may interrupt it",
                    fix="plan again",
                )
            if members and not left:
                group, left, self.inside = members, set(members), set()
                self.block = Block(f"block_{index}")
                self.lines.append(self.block)
            self.open = node.name
            if node.name in self.remade and self.block is None:
                self.remake(node)
            else:
                self.call(node)
            left.discard(node.name)
            self.inside.update(value.name for value in node.results)
            if not left:
                self.block = None

    def remake(self, node: Node) -> None:
        """Emit an op whose result is not saved; what its operands are converted by stays outside
        of its block.
        """
        before = len(self.lines)
        self.call(node)
        if len(self.lines) > before:
            line = self.lines.pop()
            assert isinstance(line, Line)
            self.count += 1
            self.lines.append(Block(f"made_{self.count}", [line], "remade"))

    def collect_cuts(self) -> None:
        """Collect every cut of a dim, once: the dim's size, and the mesh axes that cut it."""
        for size, splits in dict.fromkeys(cuts_of(self.graph, self.plan)):
            cuts = [f"({axis}, {self.speller.placement(cut)})" for axis, cut in splits]
            self.cuts[f"({', '.join((self.speller.size(size), *cuts))})"] = None

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
            if same and together and addition not in self.remade:
                fused[product] = addition
        return fused

    def call(self, node: Node) -> None:
        """Emit one op: the conversions of its operands, then the op itself."""
        # The addition of its bias emits both.
        if node.name in self.fused:
            return
        choice = self.choices[node.name]
        names = node.operands()
        reads = [
            self.read(name, layout) for name, layout in zip(names, choice.operands, strict=True)
        ]
        args, kwargs = node.args, dict(node.kwargs)
        target, rule = node.target, self.rules[node.name]
        # Ops that fail on empty parts run on stand-ins, and what comes of these is cut off again.
        pads = rule is not None and any(map(rule.needs_elements, rule.loops))
        if rule is not None and pads:
            reads = self.stand_ins_for(node, choice, reads, rule)
        producer = self.graph.producers[names[0]] if names else None
        if producer is not None and self.fused.get(producer.name) == node.name:
            inner = self.choices[producer.name]
            operands = [
                self.read(name, layout)
                for name, layout in zip(producer.operands(), inner.operands, strict=True)
            ]
            reads = [*operands, reads[1]]
            target, text = producer.target, ", ".join(reads)
            product = producer
        else:
            args = self.local.args(node, choice)
            text = self.speller.arguments(args, {**kwargs, **own_reduction(node)}, reads)
            product = node
        late = self.late(product)
        results = [self.names.values[value.name] for value in node.results]
        kernels = self.local.kernels(node, choice)
        if kernels:
            expression = self.local.kernel_call(node, text, kernels)
        elif rule is not None and rule.random:
            expression = f"rng.{rule.random}({text}, {self.local.random(node, choice)})"
        elif rule is not None and rule.function:
            expression = f"kernels.{rule.function}({text})"
        elif target in IN_ORDER and names[0] in self.order.moved:
            expression = f"kernels.{IN_ORDER[target]}({text})"
        elif late:
            expression = late.format(text)
        else:
            # torch's Python functions take no lists with None, as for x[:, index], and a memory
            # format by its name alone.
            exact = any(
                isinstance(arg, torch.memory_format) or (isinstance(arg, tuple) and None in arg)
                for arg in args
            )
            exact = exact or (rule is not None and bool(rule.discovered))  # just what was probed
            expression = f"torch.ops.{target}({text})" if exact else spelled(target, text, reads)
        if rule is not None and pads:
            expression = self.local.without_stand_ins(expression, node, choice, rule)
        pending_groups = []
        for axis, group in enumerate(self.names.axes):
            # A sum that becomes pending here and was not before: each rank has computed its
            # summand.
            pending = [result[axis] for result in choice.results] == [Partial()]
            if pending and all(operand[axis] != Partial() for operand in choice.operands):
                expression = (
                    expression if axis in kernels else f"pending_sum({expression}, {group})"
                )
                pending_groups.append(group)
        summed = self.summed(node) if late and kernels == {} else None
        if summed is not None:
            expression = late.format(text)[:-1] + f", group={self.names.axes[summed.axis]})"
            results = [self.names.fresh(f"{results[0]}_{layout_name(summed.target)}")]
            self.converted[node.result.name, summed.steps, ""] = results[0]
        left_side = ", ".join(results)
        if len(results) == 1 and not kernels and makes_list(target):
            left_side = f"[{left_side}]"
        text = f"{left_side} = {expression}"
        if not late:
            self.add(text, tuple(reads), tuple(results))
            return
        gap, place = self.place_in_gap(product)
        read = (*reads, gap) if gap else tuple(reads)
        if kernels or pads or summed is not None:
            self.add(text, read, tuple(results))
            return
        factors = f"{reads[1]}, {reads[2] if len(reads) > 2 else None}"
        self.append(
            ProductLine(
                text,
                read,
                tuple(results),
                LATE_PRODUCTS[product.target],
                reads[0],
                factors,
                gap,
                place,
                tuple(pending_groups),
            )
        )

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

    def summed(self, node: Node) -> Summed | None:
        """Return how a product is summed while it is computed; None where it is not."""
        name = node.result.name
        kept = name in self.graph.outputs or name in dict(self.graph.mutations).values()
        return None if kept else self.gaps.summed.get(node.name)

    def stand_ins_for(
        self, node: Node, choice: OpChoice, reads: list[str], rule: ShardingRule
    ) -> list[str]:
        """Return the operands, or stand-ins where inputs may be so short that a rank has none."""
        split = self.local.split_dims(node, choice, rule)
        if not any(split):
            return reads
        stand_ins = [self.names.fresh(f"{read}_some") for read in reads]
        before, after = (", ".join(names) for names in (reads, stand_ins))
        self.add(
            f"[{after}] = kernels.stand_ins_for([{before}], {split})",
            tuple(reads),
            tuple(stand_ins),
        )
        return stand_ins

    def read(self, name: str, layout: Layout) -> str:
        """Return the identifier of a value in `layout`; emits its conversion at the first use.

        Raises PlanError where the plan has no steps to the layout.
        """
        current, steps = self.made[name], self.routes.steps(name, layout, self.deferred)
        read = self.names.values[name]
        again = self.routes.is_again(name, layout)
        scope, outside = self.scope(name, again)
        value = self.graph.values[name]
        for count, step in enumerate(steps):
            # By the steps so far, so that two layouts share the copies on the way to both.
            key = (name, steps[: count + 1], scope)
            target = step.applied(current)
            if key not in self.converted:
                target_name = self.names.fresh(f"{self.names.values[name]}_{layout_name(target)}")
                gap = self.gaps.conversions.get((name, steps[: count + 1]), 0)
                line = self.step(value, read, target_name, current, step, again, gap, outside)
                # Before the block, so that the copy is kept when the block is recomputed.
                if outside:
                    self.lines.insert(len(self.lines) - 1, line)
                elif self.block is not None:
                    self.block.lines.append(line)
                else:
                    self.lines.append(line)
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

    def scope(self, name: str, again: bool) -> tuple[str, bool]:
        """Return the block in which a conversion may be read ("" for everywhere), and whether its
        lines belong before the block that is open.

        In a block are the copies of values that only the block reads, and those that are dropped
        and redistributed again.
        """
        if self.block is None:
            return ("again" if again else ""), False
        if again:
            return self.block.name, False
        if name in self.inside:
            return "", False
        alone = all(
            self.blocks.get(reader.name) == self.blocks[self.open]
            for reader in self.graph.readers[name]
        )
        if alone and name not in self.graph.outputs:
            return self.block.name, False
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
