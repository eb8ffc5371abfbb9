"""A plan in closed form: bytes sent, FLOPs and bytes held, in the sizes of inputs and mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any

import sympy

from autoparallel.analysis.activation_forms import ActivationForms
from autoparallel.analysis.communication import Transfer, transfers
from autoparallel.analysis.module_forms import (
    AMOUNTS,
    ZERO,
    ClosedForms,
    Form,
    Sent,
    in_order_of_phases,
)
from autoparallel.analysis.symbolic_sizes import Algebra
from autoparallel.cost.optimizer_state import state_bytes_per_element
from autoparallel.discovery.unknown_ops import find_unknown
from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph, Node, Value, hint
from autoparallel.graph.repeated_blocks import find_repeats
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.placement import Collective, Invariant, Layout, Shard
from autoparallel.plan import OpChoice, ParameterChoice, Plan
from autoparallel.plan.kept_layouts import kept_layout
from autoparallel.rewrite.stages import cut_plan
from autoparallel.rules.lookup import find_rule
from autoparallel.rules.rule import Kernel, OpCall, ShardingRule
from autoparallel.support.arguments import MAKE_ONE, require_kind

__all__ = ["closed_forms"]


def closed_forms(
    plan: Plan, *, names: Mapping[int, str] | None = None, letters: Sequence[str] = ("b", "s")
) -> ClosedForms:
    """Return the closed forms of a plan that was made in this process.

    names: letters for fixed sizes, such as {12288: "h"}. letters: for the sizes that the inputs
    decide, in the order in which the inputs show them. Sizes are written as if the ranks divide
    them where they do in the plan; elsewhere they are those of the busiest rank.
    Raises PlanError for a plan without its graph (read from a text, or of a model in parts).

    >>> import torch, autoparallel
    >>> layer, inputs = torch.nn.Linear(512, 512, bias=False), torch.zeros(8, 512)
    >>> plan = autoparallel.make_plan(layer, 2, example_inputs=inputs)
    >>> forms = closed_forms(plan, names={512: "h"})
    >>> forms.total.parameters, int(forms.at(forms.total.parameters))
    (4*h**2/tp, 524288)
    """
    require_kind(plan, Plan, MAKE_ONE)
    for size, name in (names or {}).items():
        if type(size) is not int or not isinstance(name, str):
            raise PlanError(
                f"{size!r} is called {name!r}", fix='give sizes and their names: {12288: "h"}'
            )
    if plan.captured is None:
        raise PlanError(
            "no closed forms without the graph",
            why="the model is not traced whole" if plan.parts else "the plan was read from a text",
            fix="take those of the plans of its parts" if plan.parts else "plan in this process",
        )
    graph = with_larger_hints(plan.captured, plan.options.tokens)
    if plan.pipeline is not None:
        return _forms_of_stages(plan, graph, names, letters)
    return _Writer(plan, graph, Algebra(graph, plan.mesh, names or {}, letters)).write()


def _forms_of_stages(
    plan: Plan, graph: Graph, names: Mapping[int, str] | None, letters: Sequence[str]
) -> ClosedForms:
    """Return the closed forms of a plan with stages: of each stage, those that are equal as one.

    They are of a whole step: of all micro-batches, and of the activations of those in flight.
    """
    pipeline, captured = plan.pipeline, plan.captured
    assert pipeline is not None
    assert captured is not None
    algebra = Algebra(graph, plan.mesh, names or {}, letters)
    count = algebra.axes[0]
    groups: dict[Any, list[str]] = {}
    for stage in cut_plan(graph, plan):
        own = replace(stage.plan, captured=replace(captured, graph=stage.graph))
        writer = _Writer(own, stage.graph, algebra, stage.entering, pipeline.microbatches)
        form = writer.write().total
        held = pipeline.in_flight[stage.number] if pipeline.in_flight else pipeline.microbatches
        last = stage.number == pipeline.stages - 1
        handed_on = sum(
            (
                writer.nbytes(stage.graph.values[name], layout)
                for name, layout in zip(stage.gives, own.outputs, strict=True)
                if not last
            ),
            ZERO,
        )
        handed_back = sum(
            (
                writer.nbytes(stage.graph.values[name], stage.entering[name])
                for name in stage.takes
                if stage.graph.values[name].requires_grad
            ),
            ZERO,
        )
        form = replace(
            form,
            paths=(),
            flops=form.flops * count,
            backward_flops=form.backward_flops * count,
            activations=form.activations * held,
            handed_on=handed_on * count,
            handed_back=handed_back * count,
        )
        groups.setdefault(form, []).append(f"stage {stage.number}")
    forms = tuple(replace(form, paths=tuple(paths)) for form, paths in groups.items())
    return ClosedForms(algebra, forms)


class _Writer:
    """The state of writing one plan's forms: its ops, nodes, repeated blocks, and answers found
    before.

    received: the layouts of inputs that another stage has computed. microbatches: of a step.
    """

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        algebra: Algebra,
        received: Mapping[str, Layout] | None = None,
        microbatches: int = 1,
    ) -> None:
        self.plan, self.graph, self.algebra = plan, graph, algebra
        self.received, self.microbatches = received, microbatches
        self.repeats = find_repeats(graph)
        self.ops = {op.name: op for op in plan.ops}
        self.nodes = {node.name: node for node in graph.nodes}
        self.recomputed = {name for names in plan.recomputed for name in names}
        self.cache: dict[Any, Any] = {}

    def write(self) -> ClosedForms:
        """Return the forms of every module, those that are equal as one."""
        sent: dict[str, list[Sent]] = {}
        amounts: dict[str, dict[str, sympy.Expr]] = {}
        for path, row in self.sent():
            sent.setdefault(path, []).append(row)
        for path, name, amount in self.amounts():
            module_amounts = amounts.setdefault(path, dict.fromkeys(AMOUNTS, ZERO))
            module_amounts[name] += amount
        groups: dict[Any, list[str]] = {}
        for path in ("", *(block.path for block in self.repeats.blocks)):
            rows = _counted(sent.get(path, ()))
            module_amounts = amounts.get(path, dict.fromkeys(AMOUNTS, ZERO))
            groups.setdefault((rows, tuple(module_amounts.items())), []).append(path)
        forms = [
            Form(tuple(paths), rows, **dict(module_amounts))
            for (rows, module_amounts), paths in groups.items()
            if rows or any(amount != 0 for _, amount in module_amounts)
        ]
        return ClosedForms(self.algebra, tuple(forms))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the answer for this key; it is made at the first time."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def nbytes(self, value: Value, layout: Layout) -> sympy.Expr:
        """Return the bytes of a value that a rank holds."""
        elements = self.once(
            (value.shape, layout), lambda: self.algebra.elements(value.shape, layout)
        )
        return value.dtype.itemsize * elements

    # -- what is sent

    def sent(self) -> Iterable[tuple[str, Sent]]:
        """Yield every collective, with the path of the module that it belongs to."""
        for transfer in transfers(self.plan):
            axis = self.plan.mesh.axes[transfer.step.axis][0]
            nbytes = self.nbytes(self.graph.values[transfer.conversion.value], _seen(transfer))
            row = Sent(
                transfer.phase, axis, transfer.collective, nbytes, together=transfer.together
            )
            # Parameters and their gradients are moved once a step.
            kind = self.graph.producers[transfer.conversion.value].kind
            times = 1 if kind == "parameter" else self.microbatches
            yield self.home(transfer), replace(row, count=times)
        for op in self.plan.ops:
            for at, kernel in enumerate(op.kernels):
                if kernel and self.algebra.sizes[at] > 1:
                    path, name = self.path(op.name), self.plan.mesh.axes[at][0]
                    times = 2 if op.name in self.recomputed else 1
                    for collective, nbytes in self.kernel_sends(op, at) * times:
                        row = Sent("kernel", name, collective, nbytes, kernel)
                        yield path, replace(row, count=self.microbatches)

    def home(self, transfer: Transfer) -> str:
        """Return the path of the module that makes the value or, where it is stored, that
        reads it.
        """
        maker = self.graph.producers[transfer.conversion.value]
        if maker.kind == "call" or self.repeats.block_of(maker.name) is not None:
            return self.path(maker.name)
        return self.path(transfer.conversion.readers[0])

    def path(self, node: str) -> str:
        """Return the path of the repeated module that a node is in, "" for none."""
        block = self.repeats.block_of(node)
        return block.path if block is not None else ""

    def kernel_sends(self, op: OpChoice, axis: int) -> list[tuple[Collective, sympy.Expr]]:
        """Return the collectives of the kernel of one axis, with their bytes.

        Where another axis splits a loop of the tensor that is sent, only a share of it is.
        """
        call, rule = self.ruled(op.name)
        split_loop, kernel = self.split(rule, op, axis)
        if kernel is None:
            return []
        shares = self.algebra.shares(rule, op.operands, op.results)
        sends = []
        for at, (collective, size) in enumerate(kernel.collectives):
            nbytes = self.monomial(call, split_loop, kernel.name, at)
            if kernel.routed[1]:
                sends.append((collective, nbytes * self.routed(op, axis, kernel)))
                continue
            for loop, share in shares.items():
                dim = rule.sizes[loop]
                # Unless the kernel says so, whether the tensor has the loop is read off its size:
                # it has the loop's symbols, and the loop's size divides it.
                has_loop = nbytes.free_symbols >= self.algebra.reads(dim) and size % hint(dim) == 0
                has_loop = kernel.sends(at, loop) if kernel.loops else has_loop
                nbytes *= share if loop != split_loop and has_loop else 1
            sends.append((collective, nbytes))
        return sends

    def routed(self, op: OpChoice, axis: int, kernel: Kernel) -> sympy.Expr:
        """Return how much of all tokens a kernel sends that sends each to the ranks it chose: the
        share that other axes leave, and how many ranks that are, as expected of equal loads.
        """
        ranks = prod(
            size
            for size, name in zip(self.algebra.sizes[: axis + 1], op.kernels, strict=False)
            if name == kernel.name
        )
        copies = Fraction(kernel.copies(ranks)).limit_denominator(1000)
        others = prod(
            symbol
            for at, symbol in enumerate(self.algebra.axes)
            if at != axis and isinstance(op.results[0][at], Shard)
        )
        return sympy.Rational(copies.numerator, copies.denominator) / others

    def split(self, rule: ShardingRule, op: OpChoice, axis: int) -> tuple[str, Kernel | None]:
        """Return the loop that an op splits on an axis by a kernel, and the kernel."""
        axis_layouts = [
            tuple(p if at == axis else Invariant() for at, p in enumerate(layout))
            for layout in (*op.operands, *op.results)
        ]
        count = len(op.operands)
        shares = self.algebra.shares(rule, axis_layouts[:count], axis_layouts[count:])
        name = op.kernel(axis)
        kernels = ((loop, rule.kernel_of(loop, name)) for loop in shares)
        return next(((loop, kernel) for loop, kernel in kernels if kernel is not None), ("", None))

    def monomial(self, call: OpCall, loop: str, kernel: str, at: int) -> sympy.Expr:
        """Return the bytes that a kernel sends as a product of powers of the inputs' sizes.

        call: the op. loop: that the kernel splits. kernel: its name. at: the number of the
        collective. The powers are found by doubling one size after another.
        """
        nbytes = _sent_bytes(call, loop, kernel, at)
        monomial, monomial_here = sympy.Integer(1), 1
        for symbol in self.algebra.inputs:
            doubled = _sent_bytes(self.algebra.scaled(call, symbol, 2), loop, kernel, at)
            power = self.algebra.power(nbytes, doubled) or 0
            monomial *= symbol**power
            monomial_here *= self.algebra.values[symbol] ** power
        return sympy.Rational(nbytes, monomial_here) * monomial

    # -- what is computed and held

    def amounts(self) -> Iterable[tuple[str, str, sympy.Expr]]:
        """Yield (path of the module, one of AMOUNTS, how much)."""
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
        activations = ActivationForms(self.plan, self.graph, self.algebra, self.received)
        for name, nbytes in activations.forms():
            maker = self.graph.producers.get(name)
            yield self.path(maker.name if maker is not None else name), "activations", nbytes

    def op_flops(self, op: OpChoice) -> sympy.Expr:
        """Return the FLOPs of an op in the forward pass, on the busiest rank."""
        _, rule = self.ruled(op.name)
        key = (id(rule), op.operands, op.results)
        shares = self.once(
            ("shares", *key), lambda: self.algebra.shares(rule, op.operands, op.results)
        )
        return self.once(("flops", *key), lambda: self.algebra.flops(rule, shares))

    def repeated(self, op: OpChoice) -> sympy.Expr:
        """Return how many times its forward FLOPs an op's backward pass takes: 2 where all factors
        need gradients.
        """
        _, rule = self.ruled(op.name)
        result_loops = {loop for dims in rule.results for names in dims for loop in names}
        # Factors of a product have a loop that no result has, the summed one; scale and bias do
        # not. A product costs the same again for the gradient of each of its two factors.
        factors = [
            value
            for value, dims in zip(op.reads, rule.operands, strict=True)
            if any(loop not in result_loops for names in dims for loop in names)
        ]
        if len(factors) < 2:
            factors = list(op.reads)
        grads = sum(self.graph.values[value].requires_grad for value in factors)
        return sympy.Rational(2 * grads, len(factors))

    def stored(self, parameter: ParameterChoice, value: Value) -> Iterable[tuple[str, sympy.Expr]]:
        """Yield the bytes of a parameter, its gradient and its optimizer's state."""
        itemsize = value.dtype.itemsize
        per_element, has_master = state_bytes_per_element(self.plan.options.optimizer, itemsize)
        part = self.nbytes(value, parameter.state)
        yield "parameters", self.nbytes(value, parameter.storage)
        sizes = tuple(size for _, size in self.plan.mesh.axes)
        kept = kept_layout(parameter.state, parameter.shape, sizes)
        if parameter.state != parameter.storage and not has_master:
            yield "parameters", part
        elif kept != parameter.state:
            yield "parameters", self.nbytes(value, kept)
        if value.requires_grad:
            yield "gradients", self.nbytes(value, parameter.gradient)
            yield "optimizer_state", per_element * part / itemsize

    def ruled(self, name: str) -> tuple[OpCall, ShardingRule]:
        """Return a call and its rule; those of calls that are alike in repeated blocks are the
        same.
        """
        node = self.nodes[name]
        twin = self.nodes[self.repeats.twin(name)]
        call_and_rule = self.once(("rule", twin.name), lambda: self.rule_of(twin))
        assert call_and_rule is not None, node
        call: OpCall = call_and_rule[0]
        rule: ShardingRule = call_and_rule[1]
        return call, rule

    def rule_of(self, node: Node) -> tuple[OpCall, ShardingRule]:
        """Return a call and its rule, written or discovered."""
        call = OpCall.of(self.graph, node)
        author = find_rule(node.target)
        rule = author(call) if author is not None else find_unknown(call)[0]
        assert rule is not None, node
        return call, rule


def _seen(transfer: Transfer) -> Layout:
    """Return the layout of a sent tensor as the axis that it is sent on sees it: whole on that
    axis.
    """
    axis, layout = transfer.step.axis, transfer.layout
    return (*layout[:axis], Invariant(), *layout[axis + 1 :])


def _sent_bytes(call: OpCall, loop: str, kernel: str, at: int) -> int:
    """Return the bytes of collective number `at` of the kernel that splits a loop."""
    author = find_rule(call.node.target)
    rule = author(call) if author is not None else find_unknown(call)[0]
    assert rule is not None, call
    split = rule.kernel_of(loop, kernel)
    assert split is not None, call
    return split.collectives[at][1]


def _counted(rows: Iterable[Sent]) -> tuple[Sent, ...]:
    """Return rows that are alike as one, in the order of phases and then of first appearance."""
    counts: dict[Sent, int] = {}
    for row in rows:
        key = replace(row, count=1)
        counts[key] = counts.get(key, 0) + row.count
    return in_order_of_phases(replace(row, count=count) for row, count in counts.items())
