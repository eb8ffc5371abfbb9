"""A plan in closed form: what is sent, computed and held, in the sizes of inputs and mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy

from autoparallel.analysis.activation_forms import KeptForms
from autoparallel.analysis.communication import PHASES, Transfer, transfers
from autoparallel.analysis.symbolic_sizes import Algebra
from autoparallel.cost.optimizer_state import state_bytes_per_element
from autoparallel.discovery.unknown_ops import find_unknown
from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph, Node, Value, hint
from autoparallel.graph.repeated_blocks import find_repeats
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.placement import Collective, Invariant, Layout
from autoparallel.plan import OpChoice, ParameterChoice, Plan
from autoparallel.rules.registry import find_rule
from autoparallel.rules.rule import OpCall, ShardingRule

__all__ = ["AMOUNTS", "ClosedForms", "Form", "Sent", "closed_forms"]

ZERO = sympy.Integer(0)
_ORDER = (*PHASES, "kernel")


@dataclass(frozen=True)
class Sent:
    """Collectives that are alike. axis: name of the mesh axis. nbytes: of the tensor of one, as it
    would be on a rank if this axis did not split it. kernel: that makes them, "" for conversions.
    together: they are made in one call.
    """

    phase: str
    axis: str
    collective: Collective
    nbytes: sympy.Expr
    kernel: str = ""
    together: bool = False
    count: int = 1


@dataclass(frozen=True)
class Form:
    """Closed forms of a part of a model, on the busiest rank.

    paths: of the modules for each of which they hold; ("",) for what is in no repeated module.
    flops: of products, forward; backward_flops: backward, those that are run again among them. The
    rest is in bytes; activations: what is kept of the forward pass for the backward pass.
    """

    paths: tuple[str, ...]
    sent: tuple[Sent, ...]
    flops: sympy.Expr
    backward_flops: sympy.Expr
    parameters: sympy.Expr
    gradients: sympy.Expr
    optimizer_state: sympy.Expr
    activations: sympy.Expr

    @property
    def count(self) -> int:
        """Of modules."""
        return len(self.paths)

    @property
    def nbytes(self) -> sympy.Expr:
        """Of all that is sent."""
        return sum((row.count * row.nbytes for row in self.sent), ZERO)


AMOUNTS = ("flops", "backward_flops", "parameters", "gradients", "optimizer_state", "activations")


@dataclass(frozen=True)
class ClosedForms:
    """algebra: what the symbols are called, and stand for. forms: of the parts that differ."""

    algebra: Algebra
    forms: tuple[Form, ...]

    @cached_property
    def total(self) -> Form:
        """Of the whole model."""
        sent: dict[Sent, int] = {}
        for form in self.forms:
            for row in form.sent:
                key = replace(row, count=1)
                sent[key] = sent.get(key, 0) + row.count * form.count
        sums = {
            name: sum((form.count * getattr(form, name) for form in self.forms), ZERO)
            for name in AMOUNTS
        }
        paths = tuple(path for form in self.forms for path in form.paths)
        rows = tuple(replace(key, count=count) for key, count in sent.items())
        return Form(paths, _ordered(rows), **sums)

    def at(self, expression: sympy.Expr, **sizes: int) -> float:
        """What an expression is for these sizes; those that are not given are the plan's own."""
        return self.algebra.at(expression, sizes)


def closed_forms(
    plan: Plan, *, names: Mapping[int, str] | None = None, letters: Sequence[str] = ("b", "s")
) -> ClosedForms:
    """The closed forms of a plan that was made in this process.

    names: what fixed sizes are to be called, {12288: "h"}. letters: what the sizes that the inputs
    decide are called, in the order in which the inputs show them. Sizes are written as if the ranks
    divide them where they do in the plan; elsewhere as what the busiest rank holds.
    Raises PlanError for a plan without its graph (read from a text, or of a model in parts).
    """
    if plan.captured is None:
        raise PlanError(
            "no closed forms without the graph",
            why="the model is not traced whole" if plan.parts else "the plan was read from a text",
            fix="take those of the plans of its parts" if plan.parts else "plan in this process",
        )
    return _Writer(
        plan, with_larger_hints(plan.captured, plan.options.tokens), names, letters
    ).write()


