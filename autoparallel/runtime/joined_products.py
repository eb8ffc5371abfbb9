"""A conversion and a product beside it as one node: Megatron's column- and row-parallel layers.

Where a product follows a conversion, or a conversion a product, and nothing else reads what is
between the two, one node does both, which takes less time than two. The order of products and
collectives is that of `runtime.filled_gaps` (arXiv:1909.08053, arXiv:2205.05198).
"""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.placement import Placement
from autoparallel.runtime.collectives import convert as convert_and_wait
from autoparallel.runtime.collectives import pending_sum
from autoparallel.runtime.filled_gaps import (
    Gap,
    Later,
    Weights,
    convert_filled,
    flat_weights,
    is_plain,
    late_gradients,
)
from autoparallel.runtime.groups import Group
from autoparallel.runtime.memory_order import in_rows, outer_dim, to_back, to_front
from autoparallel.runtime.products import Linear, Mm, bias_gradient
from autoparallel.runtime.routes import Route, route_between
from autoparallel.support.torch_private import apply_directly, backward_pass

__all__ = [
    "convert_then_linear",
    "convert_then_mm",
    "linear_then_convert",
    "mm_then_convert",
]


class _Joined(torch.autograd.Function):
    """A conversion and the product that reads it (`is_first`), or a product and the conversion of
    its result.

    The result is followed by the converted tensor, where that comes first and is another one: the
    gradient of the weight depends on it, which a second derivative must see; and by the tie of the
    conversion's gap, where there is one. Where rows are moved as they lie, the converted tensor has
    them first, and so has all that is computed between the two moves.

    route: of the conversion. size: of the whole along the split dim of its source. later: of a
    product that comes first, whose weight waits for a gap before it; None where it waits for none.
    places: of the conversion's gap. Of a product that comes second the first place is its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tie: torch.Tensor | None,
        kind: Any,
        route: Route,
        size: int,
        is_first: bool,
        later: Later | None,
        places: list[Later],
        *weights: torch.Tensor | None,
    ) -> Any:
        """Move and multiply."""
        ctx.set_materialize_grads(False)
        outer, back_size = 0, route.back_size(x, size)
        moved: list[torch.Tensor] = []
        has_rows = route.has_rows(x, size)
        if is_first and has_rows:
            outer = route.dim
            rows = x = route.start_rows(to_front(x, outer))()
            moved = [x]
        else:
            if is_first:
                before, x = x, route.move(x, size)
                moved = [] if x is before else [x]
            outer = outer_dim(x)
            # What is multiplied must lie as it is to be moved.
            has_rows = has_rows and outer == route.dim
            rows = to_front(x, outer) if outer else x
        ctx.save_for_backward(x, weight)
        ctx.kind, ctx.outer, ctx.is_first, ctx.has_rows = kind, outer, is_first, has_rows
        ctx.later, ctx.places, ctx.has_moved = later, places, bool(moved)
        ctx.bias_dims = None if bias is None else bias.dim()
        if later is not None:
            later.kind, later.bias_dims = kind, ctx.bias_dims
        result = kind.product(rows, weight, bias)
        if has_rows and not is_first:
            result = route.start_rows(result)()
        if outer:
            result = to_back(result, outer).detach()
        if not (is_first or has_rows):
            # It may be the dim that the product has made.
            back_size, result = route.back_size(result, size), route.start_own(result, size)()
        ctx.back, ctx.back_size, ctx.shape = route.back, back_size, result.shape
        return (result, *moved, x.new_empty(())) if places else (result, *moved)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *others: torch.Tensor | None) -> Any:
        """Return the gradients; those that are late are computed while a gradient is moved."""
        x, weight = ctx.saved_tensors
        if grad is None:
            # The other ranks may have one, and this rank takes part in moving it.
            grad = weight.new_zeros(ctx.shape)
        if torch.is_grad_enabled():
            return _differentiable(ctx, x, weight, grad, others)
        needed, late = ctx.needs_input_grad, []
        is_first, has_rows, outer = ctx.is_first, ctx.has_rows, ctx.outer
        if has_rows:
            grad = to_front(grad, outer)
            if is_first:
                grad = grad.contiguous()
            else:
                wait = ctx.back.start_rows(grad)
                late = late_gradients(ctx.places, needed[10:])
                x, grad = to_front(x, outer), wait()
        else:
            if not is_first:
                wait = ctx.back.start(grad, ctx.back_size)
                late = late_gradients(ctx.places, needed[10:])
                grad = wait()
            outer = outer or outer_dim(grad)
            if outer:
                x, grad = to_front(x, outer), to_front(grad, outer).contiguous()
        of_x = ctx.kind.of_x(weight, grad)
        if outer and not has_rows:
            of_x = to_back(of_x, outer)
        if ctx.has_moved and others[0] is not None:
            of_x = of_x + others[0]
        if is_first:
            if has_rows:
                wait = ctx.back.start_rows(of_x)
            else:
                wait = ctx.back.start_own(of_x, ctx.back_size)
            late = late_gradients(ctx.places, needed[10:])
        of_weight = of_bias = None
        if ctx.later is not None:
            ctx.later.parts = (x, grad, backward_pass())
        else:
            of_weight = ctx.kind.of_weight(x, grad) if needed[1] else None
            of_bias = bias_gradient(grad, ctx.bias_dims) if needed[2] else None
        if is_first:
            of_x = wait()
        if has_rows:
            of_x = to_back(of_x, outer)
        return of_x, of_weight, of_bias, None, None, None, None, None, None, None, *late


_apply_joined = apply_directly(_Joined)


def _differentiable(
    ctx: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    others: tuple[torch.Tensor | None, ...],
) -> tuple[Any, ...]:
    """Return the gradients of `_Joined` where they are differentiated in turn; none is late.

    x, weight: what the product was made of. others: the gradients of its further results.
    """
    back = ctx.back
    ends = (back.group, back.source, back.target, ctx.back_size)
    if not ctx.is_first:
        grad = convert_and_wait(grad, *ends)
    elif ctx.has_rows:
        x = to_back(x, ctx.outer)
    of_x, of_weight = ctx.kind.of_x(weight, grad), ctx.kind.of_weight(x, grad)
    if ctx.has_moved and others[0] is not None:
        of_x = of_x + (to_back(others[0], ctx.outer) if ctx.has_rows else others[0])
    if ctx.is_first:
        of_x = convert_and_wait(of_x, *ends)
    count = len(ctx.needs_input_grad) - 3
    return of_x, of_weight, bias_gradient(grad, ctx.bias_dims), *([None] * count)


def _convert_then(
    kind: Any,
    x: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int,
    weights: Weights,
) -> tuple[torch.Tensor, Gap | None]:
    """Return the product of a converted tensor with the first weight, and the conversion's gap."""
    weight, bias = weights[0]
    if is_plain(x) or not weight.requires_grad:
        moved, gap = convert_filled(x, group, source, target, size, weights)
        return kind.product(moved, weight, bias), gap
    route = route_between(group, source, target)
    if not route.dim:
        x = in_rows(x)  # it may be what is kept
    if len(weights) == 1:
        arguments = (x, weight, bias, None, kind, route, size, True, None, ())
        return _apply_joined(*arguments)[0], None
    places = [Later() for _ in weights[1:]]
    joined = _apply_joined(
        x, weight, bias, None, kind, route, size, True, None, places, *flat_weights(weights[1:])
    )
    return joined[0], Gap(joined[-1], [Later(), *places])


