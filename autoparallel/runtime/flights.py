"""Conversions in two halves: what is written between them runs beside the collective.

A conversion is two nodes of autograd's graph. `begin` starts its collective, and `end` waits for
the result. The backward pass runs them the other way round: the node of `end` starts the collective
of the gradient, and that of `begin` waits for it. Autograd runs the nodes that are ready in the
order of their numbers, those that were recorded last first. So whatever was recorded between the
two halves hides the collective, in either pass. Collectives are started in the order in which
their conversions were recorded, the same on all ranks, also where the ranks' graphs differ, as
where a kernel is chosen by the size of a part.

A parameter of which each rank holds a part is gathered so ahead of its use, as FSDP prefetches it
(arXiv:2304.11277): a program begins where its plan says. Backward, the gradient's reduction is
waited for where the gather began.
"""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.placement import Placement, gradient
from autoparallel.runtime.collectives import convert as convert_and_wait
from autoparallel.runtime.collectives import is_type_checked
from autoparallel.runtime.faults import place_of_caller
from autoparallel.runtime.filled_gaps import is_plain
from autoparallel.runtime.groups import Group, Result
from autoparallel.runtime.moves import start_move
from autoparallel.runtime.routes import route_between

__all__ = ["Begun", "Flight", "begin", "end"]


class Flight:
    """A Flight is one conversion on its way: its collectives are started, and then waited for.

    group, source, target: of the conversion. size, back_size: of the whole along the split dims of
    the source and of the gradient's source. forward, backward: functions that wait for the results.
    """

    def __init__(
        self, x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int
    ) -> None:
        self.group, self.source, self.target, self.size = group, source, target, size
        self.back_size = route_between(group, source, target).back_size(x, size)
        self.forward: tuple[torch.Tensor, Result] | None = None
        self.backward: Result | None = None

    def start(self, x: torch.Tensor) -> None:
        """Start moving the value."""
        wait = start_move(x, self.group, self.source, self.target, self.size)
        self.forward = (x, wait)

    @property
    def value(self) -> torch.Tensor:
        """The value that is on its way, as it was before."""
        assert self.forward is not None
        return self.forward[0]

    def finish(self) -> torch.Tensor:
        """Return the moved value."""
        assert self.forward is not None
        (x, wait), self.forward = self.forward, None
        moved = wait()
        # As of `Convert`: autograd wants another tensor where nothing moves.
        return torch.ops.aten.alias(x) if moved is x else moved

    def start_back(self, grad: torch.Tensor) -> None:
        """Start moving the gradient; where it is to be differentiated in turn, move it now."""
        ends = (self.group, gradient(self.target), gradient(self.source), self.back_size)
        if torch.is_grad_enabled():
            moved = convert_and_wait(grad, *ends)
            self.backward = lambda: moved
        else:
            self.backward = start_move(grad, *ends)

    def finish_back(self) -> torch.Tensor:
        """Return the moved gradient."""
        wait, self.backward = self.backward, None
        assert wait is not None
        return wait()


class _Begin(torch.autograd.Function):
    """The first half of a conversion. Its result is a number that only ties the halves together."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, flight: Flight) -> torch.Tensor:
        """Start moving x."""
        ctx.flight, ctx.place = flight, place_of_caller(2)
        flight.start(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, tie: torch.Tensor) -> Any:
        """Wait for the gradient of x."""
        return ctx.flight.finish_back(), None


class _End(torch.autograd.Function):
    """The second half of a conversion."""

    @staticmethod
    def forward(ctx: Any, tie: torch.Tensor, flight: Flight) -> torch.Tensor:
        """Wait for what was moved."""
        ctx.flight, ctx.tie, ctx.place = flight, tie.detach(), place_of_caller(2)
        return flight.finish()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Start moving the gradient."""
        ctx.flight.start_back(grad)
        return ctx.tie, None


# A conversion that has begun: its tie, None where no gradient is recorded, and its flight; or the
# result, where it was done at once.
Begun = torch.Tensor | tuple[torch.Tensor | None, Flight]


def begin(
    x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> Begun:
    """Start the conversion of a tensor, and return what `end` takes. Collective.

    x, group, source, target, size: as in `convert` of `runtime.collectives`. Under torch.compile,
    which orders the work itself, the whole conversion is here.

    >>> from autoparallel.placement import Partial, Invariant
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> end(begin(torch.ones(2), SingleGroup(), Partial(), Invariant()))
    tensor([1., 1.])
    """
    if not is_plain(x):
        flight = Flight(x, group, source, target, size)
        tie: torch.Tensor = _Begin.apply(x, flight)
        return tie, flight
    if torch.compiler.is_compiling() or is_type_checked():
        return convert_and_wait(x, group, source, target, size)
    flight = Flight(x, group, source, target, size)
    flight.start(x)
    return None, flight


def end(begun: Begun) -> torch.Tensor:
    """Wait for a conversion that has begun, and return the converted tensor.

    Example: `end(begin(x, group, Shard(0), Replicate(), 12))` is `convert(x, ...)`, and what is
    written between the two runs beside the collective, in the backward pass as well.
    """
    if isinstance(begun, torch.Tensor):
        return begun
    tie, flight = begun
    if tie is None:
        return flight.finish()
    moved: torch.Tensor = _End.apply(tie, flight)
    return moved