class _Writer:
    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        names: Mapping[int, str] | None,
        letters: Sequence[str],
    ) -> None:
        self.plan, self.graph = plan, graph
        self.algebra = Algebra(graph, plan.mesh, names or {}, letters)
        self.repeats = find_repeats(graph)
        self.ops = {op.name: op for op in plan.ops}
        self.nodes = {node.name: node for node in graph.nodes}
        self.recomputed = {name for names in plan.recomputed for name in names}
        self.cache: dict[Any, Any] = {}

    def write(self) -> ClosedForms:
        """The forms of every module, those that are equal as one."""
        sent: dict[str, list[Sent]] = {}
        amounts: dict[str, dict[str, sympy.Expr]] = {}
        for path, row in self.sent():
            sent.setdefault(path, []).append(row)
        for path, name, amount in self.amounts():
            own = amounts.setdefault(path, dict.fromkeys(AMOUNTS, ZERO))
            own[name] += amount
        groups: dict[Any, list[str]] = {}
        for path in ("", *(block.path for block in self.repeats.blocks)):
            rows = _counted(sent.get(path, ()))
            own = amounts.get(path, dict.fromkeys(AMOUNTS, ZERO))
            groups.setdefault((rows, tuple(own.items())), []).append(path)
        forms = [
            Form(tuple(paths), rows, **dict(own))
            for (rows, own), paths in groups.items()
            if rows or any(amount != 0 for _, amount in own)
        ]
        return ClosedForms(self.algebra, tuple(forms))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made for this key; made if it was not."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def nbytes(self, value: Value, layout: Layout) -> sympy.Expr:
        """What a rank holds of a value."""
        elements = self.once(
            (value.shape, layout), lambda: self.algebra.elements(value.shape, layout)
        )
        return value.dtype.itemsize * elements

    # -- what is sent

    def sent(self) -> Iterable[tuple[str, Sent]]:
        """Every collective, with the module that it belongs to."""
        for transfer in transfers(self.plan):
            axis = self.plan.mesh.axes[transfer.step.axis][0]
            nbytes = self.nbytes(self.graph.values[transfer.conversion.value], _seen(transfer))
            yield (
                self.home(transfer),
                Sent(transfer.phase, axis, transfer.collective, nbytes, together=transfer.together),
            )
        for op in self.plan.ops:
            for at, kernel in enumerate(op.kernels):
                if kernel and self.algebra.sizes[at] > 1:
                    path, name = self.path(op.name), self.plan.mesh.axes[at][0]
                    times = 2 if op.name in self.recomputed else 1
                    for collective, nbytes in self.kernel_sends(op, at) * times:
                        yield path, Sent("kernel", name, collective, nbytes, kernel)

    def home(self, transfer: Transfer) -> str:
        """The module of what makes the value; of what reads it, where it is stored."""
        maker = self.graph.producers[transfer.conversion.value]
        if maker.kind == "call" or self.repeats.block_of(maker.name) is not None:
            return self.path(maker.name)
        return self.path(transfer.conversion.readers[0])

    def path(self, node: str) -> str:
        """Of the repeated module that a node is in, "" for none."""
        block = self.repeats.block_of(node)
        return block.path if block is not None else ""

    def kernel_sends(self, op: OpChoice, axis: int) -> list[tuple[Collective, sympy.Expr]]:
        """What the kernel of one axis communicates. Other splits of what is sent share it."""
        call, rule = self.ruled(op.name)
        own = self.split(rule, op, axis)
        shares = self.algebra.shares(rule, op.operands, op.results)
        found = []
        for at, (collective, size) in enumerate(rule.kernels[own].collectives if own else ()):
            nbytes = self.monomial(call, own, at)
            for loop, share in shares.items():
                dim = rule.sizes[loop]
                has = nbytes.free_symbols >= self.algebra.reads(dim) and size % hint(dim) == 0
                nbytes *= share if loop != own and has else 1
            found.append((collective, nbytes))
        return found

    def split(self, rule: ShardingRule, op: OpChoice, axis: int) -> str:
        """The loop with a kernel that an op splits on an axis."""
        alone = [
            tuple(p if at == axis else Invariant() for at, p in enumerate(layout))
            for layout in (*op.operands, *op.results)
        ]
        count = len(op.operands)
        found = self.algebra.shares(rule, alone[:count], alone[count:])
        return next((loop for loop in found if loop in rule.kernels), "")

    def monomial(self, call: OpCall, loop: str, at: int) -> sympy.Expr:
        """What a kernel sends, as a product of powers of the inputs' sizes.

        The powers are seen by doubling one size after another.
        """
        size = _sent_bytes(call, loop, at)
        found, hints = sympy.Integer(1), 1
        for symbol in self.algebra.inputs:
            doubled = _sent_bytes(self.algebra.scaled(call, symbol, 2), loop, at)
            power = self.algebra.power(size, doubled) or 0
            found *= symbol**power
            hints *= self.algebra.values[symbol] ** power
        return sympy.Rational(size, hints) * found

    # -- what is computed and held

    def amounts(self) -> Iterable[tuple[str, str, sympy.Expr]]:
        """(module, what, how much)."""
        for op in self.plan.ops:
            if op.whole_flops:
                flops = self.op_flops(op)
                yield self.path(op.name), "flops", flops
                again = int(op.name in self.recomputed)
                yield self.path(op.name), "backward_flops", flops * (self.repeated(op) + again)
        readers = self.graph.readers
        for parameter in self.plan.parameters:
            value = self.graph.values[parameter.name]
            path = self.path(parameter.name)
            for name, nbytes in self.stored(parameter, value):
                yield path if readers[parameter.name] else "", name, nbytes
        kept = KeptForms(self.plan, self.graph, self.algebra)
        for name, nbytes in kept.forms():
            maker = self.graph.producers.get(name)
            yield self.path(maker.name if maker is not None else name), "activations", nbytes

    def op_flops(self, op: OpChoice) -> sympy.Expr:
        """Forward, on the busiest rank."""
        _, rule = self.ruled(op.name)
        key = (id(rule), op.operands, op.results)
        shares = self.once(
            ("shares", *key), lambda: self.algebra.shares(rule, op.operands, op.results)
        )
        return self.once(("flops", *key), lambda: self.algebra.flops(rule, shares))

    def repeated(self, op: OpChoice) -> sympy.Expr:
        """How often a product is made again backward: for each of two factors with a gradient."""
        _, rule = self.ruled(op.name)
        made = {loop for dims in rule.results for names in dims for loop in names}
        factors = [
            value
            for value, dims in zip(op.reads, rule.operands, strict=True)
            if any(loop not in made for names in dims for loop in names)
        ]
        if len(factors) < 2:
            factors = list(op.reads)
        grads = sum(self.graph.values[value].requires_grad for value in factors)
        return sympy.Rational(2 * grads, len(factors))

    def stored(self, parameter: ParameterChoice, value: Value) -> Iterable[tuple[str, sympy.Expr]]:
        """Bytes of a parameter, its gradient and its optimizer's state, as `stores` counts them."""
        itemsize = value.dtype.itemsize
        per_element, has_master = state_bytes_per_element(self.plan.options.optimizer, itemsize)
        part = self.nbytes(value, parameter.state)
        yield "parameters", self.nbytes(value, parameter.storage)
        if parameter.state != parameter.storage and not has_master:
            yield "parameters", part
        if value.requires_grad:
            yield "gradients", self.nbytes(value, parameter.gradient)
            yield "optimizer_state", per_element * part / itemsize

    def ruled(self, name: str) -> tuple[OpCall, ShardingRule]:
        """A call and its rule; those of calls that are alike are the same."""
        node = self.nodes[name]
        twin = self.nodes[self.repeats.twin(name)]
        found = self.once(("rule", twin.name), lambda: self.rule_of(twin))
        assert found is not None, node
        call: OpCall = found[0]
        rule: ShardingRule = found[1]
        return call, rule

    def rule_of(self, node: Node) -> tuple[OpCall, ShardingRule]:
        call = OpCall.of(self.graph, node)
        author = find_rule(node.target)
        rule = author(call) if author is not None else find_unknown(call)[0]
        assert rule is not None, node
        return call, rule


def _seen(transfer: Transfer) -> Layout:
    """How the tensor lies for the axis that it is sent on."""
    axis, layout = transfer.step.axis, transfer.layout
    return (*layout[:axis], Invariant(), *layout[axis + 1 :])


def _sent_bytes(call: OpCall, loop: str, at: int) -> int:
    author = find_rule(call.node.target)
    rule = author(call) if author is not None else find_unknown(call)[0]
    assert rule is not None, call
    return rule.kernels[loop].collectives[at][1]


def _counted(rows: Iterable[Sent]) -> tuple[Sent, ...]:
    """Those that are alike as one, in the order of phases and then of first appearance."""
    counts: dict[Sent, int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    return _ordered(replace(row, count=count) for row, count in counts.items())


def _ordered(rows: Iterable[Sent]) -> tuple[Sent, ...]:
    return tuple(sorted(rows, key=lambda row: _ORDER.index(row.phase)))
