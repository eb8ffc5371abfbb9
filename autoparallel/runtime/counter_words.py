"""Random words of a tensor's elements that do not depend on how the tensor is split.

A tensor is seen as rows and columns. A row's and a column's word are mixed from its place in the
whole and the key of the op, step and seed, and an element's word from those two: every rank can
make the words of its own elements alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from autoparallel.placement import Layout, Shard, block_runs, is_even, local_size, part_bounds
from autoparallel.runtime.ranks import Ranks

__all__ = [
    "WORD",
    "Side",
    "Word",
    "cuts_from",
    "cuts_of",
    "drawn_words",
    "sides",
    "sides_of",
    "signed_word",
]

WORD = 0xFFFFFFFF
# A number of 32 bits; for a compiled program a tensor, int32 without dims, with these bits.
Word = int | torch.Tensor
# One thread works on that many elements at a time: two buffers of this many words stay in its
# cache.
_CHUNK = 1 << 16


def signed_word(word: int) -> int:
    """Return the 32-bit integer with the same bits, as torch's int32 has it.

    >>> signed_word(0xFFFFFFFF)
    -1
    """
    return ((word + 0x80000000) & WORD) - 0x80000000


# For each of three turns: the shift, the mask of the bits that it leaves, and the factor.
_TURNS = tuple(
    (shift, (1 << (32 - shift)) - 1, signed_word(factor))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))
)
# The same as tensors without dims: with Python's numbers an op costs microseconds more to start.
_READY_TURNS = tuple(
    tuple(torch.tensor(number, dtype=torch.int32, device="cpu") for number in turn)
    for turn in _TURNS
)


def _mix(bits: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Mix int32 words in place, one to one (Wellons 2018, lowbias32), and return them.

    spare: of the same shape, for intermediate results. int32 wraps as the unsigned words would;
    only the shift needs its sign bits cleared.
    """
    # Fake tensors, with which plans are counted, refuse ready ones as operands.
    turns: Any = _READY_TURNS if type(bits) is torch.Tensor else _TURNS
    for turn, (shift, left, factor) in enumerate(turns):
        torch.bitwise_right_shift(bits, shift, out=spare)
        bits.bitwise_xor_(spare.bitwise_and_(left))
        if turn < 2:
            bits.mul_(factor)
    return bits


# How one axis cuts a dim: the cut, the number of ranks, and this rank.
_Cut = tuple[Shard, int, int]


