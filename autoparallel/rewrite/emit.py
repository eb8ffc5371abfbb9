"""The program of one rank as readable Python: the graph's ops on local tensors, with conversions.

No op is known by name here: what an op's arguments become on a part is its rule's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.operators import makes_list
from autoparallel.placement import (
    Layout,
    Partial,
    layout_gradient,
    whole_layout,
)
from autoparallel.plan import OpChoice, Plan
from autoparallel.plan.plan_cuts import cuts_of
from autoparallel.rewrite.conversions import (
    Deferred,
)
from autoparallel.rewrite.emitted_conversions import ConversionEmitter
from autoparallel.rewrite.expressions import own_reduction, spelled
from autoparallel.rewrite.gaps import Summed
from autoparallel.rewrite.joined_lines import ProductLine, with_joined_lines
from autoparallel.rewrite.names import layout_name
from autoparallel.rewrite.program import Block, Line, Program, compiled, lines_of, names_of
from autoparallel.rules.any_order import IN_ORDER
from autoparallel.rules.ops.contraction import LATE_PRODUCTS
from autoparallel.rules.rule import ShardingRule
from autoparallel.runtime.ranks import Ranks

__all__ = ["Program", "emit"]

# Ops of which torch gives no second derivatives on a rank that holds nothing, and the functions of
# the runtime that give them.
_OF_NOTHING = {
    "aten.embedding.default": "embedding",
    "aten.scaled_dot_product_attention.default": "attention",
}


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


class _Emitter(ConversionEmitter):
    """Writes the program of one rank, line by line."""

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
        if self.drops or self.remade:
            head = [self.in_order(line, kinds["input"]) for line in head]
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
            if node.name in self.remade and self.block is None and self.is_read(node):
                self.remake(node)
            else:
                self.call(node)
            left.discard(node.name)
            self.inside.update(value.name for value in node.results)
            if not left:
                self.block = None

    def is_read(self, node: Node) -> bool:
        """Return whether anything reads what an op makes; nothing reads what a check makes."""
        names = [value.name for value in node.results]
        return any(self.graph.readers[name] or name in self.graph.outputs for name in names)

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

    @staticmethod
    def in_order(line: str, inputs: list[Node]) -> str:
        """Return a line of the head; the one that takes the inputs brings their elements in order.

        An op that keeps a copy of what is out of order would otherwise keep it on the ranks alone
        that were given it so, and these would not make the same copies again as the others.
        """
        numbers = any(node.result.dtype.is_floating_point for node in inputs)
        if numbers and line.endswith("] = inputs"):
            return f"{line.removesuffix('inputs')}[given.contiguous() for given in inputs]"
        return line

    def collect_cuts(self) -> None:
        """Collect every cut of a dim, once: the dim's size, and the mesh axes that cut it."""
        for size, splits in dict.fromkeys(cuts_of(self.graph, self.plan)):
            cuts = [f"({axis}, {self.speller.placement(cut)})" for axis, cut in splits]
            self.cuts[f"({', '.join((self.speller.size(size), *cuts))})"] = None

    def call(self, node: Node) -> None:
        """Emit one op: what begins before it, the conversions of its operands, then the op."""
        for conversion in self.ahead.get(node.name, ()):
            self.begin(conversion)
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
        elif target in _OF_NOTHING and self.local.may_hold_nothing(node, choice):
            expression = f"kernels.{_OF_NOTHING[target]}({text})"
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
