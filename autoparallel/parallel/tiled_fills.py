"""A rank's part of a parameter that is filled element by element, drawn tile by tile.

The whole tensor is cut into tiles that do not depend on how it is split. Each tile's random numbers
come from a generator with a seed of the tile's own, so that a rank draws only the tiles that its
part touches, and every number is the same on any number of ranks and under every plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from autoparallel.parallel.recorded_fills import RecordedCall, Region
from autoparallel.placement import Invariant, Layout, Shard
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.tensor_parts import take_layout_part

__all__ = ["Fill", "cover", "elementwise_fills", "filled_part", "number_of_tiles", "tile_seed"]

# Elements of a tile: many enough that seeding a generator costs little (some 2 % of drawing so many
# normal numbers on a CPU), few enough that the tiles at a part's edges are a small share of it.
_TILE = 1 << 15
# Torch's generator of the CPU uses only the lower half of a seed.
_SEEDS = 1 << 32
_MOST_FILLS = 64
# A box of a tensor: the first place and the number of places along each dim.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """A Fill is an operator in place, on a box of a parameter, which treats each element alone.

    function: the operator. args, kwargs: its arguments after the tensor. box: which elements.
    overwrites: whether nothing is left in the box of what was there. seed: of its first tile if it
    draws random numbers, else None.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    box: Box
    overwrites: bool
    seed: int | None

    def run(self, tile: torch.Tensor, start: tuple[int, ...], number: int) -> None:
        """Do to a tile what the operator does to the whole.

        start: the tile's first place along each dim. number: of the tile.
        """
        inside = []
        for (first, length), at, size in zip(self.box, start, tile.shape, strict=True):
            low, high = max(first - at, 0), min(first + length - at, size)
            if low >= high:
                return
            inside.append(slice(low, high))
        target = tile[tuple(inside)]
        options = self.kwargs
        if self.seed is not None:
            # The numbers depend on the tile and the box, and on nothing that a rank has of them.
            source = torch.Generator(tile.device).manual_seed(tile_seed(self.seed, number))
            options = {**options, "generator": source}
        self.function(target, *self.args, **options)


def tile_seed(first: int, number: int) -> int:
    """Return the seed of a tile. first: the seed of tile 0. number: of the tile."""
    return (first + number) % _SEEDS


def elementwise_fills(
    calls: Sequence[RecordedCall], places: Sequence[int], seeds: Mapping[int, int], whole: Region
) -> list[Fill] | None:
    """Return the fills of a contiguous parameter, in order; None if any treats more than elements.

    calls: the whole record. places: of the calls in it that write to the parameter's storage.
    seeds: of the calls that draw, by their place. whole: the parameter, which has a storage for
    itself. Fills that a later one overwrites are left out. So many fills that to look at each for
    every tile would take long count as more, too.
    """
    fills: list[Fill] = []
    for at in places:
        call = calls[at]
        box = _box(call.args[0], whole) if call.args else None
        plain = not any(
            isinstance(value, Region | torch.Tensor)
            for value in (*call.args[1:], *call.kwargs.values())
        )
        if box is None or not call.elementwise or not plain:
            return None
        rest, options, seed = call.args[1:], dict(call.kwargs), seeds.get(at)
        fill = Fill(call.function, rest, options, box, call.overwrites, seed)
        if fill.overwrites and box == _box(whole, whole):
            fills.clear()
        fills.append(fill)
    return fills if len(fills) <= _MOST_FILLS else None


def _box(region: Any, whole: Region) -> Box | None:
    """Return the box of a contiguous tensor that a region shows, in any order of its dims; None if
    it is no box.

    Dims of one place are lost in views, and a view may have new ones: they say nothing.
    """
    if not isinstance(region, Region) or region.dtype != whole.dtype:
        return None
    dims = zip(region.shape, region.stride, strict=True)
    shown = sorted(((n, step) for n, step in dims if n != 1), key=lambda dim: -dim[1])
    box, offset, step = [], region.offset, prod(whole.shape)
    for size in whole.shape:
        step = step // size if size else 0
        first, offset = divmod(offset, step) if step else (0, offset)
        if shown and size != 1 and shown[0][1] == step:
            length = shown.pop(0)[0]
        else:
            length = 1
        if first + length > size:
            return None
        box.append((first, length))
    return None if shown else tuple(box)


