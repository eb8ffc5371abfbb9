"""Gradients that wait in a backward pass, to be reduced together while it goes on."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autoparallel.parallel.pending_gradients import add_pending, pending_layout, take_pending
from autoparallel.parallel.split_tensor import GRADIENT, mark
from autoparallel.placement import Layout, Shard
from autoparallel.runtime.joint_moves import Reduction, ReductionSteps
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.torch_private import (
    at_end_of_backward,
    backward_pass,
    distributed_tensor_like,
    gradient_hooks_of,
    local_part,
    without_function_overrides,
)

__all__ = [
    "GradientBucket",
    "GradientLayouts",
    "give",
    "like_parameter",
    "pass_over_waiting",
]


class GradientLayouts:
    """The layouts that a parameter's gradient passes through, and its place among others.

    shape: of the unsharded parameter. produced: the layout of the gradient as the backward pass
    leaves it. first: the layout to which it is reduced at once. state: that of the finished one.
    number: gradients that are reduced together are so in this order.
    """

    def __init__(
        self, shape: tuple[int, ...], produced: Layout, first: Layout, state: Layout, number: int
    ) -> None:
        self.shape, self.produced, self.first, self.state = shape, produced, first, state
        self.waits, self.number, self.elements = first != state, number, prod(shape)
        # Its sum over the ranks takes no less memory than what is summed: it may as well be taken
        # once for several backward passes. What a rank keeps but a part of is reduced at once.
        self.sums = self.waits and not any(
            have != want and isinstance(want, Shard)
            for have, want in zip(first, state, strict=True)
        )


class _Waiting:
    """The gradients that wait for the end of one backward pass, each with the parameter that it is
    for.

    It lives as long as the backward pass: one that fails takes what waited with it.
    """

    def __init__(self) -> None:
        # With the layout of each.
        self.items: list[tuple[GradientLayouts, Any, torch.Tensor, Layout]] = []
        self.parameters: set[int] = set()
        # Bytes of the items that are to be reduced, as whole tensors; parameters whose gradients'
        # reduction has begun.
        self.nbytes = 0
        self.begun: list[tuple[list[tuple[GradientLayouts, Any]], Reduction]] = []

    def begin(self, bucket: GradientBucket) -> None:
        """Begin the reduction of the items.

        Autograd finishes gradients of one op in any order; all ranks reduce them in the order in
        which their programs read the parameters.
        """
        items = sorted(self.items, key=lambda item: item[0].number)
        self.items, self.nbytes = [], 0
        ways = [item[0] for item in items]
        steps = bucket.steps_of(ways, [item[3] for item in items])
        shapes = [way.shape for way in ways]
        reduction = Reduction([item[2] for item in items], steps, shapes, bucket.ranks)
        self.begun.append(([(way, parameter) for way, parameter, _, _ in items], reduction))


# So many sets of gradients are remembered: a model that branches may have a new one in each step.
_MOST_STEPS = 64


class GradientBucket:
    """Gradients that are reduced together, while the backward pass goes on.

    ranks: the mesh over whose axes they are reduced. nbytes: a reduction begins when gradients of
    so many bytes wait; None for one reduction when the backward pass ends. One collective for many
    gradients costs the latency once. All programs of a model share one bucket, because they may
    share parameters. Gradients become ready in the same order on all ranks, because their programs
    are the same.
    """

    def __init__(self, ranks: Ranks, nbytes: int | None = None) -> None:
        self.ranks, self.nbytes = ranks, nbytes
        # By the number of the backward pass: one may run inside of another.
        self.passes: weakref.WeakValueDictionary[int, _Waiting] = weakref.WeakValueDictionary()
        self.ways = 0
        # The ids of parameters of which some gradient has to wait.
        self.late: set[int] = set()
        # Whether sums over the ranks are put off, and the parameters of which some are, by id.
        self.holds, self.held = False, dict[int, tuple[GradientLayouts, Any]]()
        # The backward pass that was last seen, and whether it adds to the `grad` of parameters.
        self.number, self.accumulates = -1, False
        # How gradients are reduced that were reduced together before, by their numbers.
        self.steps: dict[tuple[int, ...], ReductionSteps] = {}

    def steps_of(
        self, ways: Sequence[GradientLayouts], layouts: Sequence[Layout]
    ) -> ReductionSteps:
        """Return the steps from layouts to those of the finished gradients. ways: of each."""
        numbers = tuple([way.number for way in ways])
        steps = self.steps.get(numbers)
        usual = all(map(operator.is_, layouts, [way.first for way in ways]))
        if steps is None or not usual:
            wanted = [way.state for way in ways]
            steps = ReductionSteps.between(layouts, wanted, len(self.ranks.sizes))
            if usual:
                if len(self.steps) >= _MOST_STEPS:
                    self.steps.clear()
                self.steps[numbers] = steps
        return steps

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the gradients that wait now, which belong to a backward pass."""
        empty: dict[str, Any] = {"passes": weakref.WeakValueDictionary(), "late": set()}
        return {**vars(self), **empty, "held": list(self.held.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, in which parameters may be copies, with other ids."""
        vars(self).update(state, held={id(item[1]): item for item in state["held"]})

    def add(self, way: GradientLayouts, parameter: Any, grad: torch.Tensor) -> None:
        """Keep a local gradient until the end of the backward pass that runs now."""
        number = backward_pass()
        waiting = self.passes.get(number)
        if waiting is None:
            waiting = self.passes[number] = _Waiting()
            at_end_of_backward(partial(self.finish, waiting))
        waiting.parameters.add(id(parameter))
        if self.holds:
            if way.sums and isinstance(parameter, DTensor) and not grad.is_sparse:
                self._hold(way, parameter, grad, way.first)
                return
        elif id(parameter) in self.held and pending_layout(parameter, way.state) == way.first:
            del self.held[id(parameter)]
            grad = take_pending(parameter) + grad
        waiting.items.append((way, parameter, grad, way.first))
        if not way.waits:
            # Its hooks alone have it wait, which the other ranks may not have.
            return
        # Whole tensors are counted: the number is the same on all ranks, also where parts differ.
        waiting.nbytes += way.elements * grad.element_size()
        if self.nbytes is not None and waiting.nbytes >= self.nbytes:
            waiting.begin(self)

    def _hold(self, way: GradientLayouts, parameter: Any, grad: torch.Tensor, have: Layout) -> None:
        """Add a gradient, in a layout, to those of which the sum over the ranks is put off."""
        self.held[id(parameter)] = (way, parameter)
        add_pending(parameter, grad, have, way.state, self.ranks.coordinates)

    def has(self, parameter: Any) -> bool:
        """Return whether a gradient of the parameter waits in the backward pass that runs now."""
        waiting = self.passes.get(backward_pass())
        return waiting is not None and id(parameter) in waiting.parameters

    def finish(self, waiting: _Waiting) -> None:
        """Reduce all gradients that wait, and hand each to its parameter."""
        with without_function_overrides():
            self._finish(waiting)

    def _finish(self, waiting: _Waiting) -> None:
        if self.held and not self.holds:
            # Of parameters that this backward pass has not reached, or has along other axes.
            for way, parameter in self.held.values():
                layout = pending_layout(parameter, way.state)
                if layout is not None:  # else the user has cleared it
                    waiting.items.append((way, parameter, take_pending(parameter), layout))
            self.held = {}
        if waiting.items:
            waiting.begin(self)
        begun, waiting.begun = waiting.begun, []
        totals: dict[int, tuple[GradientLayouts, Any, torch.Tensor]] = {}
        for parameters, reduction in begun:
            for (way, parameter), grad in zip(parameters, reduction.finish(), strict=True):
                if id(parameter) in totals:
                    grad = totals[id(parameter)][2] + grad
                totals[id(parameter)] = (way, parameter, grad)
        hooked = []
        for way, parameter, grad in totals.values():
            if id(parameter) in self.held:
                self._hold(way, parameter, grad, way.state)
            elif any(gradient_hooks_of(parameter)):
                hooked.append((parameter, grad))
            else:
                give(parameter, grad)
        if hooked:
            # Torch itself runs the hooks, in a backward pass that begins at the parameters.
            torch.autograd.backward(
                [parameter for parameter, _ in hooked],
                [mark(like_parameter(grad, parameter)) for parameter, grad in hooked],
            )


def like_parameter(grad: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return a finished local gradient as the parameter's: a DTensor where that is one.

    It is no split tensor until the user reads it: see `SplitTensor`.
    """
    return distributed_tensor_like(grad, parameter) if isinstance(parameter, DTensor) else grad


def give(parameter: Any, grad: torch.Tensor) -> None:
    """Add a finished local gradient, in the layout of the state, to the parameter's `grad`."""
    # Autograd's own way: the first gradient is taken as it is, further ones are added in place.
    held = GRADIENT.__get__(parameter)
    if held is None:
        GRADIENT.__set__(parameter, like_parameter(grad, parameter))
    else:
        (local_part(held) if isinstance(held, DTensor) else held).add_(grad)


# Hooks as torch keeps them, by number.
_Hooks = dict[int, Any] | None


class _OfGradients:
    """A hook on a gradient that does not run where there is none.

    Torch runs hooks also where a gradient would come that waits in the bucket instead.
    """

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, grad: torch.Tensor | None) -> Any:
        return None if grad is None else self.hook(grad)


class _OfFinished:
    """A hook on a parameter whose gradient was added, which does not run while that waits."""

    def __init__(self, hook: Any, bucket: GradientBucket) -> None:
        self.hook, self.bucket = hook, bucket

    def __call__(self, parameter: torch.Tensor) -> None:
        if not self.bucket.has(parameter):
            self.hook(parameter)


def pass_over_waiting(on_tensor: _Hooks, after: _Hooks, bucket: GradientBucket) -> None:
    """Have a parameter's hooks run once its gradient is there, and not while that waits.

    on_tensor: those on the gradient. after: those that run when it was added.
    """
    _wrap(on_tensor, _OfGradients)
    _wrap(after, partial(_OfFinished, bucket=bucket))


def _wrap(hooks: _Hooks, kind: Any) -> None:
    """Have all hooks of a dictionary run as those of a kind do, each under the key that it has."""
    for key, hook in list((hooks or {}).items()):
        if not isinstance(hook, (_OfGradients, _OfFinished)):
            assert hooks is not None
            hooks[key] = kind(hook)
