"""The work of each rank in split attention: its queries, and the keys that are passed round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from autoparallel.placement import part_bounds
from autoparallel.runtime.attention_blocks import (
    Seen,
    seen,
)
from autoparallel.runtime.dealt_pieces import Deal, Interval
from autoparallel.runtime.groups import Group, Result

__all__ = ["SEQUENCE", "Travelling", "Work", "deal_of_sequence"]

SEQUENCE = 2  # of (b, n, s, d)


def deal_of_sequence(length: int, world_size: int, causal: bool) -> Deal:
    """Return the places of the sequence that each rank works on."""
    if not causal:
        parts = tuple((part_bounds(length, world_size, rank),) for rank in range(world_size))
        return Deal(SEQUENCE, length, parts)
    count = 2 * world_size
    pieces = [part_bounds(length, count, piece) for piece in range(count)]
    # Rank 0, which holds the longest part of whatever is split, begins in the middle: the last
    # pieces may be shorter.
    pairs = tuple(
        (pieces[world_size - 1 - rank], pieces[world_size + rank]) for rank in range(world_size)
    )
    return Deal(SEQUENCE, length, pairs)


@dataclass(frozen=True, slots=True)
class Work:
    """The queries that a rank works on, and the keys that it meets, step by step.

    queries, keys: the places that each rank works on, and passes on. passes: whether keys are split
    and passed round; else they are whole, and in their order.
    """

    group: Group
    causal: bool
    scale: float
    queries: Deal
    keys: Deal
    passes: bool

    @property
    def steps(self) -> int:
        """The number of parts of the keys."""
        return self.group.world_size if self.passes else 1

    def owner(self, step: int) -> int:
        """Return the rank whose keys are here at a step."""
        return (self.group.rank - step) % self.group.world_size

    def pieces_of_queries(self) -> list[tuple[slice, Interval]]:
        """Return this rank's pieces of the queries: where they lie here, and their places."""
        return _placed(self.queries.intervals[self.group.rank])

    def pieces_of_keys(self, step: int, queries: Interval) -> list[tuple[slice, Interval]]:
        """Return the pieces of the keys that are here at a step, for a piece of the queries."""
        if self.passes:
            return _placed(self.keys.intervals[self.owner(step)])
        if not self.causal:
            return _placed(((0, self.keys.size),))
        # All that come before are seen; of those at the same places, a triangle.
        first, last = (min(place, self.keys.size) for place in queries)
        return _placed(((0, first), (first, last)))

    def length(self, step: int) -> int:
        """Return the number of keys that are here at a step."""
        return self.keys.length(self.owner(step)) if self.passes else self.keys.size

    def blocks(
        self, step: int, mask: torch.Tensor | None, device: torch.device
    ) -> Iterator[tuple[int, slice, slice, Seen]]:
        """Yield the blocks of a step: the number of the piece of queries and where it lies, where
        the keys lie, and what is seen of them.
        """
        for number, (rows, places) in enumerate(self.pieces_of_queries()):
            cut = mask if mask is None or mask.size(-2) == 1 else mask[..., rows, :]
            for columns, keys in self.pieces_of_keys(step, places):
                sight = seen(places, keys, self.causal, cut, device)
                if sight is not None:
                    yield number, rows, columns, sight


def _placed(intervals: tuple[Interval, ...]) -> list[tuple[slice, Interval]]:
    """Return where intervals lie that are laid end to end, and the intervals."""
    placed, at = [], 0
    for start, stop in intervals:
        placed.append((slice(at, at + stop - start), (start, stop)))
        at += stop - start
    return placed


class Travelling:
    """Keys and values on their way round, or their gradients: two tensors as one flat one.

    like: key and value as this rank has them, for the sizes of the others'.
    """

    def __init__(self, work: Work, like: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.work, self.like = work, like

    def start(self, pair: tuple[torch.Tensor, torch.Tensor], step: int) -> Result:
        """Start sending what is here at a step to the next rank."""
        flat = torch.cat([each.reshape(-1) for each in pair])
        length, rows = self.work.length(step + 1), sum(map(_elements_of_a_place, self.like))
        return self.work.group.start_pass_on(flat, (length * rows,))

    def opened(self, flat: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two tensors that came for a step."""
        length = self.work.length(step)
        shapes = [(*each.shape[:-2], length, each.size(-1)) for each in self.like]
        first, second = flat.split([torch.Size(shape).numel() for shape in shapes])
        return first.view(shapes[0]), second.view(shapes[1])


def _elements_of_a_place(x: torch.Tensor) -> int:
    """Return the number of elements that (b, n, s, d) has for one s."""
    return x.size(0) * x.size(1) * x.size(3)