@dataclass(frozen=True)
class Side:
    """Some neighbouring dims of a tensor taken as one: its rows, or its columns.

    sizes: of the whole. cuts: of each dim, the outermost first, as (split, number of ranks, this
    rank). factor, key: numbers that set the words of this side apart from those of other sides,
    ops, steps and seeds.

    >>> Side((8,), (((Shard(0), 2, 1),),), factor=1, key=0).local_sizes
    (4,)
    """

    sizes: tuple[int, ...]
    cuts: tuple[tuple[_Cut, ...], ...]
    factor: int
    key: Word

    @property
    def local_sizes(self) -> tuple[int, ...]:
        """The sizes of this rank's part."""
        sizes = []
        for size, cuts in zip(self.sizes, self.cuts, strict=True):
            for shard, world_size, rank in cuts:
                size = local_size(size, shard, world_size, rank)
            sizes.append(size)
        return tuple(sizes)

    def words(self, length: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield int32 words of this rank's places, `length` at a time, each with the place that it
        starts at.

        Different places of the whole have different words, if there are at most 2^32 of them.
        """
        count = prod(self.local_sizes)
        for start in range(0, count, length):
            place = self._places(start, min(start + length, count), device)
            bits = place if place.dtype == torch.int32 else (place & WORD).to(torch.int32)
            key = self.key if isinstance(self.key, torch.Tensor) else signed_word(self.key)
            bits = bits.mul_(signed_word(self.factor)).add_(key)
            spare = torch.empty_like(bits)
            _mix(bits, spare)
            # The upper bits of a place count too where there are more than 2^32 places.
            if prod(self.sizes) > WORD + 1:
                _mix(bits.add_((place >> 32).to(torch.int32)), spare)
            yield start, bits

    def _places(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Return the places in the whole side of this rank's elements [start, stop), int32 where
        that is enough.
        """
        # Where only the first dim is cut, and in one run, the places are consecutive.
        if not any(self.cuts[1:]) and all(
            shard.blocks == shard.repeat == 1 for cut in self.cuts for shard, *_ in cut
        ):
            offset = self._first() * prod(self.sizes[1:])
            integer_type = torch.int32 if prod(self.sizes) <= WORD >> 1 else torch.int64
            return torch.arange(offset + start, offset + stop, dtype=integer_type, device=device)
        # Otherwise an element's index in the part is taken apart dim by dim, last dim first.
        index = torch.arange(start, stop, device=device)
        places, stride = torch.zeros_like(index), 1
        for dim in reversed(range(len(self.sizes))):
            local = self.local_sizes[dim]
            at = index.remainder(local) if dim else index
            places += _place_in_whole(at, self.sizes[dim], self.cuts[dim]) * stride
            index = index // local
            stride *= self.sizes[dim]
        return places

    def _first(self) -> int:
        """Return the place in the whole at which this rank's part of the first dim begins."""
        first = 0
        size = self.sizes[0] if self.sizes else 1
        for shard, world_size, rank in self.cuts[0] if self.cuts else ():
            assert isinstance(shard.unit, int)  # of a dim in one block
            start, stop = part_bounds(size // shard.unit, world_size, rank)
            first, size = first + start * shard.unit, (stop - start) * shard.unit
        return first


def _place_in_whole(index: torch.Tensor, size: int, cuts: tuple[_Cut, ...]) -> torch.Tensor:
    """Return the places in a whole dim of `size` of the elements at `index` of a rank's part."""
    if not cuts:
        return index
    (shard, world_size, rank), *inner = cuts
    # Inner cuts first: they count within the outer part.
    index = _place_in_whole(index, local_size(size, shard, world_size, rank), tuple(inner))
    if not is_even(shard):
        return _place_in_blocks(index, block_runs(size, shard, world_size, rank))
    assert isinstance(shard.blocks, int)
    assert isinstance(shard.unit, int)
    block = size // shard.blocks
    first, last = (edge * shard.unit for edge in part_bounds(block // shard.unit, world_size, rank))
    length = last - first
    return index // length * block + index.remainder(length).add_(first)


def _place_in_blocks(index: torch.Tensor, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Return the places in a whole dim of the elements at `index` of a part that consists of runs.

    runs: (start in the whole, length) of each.
    """
    places, at = index, 0
    for start, length in runs:
        places = torch.where(index >= at, index + (start - at), places)
        at += length
    return places


def sides(
    shape: tuple[int, ...], layout: Layout, ranks: Ranks, words: tuple[Word, Word]
) -> tuple[Side, Side]:
    """Return the rows and columns of a tensor of `shape`: its dims, divided where fewest of both
    come out.

    layout: of the tensor on each mesh axis. ranks: this rank's place. words: the keys of rows and
    of columns. Rows and columns are mixed once each, and then combined per element, so few of them
    are cheap.

    >>> from autoparallel.placement import Invariant
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> from autoparallel.runtime.ranks import one_axis
    >>> rows, columns = sides((4, 3, 5), (Invariant(),), one_axis(SingleGroup()), (1, 2))
    >>> rows.sizes, columns.sizes
    ((4, 3), (5,))
    """
    return sides_of(shape, cuts_of(layout, ranks), words)


def cuts_of(layout: Layout, ranks: Ranks) -> list[int]:
    """Return how a layout cuts a tensor, in plain numbers, as an op of torch can be given them.

    Five for each cut, the outermost first: dim, blocks and unit of the split, number of ranks and
    this rank. Where blocks are not alike, their number is negative, the unit is 0, and the sizes,
    units and repeats of all blocks follow.

    >>> from autoparallel.runtime.groups import thread_groups
    >>> from autoparallel.runtime.ranks import one_axis
    >>> cuts_of((Shard(1, blocks=3),), one_axis(thread_groups(2)[1]))
    [1, 3, 1, 2, 1]
    >>> cuts_of((Shard(1, blocks=(4, 1)),), one_axis(thread_groups(2)[1]))
    [1, -2, 0, 2, 1, 4, 1, 1, 1, 1, 1]
    """
    cuts: list[int] = []
    for placement, size, rank in zip(layout, ranks.sizes, ranks.coordinates, strict=True):
        if isinstance(placement, Shard):
            blocks, unit = placement.blocks, placement.unit
            if isinstance(blocks, int) and isinstance(unit, int) and placement.repeat == 1:
                cuts += [placement.dim, blocks, unit, size, rank]
                continue
            shares = blocks if isinstance(blocks, tuple) else (1,) * blocks
            cuts += [placement.dim, -len(shares), 0, size, rank, *shares]
            for numbers in (unit, placement.repeat):
                cuts += numbers if isinstance(numbers, tuple) else (numbers,) * len(shares)
    return cuts


def cuts_from(numbers: Sequence[int]) -> Iterator[tuple[Shard, int, int]]:
    """Yield the cuts that `cuts_of` put into numbers: the split, number of ranks, this rank.

    >>> list(cuts_from([1, 3, 1, 2, 1]))
    [(Shard(dim=1, blocks=3, unit=1), 2, 1)]
    """
    first = 0
    while first < len(numbers):
        dim, blocks, unit, size, rank = numbers[first : first + 5]
        first += 5
        if blocks > 0:
            yield Shard(dim, blocks, unit), size, rank
            continue
        shares, units, repeats = (
            tuple(numbers[first - at * blocks : first - (at + 1) * blocks]) for at in range(3)
        )
        first -= 3 * blocks
        yield Shard(dim, shares, units, repeats), size, rank


def sides_of(
    shape: Sequence[int], numbers: Sequence[int], words: tuple[Word, Word]
) -> tuple[Side, Side]:
    """Return what `sides` does, for cuts in plain numbers (`cuts_of`)."""
    shape = tuple(shape)
    costs = [prod(shape[:at]) + prod(shape[at:]) for at in range(len(shape) + 1)]
    at = costs.index(min(costs))
    cuts: list[tuple[_Cut, ...]] = [()] * len(shape)
    for cut in cuts_from(numbers):
        cuts[cut[0].dim] += (cut,)
    rows = Side(shape[:at], tuple(cuts[:at]), 1, words[0])
    return rows, Side(shape[at:], tuple(cuts[at:]), 0x9E3779B1, words[1])


def drawn_words(
    rows: Side, columns: Side, device: torch.device
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield random int32 words of this rank's elements, piece by piece: (rows, columns, words).

    rows, columns: slices of the part. The words of a piece are gone when the next one is asked for.
    An element's word is mix(row's word ^ column's word), where those are mixed from its place and
    the key.

    >>> from autoparallel.placement import Invariant
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> from autoparallel.runtime.ranks import one_axis
    >>> both = sides((2, 3), (Invariant(),), one_axis(SingleGroup()), (1, 2))
    >>> [words.shape for _, _, words in drawn_words(*both, torch.device("cpu"))]
    [torch.Size([2, 3])]
    """
    height, width = prod(rows.local_sizes), prod(columns.local_sizes)
    length = max(1, height * width)
    # Pieces that stay in a core's cache; a GPU does better with everything at once.
    if device.type == "cpu":
        length = min(length, _CHUNK * torch.get_num_threads())
    rows_at_once = max(1, length // max(1, width))
    buffer, spare = torch.empty((2, length), dtype=torch.int32, device=device).unbind(0)
    for left, across in columns.words(length, device):
        for top, block in rows.words(length, device):
            for down in block.split(rows_at_once):
                shape = (len(down), len(across))
                count = shape[0] * shape[1]
                bits = buffer[:count].view(shape)
                torch.bitwise_xor(down[:, None], across, out=bits)
                _mix(bits, spare[:count].view(shape))
                yield slice(top, top + shape[0]), slice(left, left + shape[1]), bits
                top += shape[0]
