"""Values whose elements follow from their places alone, found in a graph.

What is computed from sizes, and from nothing else, is told as a formula in the places along its
dims. A formula holds for all sizes: a mask that hides what is behind each query is told from one
that does so for short sequences alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import inf
from typing import Any

import sympy
import torch

from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, size_expression
from autoparallel.graph.place_formulas import (
    Affine,
    Bias,
    Formula,
    Fraction,
    Truth,
    changed,
    in_shape,
    is_zero,
)

__all__ = ["place_values"]

# The types of places: others do not hold high ones.
_WHOLE = (torch.int32, torch.int64)


def place_values(graph: Graph) -> dict[str, Formula]:
    """Return the formulas of all values that follow from their places alone, by name.

    A value that depends on anything else, or on an op of which no formula is known, has none.
    """
    values = _Values(graph, {})
    for node in graph.calls:
        rule = _RULES.get(node.target)
        if rule is None or any(name not in values.formulas for name in node.operands()):
            continue
        formula = rule(node, values)
        if formula is not None:
            narrow = partial(in_shape, shape=node.result.shape)
            values.formulas[node.result.name] = changed(formula, narrow)
    return values.formulas


@dataclass(frozen=True, slots=True)
class _Values:
    """The values of a graph, and the formulas that are known of them."""

    graph: Graph
    formulas: dict[str, Formula]

    def formula(self, item: Any) -> Formula | None:
        """Return the formula of an argument, which is a value or a number."""
        if isinstance(item, Ref):
            return self.formulas[item.name]
        if isinstance(item, bool):
            return Truth.always(item)
        if isinstance(item, int | Sym):
            return Affine(size_expression(item))
        return Fraction(item) if isinstance(item, float) else None

    def first(self, node: Node) -> Formula:
        """Return the formula of a node's first operand."""
        return self.formulas[node.args[0].name]

    def shape(self, item: Ref) -> tuple[Dim, ...]:
        """Return the shape of an argument that is a value."""
        return self.graph.values[item.name].shape

    def affine(self, item: Any) -> Affine | None:
        """Return the formula of an argument that is a whole number."""
        formula = self.formula(item)
        return formula if isinstance(formula, Affine) else None


def _counted(node: Node, values: _Values) -> Formula | None:
    """Return the formula of a range of numbers."""
    numbers = [values.affine(each) for each in node.args[:3]]
    start, step = Affine(sympy.Integer(0)), Affine(sympy.Integer(1))
    if len(numbers) > 1:
        start, step = (*numbers, step)[0], (*numbers, step)[2]  # type: ignore[assignment]
    known = None not in (*numbers, start, step) and node.result.dtype in _WHOLE
    return Affine(start.start, (int(step.start),)) if known and step.start.is_Integer else None


def _filled(node: Node, values: _Values) -> Formula | None:
    """Return the formula of one number everywhere."""
    number: Any = {"ones": 1, "zeros": 0}.get(node.target.split(".")[1])
    if number is None:
        number = node.args[0] if "scalar" in node.target else node.argument(1, "fill_value")
    dtype = node.result.dtype
    if not isinstance(number, bool | int | float):
        return None
    if dtype == torch.bool:
        return Truth.always(bool(number))
    if dtype.is_floating_point:
        return Fraction(float(number))
    return Affine(sympy.Integer(int(number))) if dtype in _WHOLE else None


def _cast(node: Node, values: _Values) -> Formula | None:
    """Return the formula of a value of another type, where that holds the same numbers."""
    formula = values.first(node)
    if isinstance(formula, Affine):
        return formula if node.result.dtype in _WHOLE else None
    hides = isinstance(formula, Bias) and node.result.dtype.is_floating_point
    return formula if isinstance(formula, Truth) or hides else None


def _same(node: Node, values: _Values) -> Formula | None:
    """Return the formula of the operand, which is copied or expanded."""
    return values.first(node)


def _viewed(node: Node, values: _Values) -> Formula | None:
    """Return the formula of a value that gains and loses dims of one place alone."""
    before, after = values.shape(node.args[0]), node.result.shape
    long = [dim for dim, size in enumerate(before) if size != 1]
    places = [dim for dim, size in enumerate(after) if size != 1]
    if [before[dim] for dim in long] != [after[dim] for dim in places]:
        return None
    source = dict(zip(places, long, strict=True))
    order = [source.get(dim) for dim in range(len(after))]
    return _arranged(values.first(node), len(before), order)


