"""Collectives that run while other work is done: conversions in two halves, and late products.

A conversion is two nodes of autograd's graph, and what is recorded between them hides its
collective in either pass (`runtime.flights`).

What hides a gradient's collective is the gradients of weights. Nothing waits for these but the
optimizer, while everything waits for the gradients of activations. So they are computed in a *gap*:
right before the wait of a conversion that the program has made earlier. This is the order of
Megatron's linear layer with its asynchronous all-reduce (arXiv:1909.08053, and arXiv:2205.05198 for
the sequence-parallel one).

There are two ways. Where the weights are at hand when the conversion is made, as parameters are,
they are operands of it as well, and its one node computes their gradients (`runtime.filled_gaps`).
Weights that are gathered later get nodes of their own, which are numbered to run in the gap.

All of this is ordinary autograd. Derivatives of any order are right, and under torch.compile, which
has an order of its own, the functions here are the plain ones.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from autoparallel.placement import Invariant, Partial, Placement
from autoparallel.runtime.collectives import convert as convert_and_wait
from autoparallel.runtime.collectives import for_parts, pending_sum
from autoparallel.runtime.filled_gaps import Gap, Later, convert_filled, is_plain
from autoparallel.runtime.flights import begin, end
from autoparallel.runtime.groups import Group
from autoparallel.runtime.joined_products import (
    convert_then_linear,
    convert_then_mm,
    linear_then_convert,
    mm_then_convert,
)
from autoparallel.runtime.memory_order import in_rows, outer_dim, to_back, to_front
from autoparallel.runtime.products import Linear, Mm, bias_gradient, summed_product
from autoparallel.support.torch_private import (
    apply_directly,
    backward_pass,
    place_in_backward,
    run_in_place,
)

__all__ = [
    "MOST_IN_GAP",
    "Gap",
    "begin",
    "convert",
    "convert_filled",
    "convert_then_linear",
    "convert_then_mm",
    "end",
    "gaps_so_far",
    "linear",
    "linear_then_convert",
    "mm",
    "mm_then_convert",
    "with_gaps",
]


# So many products may leave the gradients of their weights to one gap.
MOST_IN_GAP = 3


class _Gaps(threading.local):
    """The numbers with which nodes run right before the wait of each conversion, by its gap: of the
    conversions that the program has made, and of no others.

    Each thread has its own, because ranks may be threads.
    """

    def __init__(self) -> None:
        self.numbers: dict[int, list[int]] = {}


_gaps = _Gaps()


def gaps_so_far() -> dict[int, list[int]]:
    """Return the gaps that the program has made so far, for `with_gaps`."""
    return dict(_gaps.numbers)


@contextlib.contextmanager
def with_gaps(gaps: dict[int, list[int]]) -> Iterator[None]:
    """Run a part of a program once more, as where it ran first, within: its products are late if
    they were so then. Other programs may have run since, and on GPUs this is another thread.

    >>> with with_gaps(gaps_so_far()):
    ...     y = linear(torch.ones(2, 3), torch.ones(1, 3), gap=1)
    """
    before, _gaps.numbers = _gaps.numbers, dict(gaps)
    try:
        yield
    finally:
        _gaps.numbers = before


def convert(
    x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int, gap: int
) -> torch.Tensor:
    """Redistribute a tensor as `runtime.collectives.convert` does. Collective.

    In the backward pass, late products of this gap and whatever else is ready run while its
    gradient is moved. gap: the conversion's number in the program, from 1.

    >>> from autoparallel.placement import Partial, Invariant
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> convert(torch.ones(2), SingleGroup(), Partial(), Invariant(), 0, 1)
    tensor([1., 1.])
    """
    if is_plain(x):
        if not torch.compiler.is_compiling():
            _gaps.numbers.pop(gap, None)  # of an earlier program
        return convert_and_wait(x, group, source, target, size)
    begun = begin(x, group, source, target, size)
    assert not isinstance(begun, torch.Tensor)
    tie, flight = begun
    assert tie is not None
    # Nodes between the halves lend their numbers to late products, which run after the collective
    # was started and before it is waited for. Each has its own: of nodes with one number, any may
    # run first, and the ranks would differ.
    _gaps.numbers[gap] = []
    for _ in range(MOST_IN_GAP):
        tie = tie.clone()
        _gaps.numbers[gap].append(place_in_backward(tie))
    return end((tie, flight))


class _WeightGradient(torch.autograd.Function):
    """The late half of a product's backward pass: the gradients of its weight and its bias.

    Its result is a number that only ties it to the product.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, bias: torch.Tensor | None, later: Later
    ) -> torch.Tensor:
        """Return the tie."""
        ctx.set_materialize_grads(False)
        ctx.later = later
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, tie: torch.Tensor | None) -> Any:
        """Return the gradients; none where the product has done so itself."""
        return (*ctx.later.gradients(*ctx.needs_input_grad[:2]), None)


