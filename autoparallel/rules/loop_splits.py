"""Ways to split one loop of an op, and the placements of tensors that follow from each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from autoparallel.graph.graph import Dim, Sym, hint
from autoparallel.placement import (
    Block,
    Counts,
    Shard,
    block_runs,
    block_sizes,
    blocks_and_units,
    can_be_shared,
    divides_in_runs,
    fewest_runs,
)
from autoparallel.rules.rule import Dims, Loops, ShardingRule

__all__ = [
    "LoopSplit",
    "UnsplittableError",
    "is_possible",
    "normalized",
    "own_split",
    "place",
    "tile_of",
    "tiles_of_piece",
]


class UnsplittableError(Exception):
    """This loop cannot be split in this way. Strategies that would need it are left out."""


@dataclass(frozen=True, slots=True)
class LoopSplit:
    """A way to split one loop: into `blocks`, each in runs of `unit` elements, of which each is
    done by `repeat` ranks, as `Shard` splits a dim.

    into: a loop inside of this one, which is split among the ranks that share a run of this one:
    with four heads of keys, each for two of queries, eight ranks have a head of queries each. Then
    there are more ranks than the loop has elements, and `repeat` is not said.
    """

    loop: str
    blocks: Counts = 1
    unit: Counts = 1
    repeat: Counts = 1
    into: str = ""

    def __post_init__(self) -> None:
        if not type(self.blocks) is type(self.unit) is type(self.repeat) is int:
            blocks, unit, repeat = blocks_and_units(self.blocks, self.unit, self.repeat)
            object.__setattr__(self, "blocks", blocks)
            object.__setattr__(self, "unit", unit)
            object.__setattr__(self, "repeat", repeat)

    @property
    def is_even(self) -> bool:
        """True if all blocks are of one size, and cut alike into parts for one rank each."""
        return type(self.blocks) is type(self.unit) is int and self.repeat == 1

    @property
    def is_plain(self) -> bool:
        """True if the loop is one block, cut anywhere."""
        return self.blocks == self.unit == self.repeat == 1 and not self.into

    @staticmethod
    def of_blocks(loop: str, blocks: Iterable[Block]) -> LoopSplit:
        """Return the split of a loop that consists of blocks. blocks: (elements, unit, repeat).

        >>> LoopSplit.of_blocks("n", [(64, 8, 1), (16, 8, 1)])
        LoopSplit(loop='n', blocks=(4, 1), unit=8, repeat=1, into='')
        """
        sizes, units, repeats = zip(*blocks, strict=True)
        return LoopSplit(loop, sizes, units, repeats)

    def shard(self, dim: int) -> Shard:
        """Return the placement of a dim that is this loop."""
        return Shard(dim, self.blocks, self.unit, self.repeat)


def normalized(shard: Shard, size: Dim, world_size: int) -> Shard:
    """Return the shard with unit 1 where that gives the same parts: where the runs of each block
    divide by the number of ranks.

    One placement must have one form, or equal layouts would be redistributed into each other. size:
    of the whole dim.

    >>> print(normalized(Shard(0, unit=64), 12 * 64, 4), normalized(Shard(0, unit=64), 25 * 64, 4))
    S(0) S(0, unit=64)
    """
    if isinstance(size, Sym) or shard.unit == 1:
        return shard
    if type(shard.blocks) is type(shard.unit) is int and shard.repeat == 1:
        if (size // (shard.blocks * shard.unit)) % world_size == 0:
            return Shard(shard.dim, shard.blocks)
        return shard
    units = tuple(
        1 if length // unit % (world_size // repeat) == 0 else unit
        for length, unit, repeat in block_sizes(size, shard.blocks, shard.unit, shard.repeat)
    )
    return Shard(shard.dim, shard.blocks, units, shard.repeat)


def place(rule: ShardingRule, dims: Dims, tile: LoopSplit, world_size: int) -> Shard | None:
    """Return the placement of a tensor of `dims` when `tile` is split;
    None where it has no such loop.

    Loops outside of the split one in the same dim become blocks, and loops inside of it become the
    unit. Raises UnsplittableError where no Shard says it: a symbolic size inside a merged dim.

    >>> merged = ShardingRule(((("heads", "width"),),), (), {"heads": 12, "width": 64})
    >>> print(place(merged, merged.operands[0], LoopSplit("heads"), 8))
    S(0, unit=64)
    """
    if tile.into:
        return _placed_in_groups(rule, dims, tile, world_size)
    for index, names in enumerate(dims):
        if tile.loop not in names:
            if rule.pieces and len(names) == 1 and rule.pieces.get(names[0], _NO)[0] == tile.loop:
                return _placed_piece(rule, index, names[0], tile, world_size)
            continue
        at = names.index(tile.loop)
        blocks, unit = tile.blocks, tile.unit
        if not (isinstance(blocks, int) and isinstance(unit, int) and tile.repeat == 1):
            return _placed_unevenly(rule, index, names, tile, world_size)
        total = 1
        for position, name in enumerate(names):
            size = rule.sizes[name]
            if isinstance(size, Sym):
                # A part of a symbolic inner loop is no fixed number of blocks or runs of the dim.
                if len(names) > 1:
                    raise UnsplittableError
                return Shard(index)
            total *= size
            if position < at:
                blocks *= size
            elif position > at:
                unit *= size
        if not total:
            raise UnsplittableError  # of no repetitions, no part has any
        return normalized(Shard(index, blocks, unit), total, world_size)
    return None


# A split into more blocks than this is not considered: it is of a dim cut into blocks of unequal
# size again and again, and every redistribution would move so many pieces.
_MOST_BLOCKS = 64
# A loop that is no piece of another one.
_NO = ("", 0, 0)


def _placed_unevenly(
    rule: ShardingRule, index: int, names: Loops, tile: LoopSplit, world_size: int
) -> Shard:
    """Return what `place` does for a loop that is split in blocks that are not alike."""
    at = names.index(tile.loop)
    sizes = [rule.sizes[name] for name in names]
    if any(isinstance(size, Sym) or not size for size in sizes):
        raise UnsplittableError
    outside, inside = (math.prod(map(hint, some)) for some in (sizes[:at], sizes[at + 1 :]))
    loop_blocks = block_sizes(hint(sizes[at]), tile.blocks, tile.unit, tile.repeat)
    if outside * len(loop_blocks) > _MOST_BLOCKS:
        raise UnsplittableError
    blocks = [(length * inside, unit * inside, times) for length, unit, times in loop_blocks]
    whole = LoopSplit.of_blocks("", blocks * outside)
    return normalized(whole.shard(index), math.prod(map(hint, sizes)), world_size)


def _placed_in_groups(
    rule: ShardingRule, dims: Dims, tile: LoopSplit, world_size: int
) -> Shard | None:
    """Return what `place` does where a loop is dealt to groups of ranks, and one inside of it to
    the ranks of each group: what has the outer loop alone is shared in the group.
    """
    at = {name: index for index, names in enumerate(dims) for name in names}
    if tile.loop not in at:
        if tile.into in at:
            raise UnsplittableError  # every group would hold all of it
        return None
    index = at[tile.loop]
    names = dims[index]
    place_in_dim = names.index(tile.loop)
    outside = math.prod(hint(rule.sizes[name]) for name in names[:place_in_dim])
    if tile.into not in at:
        repeat = world_size // hint(rule.sizes[tile.loop])
        return Shard(index, outside, 1, repeat)
    if names[place_in_dim + 1 : place_in_dim + 2] != (tile.into,):
        raise UnsplittableError  # two dims would have to be split
    return Shard(index, outside)


def _placed_piece(
    rule: ShardingRule, index: int, piece: str, tile: LoopSplit, world_size: int
) -> Shard:
    """Return the placement of a piece's dim where the loop that it is a piece of is split."""
    loop, start, stop = rule.pieces[piece]
    inside, first = [], 0
    size = hint(rule.sizes[loop])
    for length, unit, times in block_sizes(size, tile.blocks, tile.unit, tile.repeat):
        if first < stop and start < first + length:
            if first < start or stop < first + length:
                raise UnsplittableError  # a block lies across the piece's end
            inside.append((length, unit, times))
        first += length
    split = LoopSplit.of_blocks("", inside)
    return normalized(split.shard(index), stop - start, world_size)


