"""Small parameters whose gradients come back together, by one node of autograd's graph.

A node takes longer than all that is to be done for one gradient of a small parameter. Where nothing
but to put them into `grad` is to be done for any of them, that is asked of all by loops in C.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache
from itertools import repeat
from typing import Any

import torch

from autoparallel.parallel.gradient_bucket import like_parameter
from autoparallel.parallel.gradient_return import Counted, GradientReturn
from autoparallel.parallel.split_tensor import GRADIENT
from autoparallel.support.torch_private import (
    have_gradient_hooks,
    references_to_each,
    run_when_ready,
    will_accumulate_all,
    without_function_overrides,
)

__all__ = ["local_together"]

_SAME = operator.is_
_TRAINED, _SPARSE = operator.attrgetter("requires_grad"), operator.attrgetter("is_sparse")


class _LocalTogether(torch.autograd.Function):
    """The local tensors of several parameters, as a node of its own would make each.

    are_trivial: whether all gradients are finished as they come. alone, each_alone: the references
    to a gradient that nobody else holds, as they are counted one by one, and of all at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ways: Sequence[Any],
        alone: tuple[Any, Any],
        held: Sequence[torch.Tensor],
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return tensors in the memory of `held`."""
        ctx.set_materialize_grads(False)
        ctx.parameters, ctx.ways, (ctx.alone, ctx.each_alone) = parameters, ways, alone
        ctx.are_trivial, ctx.is_leaf = all(way.is_trivial for way in ways), True
        return tuple([tensor.detach() for tensor in held])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        """Return the parameters' gradients, or see to it that they come."""
        with without_function_overrides():
            if _are_given(ctx, grads):
                return (None,) * (3 + len(grads))
            brought: list[Any] = [None, None, None]
            # Torch makes a tuple of all nodes each time that it is asked for them.
            ways, parameters, nodes, alone = ctx.ways, ctx.parameters, ctx.next_functions, ctx.alone
            for place, grad in enumerate(grads):
                way, parameter = ways[place], parameters[place]
                if grad is None:
                    # What is differentiated depends on others of them, and not on this one.
                    way.pass_over(parameter)
                    brought.append(None)
                else:
                    brought.append(way.bring(ctx, nodes[place][0], parameter, grad, alone))
        return tuple(brought)


def _are_given(ctx: Any, grads: Sequence[Any]) -> bool:
    """Put all gradients into `grad`, where that is all that `GradientReturn.bring` would do with
    any of them; return whether it is.
    """
    if not ctx.are_trivial or torch.is_grad_enabled() or any(map(_SAME, grads, repeat(None))):
        return False
    references, parameters = references_to_each(grads), ctx.parameters
    if ctx.each_alone is None:
        ctx.ways[0].each = references
        return False
    if (
        ctx.ways[0].bucket.held
        or any(map(operator.ne, references, repeat(ctx.each_alone)))
        or have_gradient_hooks(parameters)
        or not all(map(_TRAINED, parameters))
        or not all(map(_SAME, map(GRADIENT.__get__, parameters), repeat(None)))
        or any(map(_SPARSE, grads))
        or not all(map(torch.Tensor.is_contiguous, grads))
        or not will_accumulate_all([node for node, _ in ctx.next_functions])
    ):
        return False
    for parameter, grad in zip(parameters, grads, strict=True):
        GRADIENT.__set__(parameter, like_parameter(grad, parameter))
    return True


# Parameters of at most so many bytes come together, in groups of at most so many: their gradients
# wait for each other, and must not add to the memory of a step. Where the ranks exchange them, they
# must not keep larger ones from being exchanged during the backward pass either.
_SMALL_NBYTES, _TOGETHER_NBYTES = 2**16, 2**20
_SMALL_WAITING_NBYTES, _WAITING_TOGETHER_NBYTES = 2**14, 2**17


def local_together(
    ways: Sequence[GradientReturn | None], parameters: Sequence[Any], held: Sequence[torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Return the local tensors of small parameters that one node makes for several, by place.

    ways: of all parameters, None for those that are to stay by themselves.
    """
    groups = _Groups(_TOGETHER_NBYTES), _Groups(_WAITING_TOGETHER_NBYTES)
    for place, way in enumerate(ways):
        if way is None or not (parameters[place].requires_grad and parameters[place].is_leaf):
            continue
        if way.is_trivial:
            if held[place].nbytes <= _SMALL_NBYTES:
                groups[0].add(place, held[place].nbytes)
        elif way.waits and way.first == way.produced:
            # The whole is counted: all ranks must have the same groups, also of uneven parts.
            nbytes = way.elements * held[place].element_size()
            if nbytes <= _SMALL_WAITING_NBYTES:
                groups[1].add(place, nbytes)
    made: dict[int, torch.Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad():
        for places in (*groups[0].places, *groups[1].places):
            together: Any = [ways[place] for place in places]
            if len(places) < 2:
                continue
            locals_ = _LocalTogether.apply(
                together,
                _alone_together(),
                [held[place] for place in places],
                *(parameters[place] for place in places),
            )
            # In an order that all ranks have in common, as of one by itself.
            run_when_ready(locals_[0], 1 + min(way.number for way in together))
            made.update(zip(places, locals_, strict=True))
    return made


class _Groups:
    """Groups of places, each of at most so many bytes, or of one place."""

    def __init__(self, most: int) -> None:
        self.most, self.nbytes = most, 0
        self.places: list[list[int]] = [[]]

    def add(self, place: int, nbytes: int) -> None:
        """Add a place to the last group, or to a new one where that is full."""
        self.nbytes += nbytes
        if self.nbytes > self.most:
            self.places.append([])
            self.nbytes = nbytes
        self.places[-1].append(place)


@cache
def _alone_together() -> tuple[tuple[int, int], tuple[int, int]]:
    """Return `references_to` a gradient that comes with others and that nobody else holds: in
    `GradientReturn.bring`, and of all at a time.
    """
    counted = Counted()
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [torch.zeros(2, device="cpu", requires_grad=True) for _ in range(2)]
        held = [leaf.detach() for leaf in leaves]
        one, other = _LocalTogether.apply([counted] * 2, ((0, 0), None), held, *leaves)
        torch.autograd.backward((one * 2).sum() + (other * 2).sum())
    return counted.references, counted.each[0]
