"""Pieces of a split dim, dealt out to ranks that need other ones than they hold.

A kernel that needs what its neighbours hold says which intervals of the whole dim each rank needs:
its own part and the edges of the next ones, or parts in another order. All ranks know what all
need, so that one all-to-all without any header deals them out, and what a rank holds already is not
sent. Intervals of different ranks may overlap; the backward pass adds up what comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autoparallel.placement import part_bounds
from autoparallel.runtime.groups import Group

__all__ = ["Deal", "collected", "dealt"]

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Deal:
    """The intervals of a dim that each rank needs, of which each holds an equal part.

    dim: of the tensors. size: of the whole dim. intervals: per rank, in the order in which it wants
    them laid end to end, all within the dim.

    >>> edges = Deal(0, 6, (((0, 4),), ((2, 6),)))
    >>> list(edges.pieces(holder=0, taker=1)), edges.length(1)
    ([(2, 3)], 4)
    """

    dim: int
    size: int
    intervals: tuple[tuple[Interval, ...], ...]

    def part(self, rank: int) -> Interval:
        """Return where the part that a rank holds starts and stops."""
        return part_bounds(self.size, len(self.intervals), rank)

    def pieces(self, holder: int, taker: int) -> Iterator[Interval]:
        """Yield what one rank needs of what another one holds, in the order of its intervals."""
        first, last = self.part(holder)
        for start, stop in self.intervals[taker]:
            if max(start, first) < min(stop, last):
                yield max(start, first), min(stop, last)

    def length(self, rank: int) -> int:
        """Return how much of the dim a rank needs."""
        return sum(stop - start for start, stop in self.intervals[rank])

    def is_local(self) -> bool:
        """Say whether every rank holds what it needs."""
        return all(
            first <= start and stop <= last
            for rank, intervals in enumerate(self.intervals)
            for first, last in [self.part(rank)]
            for start, stop in intervals
            if start < stop
        )


def dealt(x: torch.Tensor, group: Group, deal: Deal) -> torch.Tensor:
    """Return the intervals that this rank needs, end to end. Collective.

    x: this rank's part of the whole. The gradients of all copies of an element are added up.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> dealt(torch.arange(3), SingleGroup(), Deal(0, 3, (((2, 3), (0, 2)),)))
    tensor([2, 0, 1])
    """
    result: torch.Tensor = _Dealt.apply(x, group, deal)
    return result


def collected(x: torch.Tensor, group: Group, deal: Deal) -> torch.Tensor:
    """Return this rank's part of the whole: the sum of all that ranks have of it. Collective.

    x: the intervals that `deal` gave this rank, end to end. What no rank has is 0.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> collected(torch.tensor([2, 0, 1]), SingleGroup(), Deal(0, 3, (((2, 3), (0, 2)),)))
    tensor([0, 1, 2])
    """
    result: torch.Tensor = _Collected.apply(x, group, deal)
    return result


def _exchange(
    parts: list[list[torch.Tensor]], lengths: list[int], x: torch.Tensor, group: Group, deal: Deal
) -> list[torch.Tensor]:
    """Send each rank its pieces, and return what comes from each.

    parts: per rank. lengths: along the dim of what comes from each. x: any tensor like these.
    """
    shape = list(x.shape)
    nothing = x.new_empty((0,))
    sent = [
        torch.cat(pieces, deal.dim) if pieces and rank != group.rank else nothing
        for rank, pieces in enumerate(parts)
    ]
    shapes = []
    for rank, length in enumerate(lengths):
        shape[deal.dim] = length
        shapes.append(tuple(shape) if length and rank != group.rank else (0,))
    return group.all_to_all(sent, shapes)


def _deal_out(x: torch.Tensor, group: Group, deal: Deal) -> torch.Tensor:
    """Do what `dealt` says, not differentiably."""
    ranks, me, dim = range(group.world_size), group.rank, deal.dim
    start = deal.part(me)[0]
    here = [
        [x.narrow(dim, first - start, last - first) for first, last in deal.pieces(me, rank)]
        for rank in ranks
    ]
    came: list[list[torch.Tensor]] = [[] for _ in ranks]
    came[me] = here[me]
    if not deal.is_local():
        lengths = [sum(last - first for first, last in deal.pieces(rank, me)) for rank in ranks]
        received = _exchange(here, lengths, x, group, deal)
        for rank in ranks:
            if rank != me and lengths[rank]:
                sizes = [last - first for first, last in deal.pieces(rank, me)]
                came[rank] = list(received[rank].split(sizes, dim))
    ordered = []
    sources = [iter(pieces) for pieces in came]
    for first, last in deal.intervals[me]:
        for rank in ranks:
            begin, end = deal.part(rank)
            if max(first, begin) < min(last, end):
                ordered.append(next(sources[rank]))
    if not ordered:
        return x.narrow(dim, 0, 0).clone()
    return torch.cat(ordered, dim)


def _collect(x: torch.Tensor, group: Group, deal: Deal) -> torch.Tensor:
    """Do what `collected` says, not differentiably."""
    ranks, me, dim = range(group.world_size), group.rank, deal.dim
    start, stop = deal.part(me)
    here: list[list[torch.Tensor]] = [[] for _ in ranks]
    at = 0
    for first, last in deal.intervals[me]:
        for rank in ranks:
            begin, end = deal.part(rank)
            length = min(last, end) - max(first, begin)
            if length > 0:
                here[rank].append(x.narrow(dim, at, length))
                at += length
    came: list[list[torch.Tensor]] = [[] for _ in ranks]
    came[me] = here[me]
    if not deal.is_local():
        lengths = [sum(last - first for first, last in deal.pieces(me, rank)) for rank in ranks]
        received = _exchange(here, lengths, x, group, deal)
        for rank in ranks:
            if rank != me and lengths[rank]:
                sizes = [last - first for first, last in deal.pieces(me, rank)]
                came[rank] = list(received[rank].split(sizes, dim))
    shape = list(x.shape)
    shape[dim] = stop - start
    total = x.new_zeros(shape)
    for rank in ranks:
        for piece, (first, last) in zip(came[rank], deal.pieces(me, rank), strict=True):
            total.narrow(dim, first - start, last - first).add_(piece)
    return total


class _Dealt(torch.autograd.Function):
    """The differentiable `_deal_out`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, deal: Deal) -> torch.Tensor:
        """Deal x out."""
        ctx.group, ctx.deal = group, deal
        return _deal_out(x, group, deal)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Collect the gradients, by which derivatives of any order follow."""
        step = _Collected.apply if torch.is_grad_enabled() else _collect
        return step(grad, ctx.group, ctx.deal), None, None

    @staticmethod
    def spmd_typecheck(*, x: torch.Tensor, group: Group, deal: Deal) -> Any:
        """Return the type of the result for the checker of `spmd_types`: pieces stay pieces."""
        return _pieces(x, group)


class _Collected(torch.autograd.Function):
    """The differentiable `_collect`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, deal: Deal) -> torch.Tensor:
        """Collect what the ranks have of this rank's part."""
        ctx.group, ctx.deal = group, deal
        return _collect(x, group, deal)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Deal the gradient out."""
        step = _Dealt.apply if torch.is_grad_enabled() else _deal_out
        return step(grad, ctx.group, ctx.deal), None, None

    @staticmethod
    def spmd_typecheck(*, x: torch.Tensor, group: Group, deal: Deal) -> Any:
        """Return the type of the result for the checker of `spmd_types`: pieces stay pieces."""
        return _pieces(x, group)


def _pieces(x: torch.Tensor, group: Group) -> Any:
    """Return the type of what each rank has other pieces of."""
    import spmd_types
    from spmd_types import rules

    axis = group.process_group  # type: ignore[attr-defined]
    return rules.all_to_all(x, axis, src=spmd_types.V, dst=spmd_types.V)