def _permuted(node: Node, values: _Values) -> Formula | None:
    """Return the formula of a value whose dims change places."""
    rank = len(node.result.shape)
    order = list(range(rank))
    if node.target == "aten.permute.default":
        order = [dim % rank for dim in node.args[1]]
    else:
        one, two = (dim % rank for dim in node.args[1:3])
        order[one], order[two] = two, one
    return _arranged(values.first(node), rank, order)


def _arranged(formula: Formula, rank: int, order: list[Any]) -> Formula:
    """Return a formula in other dims.

    order: for each dim the one that it was among `rank`, None for a dim of one place.
    """

    def arrange(part: Affine) -> Affine:
        """Return the part in the other dims."""
        steps = part.wide(rank).steps
        return Affine(part.start, tuple(0 if dim is None else steps[dim] for dim in order))

    return changed(formula, arrange)


def _repeated(node: Node, values: _Values) -> Formula | None:
    """Return the formula of a value that is repeated along dims of which it has one place."""
    before, times = values.shape(node.args[0]), node.args[1]
    wide = (1,) * (len(times) - len(before)) + before
    once = all(1 in pair for pair in zip(wide, times, strict=True))
    return values.first(node) if once else None


def _sliced(node: Node, values: _Values) -> Formula | None:
    """Return the formula of a part along one dim."""
    rank = len(node.result.shape)
    dim = node.argument(1, "dim", 0) % rank
    first = values.affine(node.argument(2, "start") or 0)
    step = node.argument(4, "step", 1) if node.target == "aten.slice.Tensor" else 1
    # Places below 0 count from the end.
    if first is None or not first.start.is_nonnegative or not isinstance(step, int):
        return None
    begin = first.start

    def cut(part: Affine) -> Affine:
        """Return the part in places of the slice."""
        steps = list(part.wide(rank).steps)
        start = part.start + steps[dim] * begin
        steps[dim] *= step
        return Affine(start, tuple(steps))

    return changed(values.first(node), cut)


def _joined(node: Node, values: _Values) -> Formula | None:
    """Return the formula of values laid end to end that go on as they began."""
    rank = len(node.result.shape)
    dim = node.argument(1, "dim", 0) % rank
    # The formula of the parts so far, in places that count back from the end of the last one.
    whole, at = None, sympy.Integer(0)
    for item in reversed(node.args[0]):
        part, size = values.affine(item), values.shape(item)[dim]
        if part is None:
            return None
        at -= size_expression(size)
        steps = part.wide(rank).steps
        if whole is not None and size == 1:
            steps = (*steps[:dim], whole.steps[dim], *steps[dim + 1 :])
        here = Affine((part.start - steps[dim] * at).expand(), steps)
        if whole not in (None, here):
            return None
        whole = here
    return whole and Affine((whole.start + whole.steps[dim] * at).expand(), whole.steps)


def _added(node: Node, values: _Values) -> Formula | None:
    """Return the formula of a sum or a difference of whole numbers."""
    one, two = (values.affine(each) for each in node.args[:2])
    times = node.argument(2, "alpha", 1)
    if one is None or two is None or node.result.dtype not in _WHOLE or type(times) is not int:
        return None
    return one.plus(two, -times if "sub" in node.target else times)


def _looked_up(node: Node, values: _Values) -> Formula | None:
    """Return the formula of a value's elements at places that have formulas themselves."""
    table, places = values.affine(node.args[0]), node.args[1]
    if table is None or len(places) != len(table.steps) or None in places:
        return None
    found = Affine(table.start)
    for step, item in zip(table.steps, places, strict=True):
        place = values.affine(item)
        # Places below 0 count from the end.
        if place is None or min(place.steps, default=0) < 0 or not place.start.is_nonnegative:
            return None
        found = found.plus(place, step)
    return found


def _compared(node: Node, values: _Values) -> Formula | None:
    """Return where a comparison of whole numbers is true."""
    one, two = (values.formula(each) for each in node.args[:2])
    name = node.target.split(".")[1]
    if isinstance(one, Truth) and isinstance(two, Affine) and is_zero(two):
        return {"eq": one.denied(), "ne": one, "gt": one}.get(name)
    if not (isinstance(one, Affine) and isinstance(two, Affine)):
        return None
    more, less, unit = one.plus(two, -1), two.plus(one, -1), Affine(sympy.Integer(1))
    if name in ("eq", "ne"):
        differ = more.is_constant() and more.start.is_nonzero
        equal = Truth.always(False) if differ else Truth.of(more, less)
        return equal if name == "eq" else equal.denied()
    return {
        "ge": Truth.of(more),
        "le": Truth.of(less),
        "gt": Truth.of(more.plus(unit, -1)),
        "lt": Truth.of(less.plus(unit, -1)),
    }[name]


