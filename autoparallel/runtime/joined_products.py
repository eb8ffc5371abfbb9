"""A conversion and products beside it as one node: Megatron's column- and row-parallel layers.

Where products follow a conversion, or a conversion a product, and nothing else reads what is
between them, one node does all, which takes less time than several. Of several products, such as
those of queries, keys and values, the gradients are summed as they are computed. The order of
products and collectives is that of `runtime.filled_gaps` (arXiv:1909.08053, arXiv:2205.05198).
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


class _ConvertThen(torch.autograd.Function):
    """A conversion and the products that read it.

    The results are followed by the converted tensor, where that is another one: the gradients of
    the weights depend on it, which a second derivative must see; and by the tie of the conversion's
    gap, where further weights fill it. Where rows are moved as they lie, the converted tensor has
    them first, and so has all that is computed between the two moves.

    count: of the products. route: of the conversion. size: of the whole along the split dim of its
    source. places: of the weights in the gap that come behind those of the products. weights: all,
    each with its bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kind: Any,
        count: int,
        route: Route,
        size: int,
        places: list[Later],
        *weights: torch.Tensor | None,
    ) -> Any:
        """Move and multiply."""
        ctx.set_materialize_grads(False)
        ctx.back, ctx.back_size = route.back, route.back_size(x, size)
        ctx.ends = (route.group, route.source, route.target, size)
        ctx.has_rows = has_rows = route.has_rows(x, size)
        if has_rows:
            outer = route.dim
            x = rows = route.start_rows(to_front(x, outer))()
            moved = [x]
        else:
            before, x = x, route.move(x, size)
            moved = [] if x is before else [x]
            outer = outer_dim(x)
            rows = to_front(x, outer) if outer else x
        own = weights[: 2 * count]
        pairs = list(zip(own[::2], own[1::2], strict=True))
        ctx.save_for_backward(x, *own[::2])
        ctx.kind, ctx.outer, ctx.places, ctx.has_moved = kind, outer, places, bool(moved)
        ctx.bias_dims = [None if bias is None else bias.dim() for _, bias in pairs]
        results = [kind.product(rows, weight, bias) for weight, bias in pairs]
        if outer:
            results = [to_back(result, outer).detach() for result in results]
        ctx.shape = results[0].shape
        return (*results, *moved, x.new_empty(())) if places else (*results, *moved)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor | None) -> Any:
        """Return the gradients; those of weights are computed while that of x is moved."""
        x, *weights = ctx.saved_tensors
        kind, count, needed = ctx.kind, len(weights), ctx.needs_input_grad[6:]
        grads, of_moved = list(given[:count]), given[count] if ctx.has_moved else None
        if all(grad is None for grad in grads):
            # The other ranks may have one, and this rank takes part in moving it.
            grads[0] = weights[0].new_zeros(ctx.shape)
        outer, has_rows, nested = ctx.outer, ctx.has_rows, torch.is_grad_enabled()
        if nested:
            # The gradients are differentiated in turn: they must hang together, and none is late.
            # A tensor that is converted without a move is kept as it was before.
            x = to_back(x, outer) if has_rows else x
            x = x if ctx.has_moved else convert_and_wait(x, *ctx.ends)
            outer, has_rows = 0, False
        elif outer or any(grad is not None and outer_dim(grad) for grad in grads):
            outer = outer or next(filter(None, (outer_dim(g) for g in grads if g is not None)))
            x = x if has_rows else to_front(x, outer)
            grads = [None if g is None else to_front(g, outer).contiguous() for g in grads]
        some = [(at, grad) for at, grad in enumerate(grads) if grad is not None]
        of_x = kind.of_x(weights[some[0][0]], some[0][1])
        for at, grad in some[1:]:
            of_x = kind.of_x_and(of_x, weights[at], grad)
        if outer and not has_rows:
            of_x = to_back(of_x, outer)
        if of_moved is not None:
            of_x = of_x + (to_back(of_moved, ctx.outer) if nested and ctx.has_rows else of_moved)
        late: list[Any] = []
        back = ctx.back
        if nested:
            of_x = convert_and_wait(of_x, back.group, back.source, back.target, ctx.back_size)
            late = [None] * (len(needed) - 2 * count)
        else:
            wait = back.start_rows(of_x) if has_rows else back.start_own(of_x, ctx.back_size)
            late = late_gradients(ctx.places, needed[2 * count :])
        own: list[Any] = [None] * (2 * count)
        for at, grad in reversed(some):
            if needed[2 * at]:
                own[2 * at] = kind.of_weight(x, grad)
            if needed[2 * at + 1]:
                own[2 * at + 1] = bias_gradient(grad, ctx.bias_dims[at])
        if not nested:
            of_x = wait()
            of_x = to_back(of_x, outer) if has_rows else of_x
        return of_x, None, None, None, None, None, *own, *late


_apply_convert_then = apply_directly(_ConvertThen)