def tile_of(rule: ShardingRule, dims: Dims, shard: Shard, world_size: int) -> LoopSplit | None:
    """Return the split of a loop that gives a tensor of `dims` the placement `shard`; None where
    there is none. Inverse of `place`.

    >>> merged = ShardingRule(((("heads", "width"),),), (), {"heads": 12, "width": 64})
    >>> tile_of(merged, merged.operands[0], Shard(0, unit=64), 8)
    LoopSplit(loop='heads', blocks=1, unit=1, repeat=1, into='')
    """
    names = dims[shard.dim]
    before = 1
    sizes = [rule.sizes[name] for name in names]
    if any(isinstance(size, Sym) for size in sizes):
        plain = len(names) == 1 and shard.blocks == 1 and shard.unit == 1
        return LoopSplit(names[0]) if plain else None
    whole = 1
    for size in sizes:
        assert isinstance(size, int)
        whole *= size
    if not whole:
        return None  # there is nothing to split
    if len(names) == 1 and names[0] in rule.pieces:
        return next(tiles_of_piece(rule, names[0], shard, {}), None)
    blocks, unit = shard.blocks, shard.unit
    if not (isinstance(blocks, int) and isinstance(unit, int) and shard.repeat == 1):
        return _uneven_tile(names, [hint(size) for size in sizes], shard, world_size)
    after = whole
    for name, size in zip(names, sizes, strict=True):
        assert isinstance(size, int)
        # `before` loops lie outside of this one, runs of `after` elements inside.
        after //= size
        if blocks % before == 0 and size % (blocks // before) == 0:
            count = blocks // before
            if size // count > 1:
                if unit % after == 0 and (size // count) % (unit // after) == 0:
                    return LoopSplit(name, count, unit // after)
                # A shard that `normalized` has put in its plain form is cut at this loop's runs all
                # the same.
                if unit == 1 and (whole // blocks) % (world_size * after) == 0:
                    return LoopSplit(name, count)
        before *= size
    before = 1
    for name, inner, size in zip(names, names[1:], sizes, strict=False):
        grouped = LoopSplit(name, into=inner)
        if (blocks, unit) == (before, 1) and is_possible(rule, grouped, world_size):
            return grouped
        before *= hint(size)
    return None


def _uneven_tile(names: Loops, sizes: list[int], shard: Shard, world_size: int) -> LoopSplit | None:
    """Return what `tile_of` does for a dim that is split in blocks that are not alike."""
    whole = math.prod(sizes)
    if not divides_in_runs(whole, shard.blocks, shard.unit):
        return None
    blocks = block_sizes(whole, shard.blocks, shard.unit, shard.repeat)
    outside, inside = 1, whole
    for name, size in zip(names, sizes, strict=True):
        inside //= size
        # Every place of the outer loops has the same blocks, each of whole runs of the inner ones.
        period = blocks[: len(blocks) // outside] if len(blocks) % outside == 0 else ()
        within = []
        for length, unit, times in period if period * outside == blocks else ():
            # `normalized` has put a unit in its plain form where that gives the same parts.
            plain = unit == 1 and length % (inside * (world_size // times)) == 0
            if length % inside or (unit % inside and not plain):
                break
            within.append((length // inside, max(1, unit // inside), times))
        if within and sum(length for length, _, _ in within) == size:
            return LoopSplit.of_blocks(name, within)
        outside *= size
    return None


def own_split(rule: ShardingRule, loop: str) -> LoopSplit:
    """Return the plainest split of a loop: of one that has pieces, each of them by itself.

    >>> rule = ShardingRule((), (), {"all": 6}, pieces={"a": ("all", 0, 4), "b": ("all", 4, 6)})
    >>> own_split(rule, "all")
    LoopSplit(loop='all', blocks=(2, 1), unit=1, repeat=1, into='')
    """
    lengths = [stop - start for whole, start, stop in rule.pieces.values() if whole == loop]
    return LoopSplit(loop, tuple(lengths)) if lengths else LoopSplit(loop)


# Pieces that may each be split in several ways may be so in every combination of them, up to this
# many; where there are more, all but one piece are split in the plainest way.
_MOST_COMBINATIONS = 8


def tiles_of_piece(
    rule: ShardingRule, piece: str, shard: Shard, known: Mapping[str, Iterable[Shard]]
) -> Iterator[LoopSplit]:
    """Yield the splits of the loop that `piece` is a part of which give its dim this placement.

    known: of the other pieces, the placements to combine it with; a piece of the same size is also
    split as this one, and one without any plainly.

    >>> rule = ShardingRule((), (), {"all": 6}, pieces={"a": ("all", 0, 4), "b": ("all", 4, 6)})
    >>> list(tiles_of_piece(rule, "a", Shard(0, blocks=2), {}))
    [LoopSplit(loop='all', blocks=3, unit=1, repeat=1, into='')]
    """
    loop, start, stop = rule.pieces[piece]
    size = stop - start
    options = []
    for name, (whole, first, last) in rule.pieces.items():
        if whole != loop:
            continue
        length = last - first
        ways = [shard] if name == piece or length == size else list(known.get(name, ()))
        blocks = {
            block_sizes(length, way.blocks, way.unit, way.repeat): None
            for way in ways
            if divides_in_runs(length, way.blocks, way.unit)
        }
        if not blocks and name == piece:
            return
        options.append(list(blocks) or [((length, 1, 1),)])
    if math.prod(map(len, options)) > _MOST_COMBINATIONS:
        options = [some[:1] for some in options]
    for combination in product(*options):
        blocks_of_all = [block for blocks in combination for block in blocks]
        if len(blocks_of_all) <= _MOST_BLOCKS:
            yield LoopSplit.of_blocks(loop, blocks_of_all)


def is_possible(rule: ShardingRule, tile: LoopSplit, world_size: int) -> bool:
    """Return whether the loop divides into such blocks and runs, at least two of them, and into
    parts that the op takes.

    A symbolic dim may turn out shorter than the number of ranks; the last ones then get nothing.
    Nor is it known what its parts are multiples of, so that a loop with a grain is not split. A
    kernel knows where its part begins from the rank alone, so that it takes plain splits only.
    """
    if tile.loop in rule.kernels and not tile.is_plain:
        return False
    size = rule.sizes[tile.loop]
    grain = rule.grain.get(tile.loop, 1)
    if isinstance(size, Sym):
        return tile.is_plain and grain == 1
    if tile.into:
        return grain == 1 and _deals_groups(rule, tile, world_size)
    blocks, unit = tile.blocks, tile.unit
    if tile.loop in rule.pieces or not divides_in_runs(size, blocks, unit):
        return False
    # One run cannot be shared.
    if fewest_runs(size, blocks, unit) < 2:
        return False
    if not (isinstance(blocks, int) and isinstance(unit, int) and tile.repeat == 1):
        return _takes_parts(rule, tile, world_size)
    runs = size // (blocks * unit)
    # Parts are those of torch.chunk: `step` runs each, and what is left for the last one.
    step = -(-runs // world_size)
    if any(count * blocks * unit % grain for count in (step, runs % step)):
        return False
    # The last rank's part begins at (world_size - 1) * step; beyond the end, it is empty.
    return not rule.needs_elements(tile.loop) or (world_size - 1) * step < runs


def _takes_parts(rule: ShardingRule, tile: LoopSplit, world_size: int) -> bool:
    """Return whether the op takes the parts of a loop that is split in blocks not alike."""
    size, grain = hint(rule.sizes[tile.loop]), rule.grain.get(tile.loop, 1)
    shard = tile.shard(0)
    if not can_be_shared(shard, size, world_size):
        return False
    # Ranks that do the same work have a summand of the gradient each.
    if tile.repeat != 1 and not rule.replicates:
        return False
    last = block_runs(size, shard, world_size, world_size - 1)
    if grain > 1 and any(
        length % grain
        for rank in range(world_size)
        for _, length in block_runs(size, shard, world_size, rank)
    ):
        return False
    return not rule.needs_elements(tile.loop) or all(length for _, length in last)


def _deals_groups(rule: ShardingRule, tile: LoopSplit, world_size: int) -> bool:
    """Return whether there are more ranks than the loop has elements, in groups that share one, and
    the loop inside of it divides by the ranks of a group.
    """
    outer, inner = rule.sizes[tile.loop], rule.sizes[tile.into]
    if isinstance(outer, Sym) or isinstance(inner, Sym) or not rule.replicates:
        return False
    if tile.into in rule.whole - rule.dealt:
        return False
    if not 1 < outer < world_size or world_size % outer or inner % (world_size // outer):
        return False
    return not {tile.loop, tile.into} & {*rule.kernels, *rule.pieces}