def _both(node: Node, values: _Values) -> Formula | None:
    """Return where two values are true."""
    one, two = (values.formula(each) for each in node.args[:2])
    if not (isinstance(one, Truth) and isinstance(two, Truth)):
        return None
    rank = len(node.result.shape)
    return Truth(frozenset(each.wide(rank) for each in (*one.conditions, *two.conditions)))


def _denied(node: Node, values: _Values) -> Formula | None:
    """Return where a value is not true. The bits of a number are not its truth."""
    formula = values.first(node)
    of_bits = "bitwise" in node.target and node.result.dtype != torch.bool
    return formula.denied() if isinstance(formula, Truth) and not of_bits else None


def _summed(node: Node, values: _Values) -> Formula | None:
    """Return the running sum of what is 0 everywhere."""
    return Affine(sympy.Integer(0)) if is_zero(values.first(node)) else None


def _triangle(node: Node, values: _Values) -> Formula | None:
    """Return the formula of a triangle of ones, or of a triangle of what hides."""
    formula, rank = values.first(node), len(node.result.shape)
    diagonal = node.argument(1, "diagonal", 0)
    if not isinstance(diagonal, int):
        return None
    kept = Affine(sympy.Integer(diagonal), (*(0,) * (rank - 2), 1, -1))
    kept = kept.times(-1) if "triu" in node.target else kept
    if formula in (Fraction(1.0), Affine(sympy.Integer(1), (0,) * rank)):
        formula = Truth()
    if isinstance(formula, Truth):
        return Truth(formula.conditions | {kept})
    seen = Truth.of(kept).denied()
    return Bias(seen) if _hides(formula, node) and seen is not None else None


def _chosen(node: Node, values: _Values) -> Formula | None:
    """Return the bias that is 0 where a condition is true, or false, and hides elsewhere."""
    if "where" in node.target:
        condition, there, elsewhere = (values.formula(each) for each in node.args[:3])
    else:
        elsewhere, condition, there = (values.formula(each) for each in node.args[:3])
    if not isinstance(condition, Truth):
        return None
    if is_zero(there) and _hides(elsewhere, node):
        return Bias(condition)
    denied = condition.denied()
    return Bias(denied) if is_zero(elsewhere) and _hides(there, node) and denied else None


def _hides(formula: Formula | None, node: Node) -> bool:
    """Return whether scores to which a number is added count nothing any more."""
    kind = node.result.dtype
    lowest = torch.finfo(kind).min if kind.is_floating_point else -inf
    return isinstance(formula, Fraction) and formula.number <= lowest


_KINDS = " ".join(
    f"{name}.{kind}"
    for name, kind in product(("eq", "ne", "le", "lt", "ge", "gt"), ("Tensor", "Scalar"))
)
_RULES: Mapping[str, Callable[[Node, _Values], Formula | None]] = {
    f"aten.{name}": rule
    for rule, names in (
        (_counted, "arange.default arange.start arange.start_step"),
        (_filled, "ones.default zeros.default full.default scalar_tensor.default"),
        (_cast, "to.dtype _to_copy.default"),
        (_same, "clone.default contiguous.default detach.default expand.default"),
        (_viewed, "unsqueeze.default squeeze.dim reshape.default view.default"),
        (_repeated, "repeat.default"),
        (_permuted, "permute.default transpose.int"),
        (_sliced, "slice.Tensor narrow.default"),
        (_joined, "cat.default"),
        (_added, "add.Tensor sub.Tensor add.Scalar sub.Scalar"),
        (_looked_up, "index.Tensor"),
        (_compared, _KINDS),
        (_both, "__and__.Tensor bitwise_and.Tensor logical_and.default"),
        (_denied, "logical_not.default bitwise_not.default"),
        (_summed, "cumsum.default"),
        (_triangle, "tril.default triu.default"),
        (_chosen, "where.self where.ScalarOther where.ScalarSelf where.Scalar masked_fill.Scalar"),
    )
    for name in names.split()
}  # fmt: skip
