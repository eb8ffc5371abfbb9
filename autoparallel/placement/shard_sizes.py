"""Numbers of elements of a sharded dim that each rank holds: blocks, runs and parts of them."""

from __future__ import annotations

from autoparallel.placement.placements import (
    Counts,
    Layout,
    Shard,
)

__all__ = [
    "Block",
    "block_runs",
    "block_sizes",
    "can_be_shared",
    "divides_in_runs",
    "fewest_runs",
    "is_even",
    "local_layout_size",
    "local_size",
    "part_bounds",
]


def part_bounds(count: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return the bounds [start, stop) of a rank's part of `count` things, as torch.chunk cuts them:
    every part is count / world_size rounded up, and the last ones are shorter or empty.

    >>> [part_bounds(5, 4, rank) for rank in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    step = -(-count // world_size)
    start = min(rank * step, count)
    return start, min(start + step, count)


def local_size(size: int, shard: Shard, world_size: int, rank: int = 0) -> int:
    """Return the number of elements that `rank` holds of a dim of `size` elements;
    rank 0 holds the largest part.

    size: of the whole dim. shard: how it is cut; its `dim` is not looked at. world_size: ranks on
    the mesh axis.

    >>> [local_size(25 * 64, Shard(0, unit=64), 8, rank) for rank in (0, 6, 7)]
    [256, 64, 0]
    """
    blocks, unit = shard.blocks, shard.unit
    if isinstance(blocks, int) and isinstance(unit, int) and shard.repeat == 1:
        # All blocks are cut alike, so that a rank holds as many runs of each.
        start, stop = part_bounds(size // (blocks * unit), world_size, rank)
        return blocks * unit * (stop - start)
    return sum(length for _, length in block_runs(size, shard, world_size, rank))


def is_even(shard: Shard) -> bool:
    """Return whether all blocks of a dim are of one size, and cut in runs of one size, of which
    each is held by one rank.

    >>> is_even(Shard(0, blocks=3)), is_even(Shard(0, blocks=(4, 1, 1)))
    (True, False)
    """
    blocks, unit = shard.blocks, shard.unit
    return isinstance(blocks, int) and isinstance(unit, int) and shard.repeat == 1


# A block of a dim: its elements, unit and repeat.
Block = tuple[int, int, int]


def block_sizes(
    size: int, blocks: Counts, unit: Counts = 1, repeat: Counts = 1
) -> tuple[Block, ...]:
    """Return (elements, unit, repeat) of every block of a dim of `size` elements, which must divide
    so.

    blocks, unit, repeat: as a Shard has them.

    >>> block_sizes(12, (4, 1, 1), 1), block_sizes(12, 2, (3, 1), (1, 2))
    (((8, 1, 1), (2, 1, 1), (2, 1, 1)), ((6, 3, 1), (6, 1, 2)))
    """
    shares = blocks if isinstance(blocks, tuple) else (1,) * blocks
    units, repeats = (
        numbers if isinstance(numbers, tuple) else (numbers,) * len(shares)
        for numbers in (unit, repeat)
    )
    total = sum(shares)
    return tuple(
        (size * share // total, run, times)
        for share, run, times in zip(shares, units, repeats, strict=True)
    )


def block_runs(size: int, shard: Shard, world_size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return (start in the whole dim, length) of what a rank holds of every block.

    size: of the whole dim. shard: how it is cut; its `dim` is not looked at.

    >>> block_runs(12, Shard(0, blocks=(4, 1, 1)), 2, 1)
    ((4, 4), (9, 1), (11, 1))
    >>> [block_runs(12, Shard(0, repeat=2), 4, rank)[0] for rank in range(4)]
    [(0, 6), (0, 6), (6, 6), (6, 6)]
    """
    runs, first = [], 0
    for length, unit, repeat in block_sizes(size, shard.blocks, shard.unit, shard.repeat):
        start, stop = part_bounds(length // unit, world_size // repeat, rank // repeat)
        runs.append((first + start * unit, (stop - start) * unit))
        first += length
    return tuple(runs)


def divides_in_runs(size: int, blocks: Counts, unit: Counts, parts: int = 1) -> bool:
    """Return whether a dim of `size` elements consists of such blocks of whole runs, and every
    block of a number of runs that divides by `parts`.

    >>> divides_in_runs(12, (4, 1, 1), 1, parts=2), divides_in_runs(12, (4, 1, 1), 1, parts=4)
    (True, False)
    """
    if isinstance(blocks, int) and isinstance(unit, int):
        return not size % (blocks * unit * parts)
    shares = blocks if isinstance(blocks, tuple) else (1,) * blocks
    total = sum(shares)
    return not any(size * share % total for share in shares) and not any(
        length % (run * parts) for length, run, _ in block_sizes(size, blocks, unit)
    )


def fewest_runs(size: int, blocks: Counts, unit: Counts) -> int:
    """Return the number of runs of the block that has the fewest.

    >>> fewest_runs(12, (4, 1, 1), 1)
    2
    """
    if isinstance(blocks, int) and isinstance(unit, int):
        return size // (blocks * unit)
    return min(length // run for length, run, _ in block_sizes(size, blocks, unit))


def can_be_shared(shard: Shard, size: int, world_size: int) -> bool:
    """Return whether each part can be held by as many ranks as `shard.repeat` says: groups of equal
    size, of which each has as many runs.

    size: of the whole dim, which must consist of such blocks and runs.

    >>> can_be_shared(Shard(0, repeat=2), 4, 8), can_be_shared(Shard(0, repeat=2), 4, 6)
    (True, False)
    """
    return shard.repeat == 1 or all(
        times == 1 or (world_size % times == 0 and length // unit % (world_size // times) == 0)
        for length, unit, times in block_sizes(size, shard.blocks, shard.unit, shard.repeat)
    )


def local_layout_size(
    size: int,
    dim: int,
    layout: Layout,
    sizes: tuple[int, ...],
    ranks: tuple[int, ...] | None = None,
) -> int:
    """Return the number of elements along `dim`, `size` in all, that one rank holds under a layout.

    layout: a placement for each mesh axis; those that do not shard `dim` do not matter. sizes: the
    mesh axes' sizes. ranks: the rank's place on each axis; by default 0, which holds the largest
    part.

    >>> local_layout_size(12, 0, (Shard(0), Shard(0)), (2, 3))
    2
    """
    # Outermost first: where two axes cut one dim, the inner one cuts what the outer one left.
    for axis, placement in enumerate(layout):
        if isinstance(placement, Shard) and placement.dim == dim:
            size = local_size(size, placement, sizes[axis], ranks[axis] if ranks else 0)
    return size