def cover(fills: Sequence[Fill], whole: Region) -> bool:
    """Return whether fills overwrite every element of a parameter.

    >>> whole = Region(0, (4, 3), (3, 1), 0, torch.float32)
    >>> def rows(first, count):
    ...     return Fill(torch.ops.aten.zero_, (), {}, ((first, count), (0, 3)), True, None)
    >>> cover([rows(0, 2), rows(2, 2)], whole), cover([rows(0, 2), rows(3, 1)], whole)
    (True, False)
    """
    boxes = [fill.box for fill in fills if fill.overwrites]
    # No box begins or ends between two neighbouring cuts: one element of each stretch tells of all.
    cuts = [
        sorted({0, *(box[dim][0] for box in boxes), *(sum(box[dim]) for box in boxes)} - {size})
        for dim, size in enumerate(whole.shape)
    ]
    return all(
        any(all(a <= at < a + n for at, (a, n) in zip(place, box, strict=True)) for box in boxes)
        for place in itertools.product(*cuts)
    )


def _tile_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the lengths of a tile along each dim.

    The longest is halved until a tile is small enough, so that a tensor can be split along any dim
    and each rank has few tiles that it shares with others.
    """
    tile = list(shape)
    while prod(tile) > _TILE:
        longest = tile.index(max(tile))
        tile[longest] = -(-tile[longest] // 2)
    return tuple(tile)


def number_of_tiles(shape: tuple[int, ...]) -> int:
    """Return how many tiles a tensor has.

    >>> number_of_tiles((1024, 1024)), number_of_tiles(())
    (32, 1)
    """
    tile = _tile_shape(shape)
    return prod(
        -(-size // length) if length else 1 for size, length in zip(shape, tile, strict=True)
    )


def filled_part(
    fills: Sequence[Fill],
    region: Region,
    layout: Layout,
    ranks: Ranks,
    device: torch.device,
    whole: torch.Tensor | None,
) -> torch.Tensor:
    """Return this rank's part of a parameter, filled tile by tile.

    fills: what is done to the whole, in order. region: the whole parameter. layout: how it is
    split. device: of the part. whole: what the parameter holds before; None if it has no memory,
    where the fills must cover it.
    """
    shape = region.shape
    lengths = _tile_shape(shape)
    runs = [
        _runs_by_tile(dim, size, length, layout, ranks)
        for dim, (size, length) in enumerate(zip(shape, lengths, strict=True))
    ]
    own = [sum(r[2] for found in by_tile.values() for r in found) for by_tile in runs]
    part = torch.empty(own, dtype=region.dtype, device=device)
    grid = [
        -(-size // length) if length else 1 for size, length in zip(shape, lengths, strict=True)
    ]
    for at in itertools.product(*runs):
        number = 0
        for place, count in zip(at, grid, strict=True):
            number = number * count + place
        start = tuple(place * length for place, length in zip(at, lengths, strict=True))
        size = [min(n, whole_n - s) for n, whole_n, s in zip(lengths, shape, start, strict=True)]
        tile = torch.empty(size, dtype=region.dtype, device=device)
        if whole is not None:
            tile.copy_(whole[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))])
        for fill in fills:
            fill.run(tile, start, number)
        for pieces in itertools.product(*(by_tile[p] for by_tile, p in zip(runs, at, strict=True))):
            into = tuple(slice(piece[0], piece[0] + piece[2]) for piece in pieces)
            out_of = tuple(slice(piece[1], piece[1] + piece[2]) for piece in pieces)
            part[into] = tile[out_of]
    return part


def _runs_by_tile(
    dim: int, size: int, tile: int, layout: Layout, ranks: Ranks
) -> dict[int, list[tuple[int, int, int]]]:
    """Return which places of a dim this rank holds, by the tile that they lie in.

    Each run of places is (its first place in the part, its first place in the tile, its length).
    size: of the dim. tile: length of a tile along it.
    """
    along = tuple(
        placement if isinstance(placement, Shard) and placement.dim == dim else Invariant()
        for placement in layout
    )
    places = torch.arange(size).reshape([size if at == dim else 1 for at in range(dim + 1)])
    held = take_layout_part(places, along, ranks.sizes, ranks.coordinates).flatten()
    if not held.numel():
        return {}
    # A run ends where the next place is not the one after it, and where a tile ends.
    ends = (held[1:] != held[:-1] + 1) | (held[1:] % tile == 0)
    firsts = [0, *(ends.nonzero().flatten() + 1).tolist(), held.numel()]
    runs: dict[int, list[tuple[int, int, int]]] = {}
    for first, after in itertools.pairwise(firsts):
        start = int(held[first])
        runs.setdefault(start // tile, []).append((first, start % tile, after - first))
    return runs