class _Product(torch.autograd.Function):
    """A product whose backward pass computes the gradient of its first factor at once.

    With a group, the product is summed over its ranks: P -> I.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tie: torch.Tensor,
        later: Later,
        kind: Any,
        group: Group | None,
    ) -> torch.Tensor:
        """Return the product."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.later, ctx.kind, ctx.group = later, kind, group
        later.kind, later.bias_dims = kind, None if bias is None else bias.dim()
        # Rows are taken in the order in which they lie in memory, and so does the result lie. What
        # is summed has one order on all ranks: one without a part of x does not know another.
        ctx.outer = outer = outer_dim(x) if group is None else 0
        if outer:
            x = to_front(x, outer)
        if group is not None:
            result = summed_product(kind, x, weight, group)
        else:
            result = kind.product(x, weight, bias)
        return to_back(result, outer).detach() if outer else result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        """Return the gradient of x, and leave what is needed for that of the weight."""
        if grad is None:
            return (None,) * 7
        x, weight = ctx.saved_tensors
        if ctx.group is not None:
            # Each rank uses the gradient for its own terms: I -> R.
            grad = for_parts(grad, ctx.group)
        outer = ctx.outer or outer_dim(grad)
        if outer:
            # One copy at most, and not one for each of the gradients.
            x, grad = to_front(x, outer), to_front(grad, outer).contiguous()
        of_x = ctx.kind.of_x(weight, grad)
        if outer:
            of_x = to_back(of_x, outer)
        if not torch.is_grad_enabled():
            ctx.later.parts = (x, grad, backward_pass())
            return of_x, None, None, None, None, None, None
        # The gradients are differentiated in turn: they must hang together, and none is late.
        of_bias = bias_gradient(grad, ctx.later.bias_dims)
        return of_x, ctx.kind.of_weight(x, grad), of_bias, None, None, None, None


_apply_weight_gradient, _apply_product = map(apply_directly, (_WeightGradient, _Product))


def _late(
    kind: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gap: int | Gap | None,
    place: int,
    group: Group | None,
) -> torch.Tensor:
    """Return a product, the gradient of whose weight waits for a gap.

    kind: the product and its derivatives. gap: of a conversion that was made before. place: in it.
    group: ranks over which the product is summed, if it is.
    """
    is_open = gap in _gaps.numbers if isinstance(gap, int) else gap is not None
    if not is_open or is_plain(x) or not weight.requires_grad:
        product: torch.Tensor = kind.product(x, weight, bias)
        if group is not None:
            product = convert_and_wait(pending_sum(product, group), group, Partial(), Invariant())
        return product
    x = in_rows(x)
    if isinstance(gap, Gap):
        later, tie = gap.places[place], gap.tie
    else:
        assert gap is not None
        later = Later()
        tie = _apply_weight_gradient(weight, bias, later)
        if _gaps.numbers[gap]:
            run_in_place(tie, _gaps.numbers[gap].pop())
    result: torch.Tensor = _apply_product(x, weight, bias, tie, later, kind, group)
    return result


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gap: int | Gap | None,
    place: int = 0,
    group: Group | None = None,
) -> torch.Tensor:
    """Return what torch's `linear` does; in the backward pass the gradients of weight and bias are
    computed in a gap.

    gap: the number of a conversion that was made before by `convert`, or the gap that
    `convert_filled` has returned; they are computed before the backward pass waits for that
    conversion's gradient. place: of the weight among those that `convert_filled` was given.
    group: ranks over which the product, then without a bias, is summed, piece by piece while it is
    computed (P -> I).

    >>> linear(torch.ones(2, 3), torch.ones(1, 3), gap=1)
    tensor([[3.],
            [3.]])
    """
    return _late(Linear, x, weight, bias, gap, place, group)


def mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    gap: int | Gap | None,
    place: int = 0,
    group: Group | None = None,
) -> torch.Tensor:
    """Return what torch's `mm` does; in the backward pass the gradient of the weight, the second
    factor, is computed in a gap, as of `linear`.

    >>> mm(torch.ones(1, 3), torch.ones(3, 1), gap=1)
    tensor([[3.]])
    """
    return _late(Mm, x, weight, None, gap, place, group)
