"""Gaps that are filled by the node of their conversion, which computes the gradients of weights.

`runtime.overlap` says what a gap is. Here the weights of products that come later are operands of
the conversion. A product leaves what the gradient of its weight is computed of, and the node of the
conversion computes it, between the start and the wait of its collective. A step of a small model is
mostly the time that nodes take, and this way takes few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoparallel.placement import Placement
from autoparallel.runtime.collectives import convert as convert_and_wait
from autoparallel.runtime.collectives import is_type_checked
from autoparallel.runtime.groups import Group
from autoparallel.runtime.products import bias_gradient
from autoparallel.runtime.routes import Route, route_between
from autoparallel.support.torch_private import apply_directly, backward_pass

__all__ = [
    "Gap",
    "Later",
    "Weights",
    "convert_filled",
    "flat_weights",
    "is_plain",
    "late_gradients",
]

# A weight and its bias, None in place of a bias that there is not; of every place of a gap.
Weights = Sequence[tuple[torch.Tensor, torch.Tensor | None]]


def is_plain(x: torch.Tensor) -> bool:
    """Say whether nothing is to be gained: no backward pass, or one whose order is another's."""
    return (
        not (x.requires_grad and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or is_type_checked()
    )


class Later:
    """A Later object hands on, from node to node, what the gradient of a weight is computed of.

    kind: the product, with the formulas of its gradients. bias_dims: dims of its bias, None without
    one. parts: x and the gradient of the result, with the number of the backward pass.
    """

    def __init__(self, kind: Any = None, bias_dims: int | None = None) -> None:
        self.kind, self.bias_dims = kind, bias_dims
        self.parts: tuple[torch.Tensor, torch.Tensor, int] | None = None

    def gradients(self, of_weight: bool, of_bias: bool) -> tuple[Any, Any]:
        """Return the gradients of weight and bias that are wanted; none where nothing was left in
        the backward pass that runs now.
        """
        parts, self.parts = self.parts, None
        # One that failed may have left something.
        if parts is None or parts[2] != backward_pass():
            return None, None
        x, grad, _ = parts
        weight = self.kind.of_weight(x, grad) if of_weight else None
        return weight, bias_gradient(grad, self.bias_dims) if of_bias else None


def flat_weights(weights: Weights) -> list[torch.Tensor | None]:
    """Return weights and biases, one behind the other."""
    return [one for pair in weights for one in pair]


def late_gradients(places: Sequence[Later], needed: Sequence[bool]) -> list[Any]:
    """Return the gradients that were left to a gap, those of the last place computed first.

    needed: whether each weight, and each bias, needs one.
    """
    gradients: list[Any] = [None] * (2 * len(places))
    for place in range(len(places) - 1, -1, -1):
        at = 2 * place
        gradients[at : at + 2] = places[place].gradients(*needed[at : at + 2])
    return gradients


class Gap:
    """The gap of one conversion, for products whose weights were given to `convert_filled`.

    tie: a number that ties them to it: their backward passes come first, whatever they read.
    places: what the gradient of each weight is computed of.
    """

    __slots__ = ("places", "tie")

    def __init__(self, tie: torch.Tensor, places: list[Later]) -> None:
        self.tie, self.places = tie, places


class _Filled(torch.autograd.Function):
    """A conversion whose backward pass computes gradients of weights while the gradient is moved.

    Its second result is the tie of its gap. weights: of each place the weight and the bias, or None
    in place of the latter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        route: Route,
        size: int,
        places: list[Later],
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move x. size: of the whole along the split dim of the route's source."""
        ctx.set_materialize_grads(False)
        moved = route.move(x, size)
        ctx.back, ctx.back_size = route.back, route.back_size(x, size)
        ctx.places, ctx.facts = places, (moved.shape, moved.dtype, moved.device)
        # As of `Convert`: autograd wants another tensor where nothing moves.
        return torch.ops.aten.alias(x) if moved is x else moved, x.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, tie: None) -> Any:
        """Move the gradient, and compute those of the weights meanwhile, the last one first."""
        if grad is None:
            # The other ranks may have one, and this rank takes part in moving it.
            shape, dtype, device = ctx.facts
            grad = torch.zeros(shape, dtype=dtype, device=device)
        places, needed = ctx.places, ctx.needs_input_grad
        if torch.is_grad_enabled():
            # It is differentiated in turn; the products have computed all their gradients.
            back = ctx.back
            moved = convert_and_wait(grad, back.group, back.source, back.target, ctx.back_size)
            return moved, *([None] * (len(needed) - 1))
        wait = ctx.back.start(grad, ctx.back_size)
        late = late_gradients(places, needed[4:])
        return wait(), None, None, None, *late


_apply_filled = apply_directly(_Filled)


def convert_filled(
    x: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int,
    weights: Weights,
) -> tuple[torch.Tensor, Gap | None]:
    """Redistribute a tensor as `runtime.collectives.convert` does, and return it with its gap.
    Collective.

    weights: of products that come later and are given this gap, with their places in it: the weight
    and the bias of each, None in place of a bias that there is not. Their gradients are computed
    while that of `x` is moved. There is no gap where no gradient is recorded.

    >>> from autoparallel.placement import Partial, Invariant
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> from autoparallel.runtime.overlap import linear
    >>> x, weight = torch.ones(1, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    >>> y, gap = convert_filled(x, SingleGroup(), Partial(), Invariant(), 0, [(weight, None)])
    >>> linear(y, weight, gap=gap, place=0).sum().backward()
    >>> weight.grad
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    if is_plain(x):
        return convert_and_wait(x, group, source, target, size), None
    places = [Later() for _ in weights]
    route = route_between(group, source, target)
    moved, tie = _apply_filled(x, route, size, places, *flat_weights(weights))
    return moved, Gap(tie, places)