class _ThenConvert(torch.autograd.Function):
    """A product and the conversion of its result, which the tie of the conversion's gap follows,
    where there is one. Where rows are moved as they lie, the product has them first.

    route: of the conversion. size: of the whole along the split dim of its source. later: of a
    product whose weight waits for a gap before it; None where it waits for none. places: of the
    weights that fill the conversion's gap.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        tie: torch.Tensor | None,
        kind: Any,
        route: Route,
        size: int,
        later: Later | None,
        places: list[Later],
        *weights: torch.Tensor | None,
    ) -> Any:
        """Multiply and move."""
        ctx.set_materialize_grads(False)
        ctx.outer = outer = outer_dim(x)
        # What is multiplied must lie as it is to be moved.
        ctx.has_rows = has_rows = route.has_rows(x, size) and outer == route.dim
        ctx.save_for_backward(x, weight)
        ctx.kind, ctx.later, ctx.places = kind, later, places
        ctx.back, ctx.back_size = route.back, route.back_size(x, size)
        if later is not None:
            later.kind = kind
        result = kind.product(to_front(x, outer) if outer else x, weight, None)
        if has_rows:
            result = route.start_rows(result)()
        if outer:
            result = to_back(result, outer).detach()
        if not has_rows:
            # It may be the dim that the product has made.
            ctx.back_size = route.back_size(result, size)
            result = route.start_own(result, size)()
        ctx.shape = result.shape
        return (result, x.new_empty(())) if places else (result,)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *tie: torch.Tensor | None) -> Any:
        """Return the gradients; those that are late are computed while that of the result is
        moved.
        """
        x, weight = ctx.saved_tensors
        if grad is None:
            # The other ranks may have one, and this rank takes part in moving it.
            grad = weight.new_zeros(ctx.shape)
        back, outer, needed = ctx.back, ctx.outer, ctx.needs_input_grad
        if torch.is_grad_enabled():
            grad = convert_and_wait(grad, back.group, back.source, back.target, ctx.back_size)
            of_x, of_weight = ctx.kind.of_x(weight, grad), ctx.kind.of_weight(x, grad)
            return of_x, of_weight, *([None] * (len(needed) - 2))
        if ctx.has_rows:
            wait = back.start_rows(to_front(grad, outer))
        else:
            wait = back.start(grad, ctx.back_size)
        late = late_gradients(ctx.places, needed[8:])
        grad = wait()
        if ctx.has_rows:
            x = to_front(x, outer)
        else:
            outer = outer or outer_dim(grad)
            if outer:
                x, grad = to_front(x, outer), to_front(grad, outer).contiguous()
        of_x, of_weight = ctx.kind.of_x(weight, grad), None
        if outer:
            of_x = to_back(of_x, outer)
        if ctx.later is not None:
            ctx.later.parts = (x, grad, backward_pass())
        elif needed[1]:
            of_weight = ctx.kind.of_weight(x, grad)
        return of_x, of_weight, None, None, None, None, None, None, *late


_apply_then_convert = apply_directly(_ThenConvert)


def _convert_then(
    kind: Any,
    x: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int,
    weights: Weights,
    count: int,
) -> tuple[Any, ...]:
    """Return the products of a converted tensor with the first weights, and the conversion's
    gap.
    """
    own = weights[:count]
    if is_plain(x) or not all(weight.requires_grad for weight, _ in own):
        moved, gap = convert_filled(x, group, source, target, size, weights)
        return *(kind.product(moved, weight, bias) for weight, bias in own), gap
    route = route_between(group, source, target)
    if not route.dim:
        x = in_rows(x)  # it may be what is kept
    places = [Later() for _ in weights[count:]]
    made = _apply_convert_then(x, kind, count, route, size, places, *flat_weights(weights))
    gap = Gap(made[-1], [*(Later() for _ in own), *places]) if places else None
    return *made[:count], gap


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
    made = _apply_then_convert(
        x, weight, tie, kind, route, size, later, places, *flat_weights(weights)
    )
    return made[0], Gap(made[-1], places) if places else None


def convert_then_linear(
    x: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int,
    weights: Weights,
    count: int = 1,
) -> tuple[Any, ...]:
    """Return what torch's `linear` makes of a converted tensor, with each of the first weights and
    its bias; and the conversion's gap, in which the others have the places that they have here.
    Collective.

    x, group, source, target, size, weights: as of `convert_filled`. count: of the products. There
    is no gap where no other weight is given, or no gradient is recorded.

    >>> from autoparallel.placement import Invariant, Replicate
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> x, weight = torch.ones(1, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    >>> ends = (SingleGroup(), Invariant(), Replicate(), 0)
    >>> product, _ = convert_then_linear(x, *ends, [(weight, None)])
    >>> product.sum().backward()
    >>> x.grad, weight.grad.sum()
    (tensor([[2., 2., 2.]]), tensor(6.))
    """
    return _convert_then(Linear, x, group, source, target, size, weights, count)


def convert_then_mm(
    x: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int,
    weights: Weights,
    count: int = 1,
) -> tuple[Any, ...]:
    """Return what torch's `mm` makes of a converted tensor; see `convert_then_linear`.

    Example: `product, gap = convert_then_mm(x, group, Shard(0), Replicate(), 8, [(weight, None)])`
    """
    return _convert_then(Mm, x, group, source, target, size, weights, count)


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
