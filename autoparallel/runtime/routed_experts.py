"""Routed experts as one op: each token goes through the experts that it chose, and their rows are
added up.

The op is made of torch's own on rows that are sorted by expert, so that autograd, tensors without
data and compilers see those. Every token is treated by itself: tokens may be split without more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoparallel.graph.graph import Ref, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.graph.row_program import LOOKUP, PRODUCT, RowProgram
from autoparallel.runtime.grouped_products import multiply

__all__ = ["routed_experts"]

Tensors = Sequence[torch.Tensor]

_library = torch.library.Library("autoparallel", "FRAGMENT")
_library.define(
    "routed_experts(Tensor[] rows, Tensor experts, Tensor[] values, Tensor[] tables, "
    "Tensor[] plain, str program, ScalarType? dtype=None, "
    "float present=1.0, bool fixed=False) -> Tensor"
)


@dataclass(frozen=True, slots=True)
class _Routes:
    """The rows that go through each expert: one for each choice of a token, sorted by expert.

    places: of the choices among all, in that order. experts: of each, in that order. ends: where
    each expert's rows end. all_here: every choice is among them. absent: the mask of rows that are
    nobody's, where they are kept; None where there are none.
    """

    places: torch.Tensor
    experts: torch.Tensor
    ends: torch.Tensor
    all_here: bool
    absent: torch.Tensor | None = None


def _routes(chosen: torch.Tensor, count: int, present: float, fixed: bool) -> _Routes:
    """Return the routes of choices among `count` experts.

    chosen: of one dim. Choices outside of [0, count) are nobody's here. present: the share of
    choices that are expected to be somebody's; 1 where all are. fixed: sizes must not depend on
    the choices, as in a compiled program.
    """
    absent = None
    places: torch.Tensor | None = None
    all_here = present >= 1.0
    if not all_here:
        inside = (chosen >= 0) & (chosen < count)
        if fixed:
            chosen = torch.where(inside, chosen, count)
        else:
            # Without data, so many as are expected where experts are equally loaded.
            if chosen.is_meta:
                places = chosen.new_zeros(math.ceil(chosen.numel() * present))
            else:
                places = inside.nonzero().squeeze(1)
            chosen = chosen.index_select(0, places)
    experts, order = torch.sort(chosen, stable=True)
    if fixed and not all_here:
        absent = experts >= count
        experts = experts.clamp(max=count - 1)
    numbers = torch.arange(count, device=chosen.device, dtype=chosen.dtype)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    if absent is not None:
        # The last expert's rows end where those that are nobody's begin.
        ends = torch.minimum(ends, (~absent).sum().to(ends.dtype))
    places = order if places is None else places.index_select(0, order)
    return _Routes(places, experts, ends, all_here, absent)


def _without(rows: torch.Tensor, absent: torch.Tensor | None) -> torch.Tensor:
    """Return rows with zeros for those that are nobody's, to which no gradient comes."""
    if absent is None:
        return rows
    return rows.masked_fill(absent.reshape(-1, *[1] * (rows.dim() - 1)), 0)


def _run(program: RowProgram, routes: _Routes, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the rows that a program makes. tensors: by name, all that the program reads."""
    known = dict(tensors)

    def actual(leaf: object) -> object:
        """Return an argument as an op is called with it."""
        return known[leaf.name] if isinstance(leaf, Ref) else leaf

    for step in program.steps:
        args = [map_leaves(actual, arg) for arg in step.args]
        if step.target == PRODUCT:
            x, weight, *transposed = args
            weight = weight.transpose(1, 2) if transposed == [True] else weight
            result = multiply(_without(x, routes.absent), weight, routes.ends)
            known[step.makes[0]] = _without(result, routes.absent)
        elif step.target == LOOKUP:
            looked_up = args[0].index_select(0, routes.experts)
            known[step.makes[0]] = _without(looked_up, routes.absent)
        else:
            kwargs = {key: map_leaves(actual, item) for key, item in step.kwargs}
            returned = operator_of(step.target)(*args, **kwargs)
            results = [returned] if isinstance(returned, torch.Tensor) else list(returned)
            known.update(zip(step.makes, results, strict=True))
    return known[program.result]


def routed_experts(
    rows: Tensors,
    experts: torch.Tensor,
    values: Tensors,
    tables: Tensors,
    plain: Tensors,
    program: str,
    dtype: torch.dtype | None = None,
    present: float = 1.0,
    fixed: bool = False,
) -> torch.Tensor:
    """Return, for each token, the sum of what its experts make of it.

    rows: (*batch, ..) each, of tokens. experts: (*batch, k), those that each token chose. values:
    (*batch, k, ..) each, one of every choice. tables: (e, ..) each, a part for every expert. plain:
    the same for all. program: a `RowProgram` as text, which says what an expert makes of a row.
    dtype: of the result, if not that of what the program makes, in which the sum is made.
    present: the share of choices that are expected to be in [0, e); others count for nothing, and
    there are none where it is 1. fixed: no size in between depends on the choices.
    The result is (*batch, ..). Raises ValueError where rows or values are not of this batch: places
    of other tokens would be read.

    >>> from autoparallel.graph.row_program import RowStep
    >>> step = RowStep(("y",), PRODUCT, (Ref("row0"), Ref("table0")))
    >>> x, weight = torch.tensor([[1.0], [10.0]]), torch.tensor([[[2.0]], [[3.0]]])
    >>> chosen = torch.tensor([[0], [1]])
    >>> routed_experts([x], chosen, [], [weight], [], RowProgram((step,), "y").text())
    tensor([[ 2.],
            [30.]])
    """
    batch, choices = experts.shape[:-1], experts.size(-1)
    leading = len(batch)
    for each, own in [*((row, batch) for row in rows), *((each, experts.shape) for each in values)]:
        if each.shape[: len(own)] != own:
            raise ValueError(f"{tuple(each.shape)} is not one for each of {tuple(own)}")
    routes = _routes(experts.reshape(-1), tables[0].size(0), present, fixed)
    tokens = torch.div(routes.places, choices, rounding_mode="floor")
    tensors = {f"table{index}": table for index, table in enumerate(tables)}
    tensors |= {f"plain{index}": tensor for index, tensor in enumerate(plain)}
    for index, row in enumerate(rows):
        flat = row.reshape(-1, *row.shape[leading:])
        tensors[f"row{index}"] = flat.index_select(0, tokens)
    for index, value in enumerate(values):
        flat = value.reshape(-1, *value.shape[leading + 1 :])
        tensors[f"value{index}"] = _without(flat.index_select(0, routes.places), routes.absent)
    made = _without(_run(RowProgram.parse(program), routes, tensors), routes.absent)
    shape = (*batch, *made.shape[1:])
    count = math.prod(batch)
    if routes.all_here or routes.absent is not None:
        # Back in their order, with one row for each choice.
        places = torch.empty_like(routes.places)
        numbers = torch.arange(places.size(0), device=places.device)
        places = places.scatter(0, routes.places, numbers)
        back = made.index_select(0, places)
        total = back.reshape(count, choices, *made.shape[1:]).sum(1).reshape(shape)
        return total if dtype is None else total.to(dtype)
    total = made.new_zeros((count, *made.shape[1:])).index_add(0, tokens, made)
    return total.to(dtype or made.dtype).reshape(shape)


_library.impl("routed_experts", routed_experts, "CompositeImplicitAutograd")