def _then_convert(
    kind: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int,
    weights: Weights,
    gap: Gap | None,
    place: int,
) -> tuple[torch.Tensor, Gap | None]:
    """Return the product with a weight, which is a pending sum, converted, and the conversion's
    gap.
    """
    if is_plain(x) or not weight.requires_grad:
        product = pending_sum(kind.product(x, weight, None), group)
        return convert_filled(product, group, source, target, size, weights)
    x, route = in_rows(x), route_between(group, source, target)
    later, tie = (None, None) if gap is None else (gap.places[place], gap.tie)
    places = [Later() for _ in weights]
    joined = _apply_joined(
        x, weight, None, tie, kind, route, size, False, later, places, *flat_weights(weights)
    )
    return joined[0], Gap(joined[-1], places) if places else None


def convert_then_linear(
    x: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int,
    weights: Weights,
) -> tuple[torch.Tensor, Gap | None]:
    """Return what torch's `linear` makes of a converted tensor, with the first of the weights and
    its bias; and the conversion's gap, in which the others have the places that they have here.
    Collective.

    x, group, source, target, size, weights: as of `convert_filled`. There is no gap where no other
    weight is given, or no gradient is recorded.

    >>> from autoparallel.placement import Invariant, Replicate
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> x, weight = torch.ones(1, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    >>> ends = (SingleGroup(), Invariant(), Replicate(), 0)
    >>> product, _ = convert_then_linear(x, *ends, [(weight, None)])
    >>> product.sum().backward()
    >>> x.grad, weight.grad.sum()
    (tensor([[2., 2., 2.]]), tensor(6.))
    """
    return _convert_then(Linear, x, group, source, target, size, weights)


def convert_then_mm(
    x: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int,
    weights: Weights,
) -> tuple[torch.Tensor, Gap | None]:
    """Return what torch's `mm` makes of a converted tensor; see `convert_then_linear`.

    Example: `product, gap = convert_then_mm(x, group, Shard(0), Replicate(), 8, [(weight, None)])`
    """
    return _convert_then(Mm, x, group, source, target, size, weights)


def linear_then_convert(
    x: torch.Tensor,
    weight: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int,
    weights: Weights,
    *,
    gap: Gap | None,
    place: int,
) -> tuple[torch.Tensor, Gap | None]:
    """Return what torch's `linear` makes without a bias, converted, and the conversion's gap.
    Collective.

    x, weight: of the product, this rank's summand of it. group, source, target, size, weights: of
    the conversion, as of `convert_filled`. gap, place: of an earlier conversion, as of
    `overlap.linear`: the gradient of the product's own weight is computed there.

    >>> from autoparallel.placement import Partial, Shard
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> ends = (SingleGroup(), Partial(), Shard(0), 0)
    >>> linear_then_convert(torch.ones(1, 3), torch.ones(2, 3), *ends, [], gap=None, place=0)
    (tensor([[3., 3.]]), None)
    """
    return _then_convert(Linear, x, weight, group, source, target, size, weights, gap, place)


def mm_then_convert(
    x: torch.Tensor,
    weight: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int,
    weights: Weights,
    *,
    gap: Gap | None,
    place: int,
) -> tuple[torch.Tensor, Gap | None]:
    """Return what torch's `mm` makes, converted; see `linear_then_convert`.

    Example: `part, gap = mm_then_convert(x, weight, *ends, [], gap=gap, place=0)`
    """
    return _then_convert(Mm, x, weight, group, source, target, size, weights, gap, place)
