"""The parts into which the ranks of one mesh axis cut a tensor: taken, joined and padded.

Ranks may hold parts of different lengths. torch's all-gather and reduce-scatter want equal ones, so
parts travel padded with zeros to the longest, which is always the first rank's. A split in blocks
cuts every block by itself, and padding is added to each block's run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from autoparallel.placement import Shard, block_runs, block_sizes, is_even, part_bounds
from autoparallel.runtime.groups import Group

__all__ = [
    "cut_and_pad",
    "cut_rows",
    "join_padded",
    "join_parts",
    "join_rows",
    "keep_on_first",
    "pad_part",
    "places_of_rank",
    "put_part",
    "run_lengths",
    "runs_in_common",
    "take_part",
    "unpad_part",
]


# How much a rank holds of every block: one number where all are alike, else one for each.
_Lengths = int | tuple[int, ...]


def _run_of_rank(size: int, shard: Shard, world_size: int, rank: int) -> tuple[int, int]:
    """Return start and length, in elements, of a rank's run inside each block of a dim of `size`.

    shard: one that cuts all blocks alike.
    """
    assert isinstance(shard.blocks, int)
    assert isinstance(shard.unit, int)
    start, stop = part_bounds(size // (shard.blocks * shard.unit), world_size, rank)
    return start * shard.unit, (stop - start) * shard.unit


def take_part(tensor: torch.Tensor, shard: Shard, world_size: int, rank: int) -> torch.Tensor:
    """Return the part of a whole tensor that `rank` holds under `shard`.

    tensor: whole along `shard.dim`, whose size must consist of such blocks and runs. The result may
    be a view, and may be empty where there are fewer runs than ranks.

    >>> take_part(torch.arange(6), Shard(0), 2, 1)
    tensor([3, 4, 5])
    >>> take_part(torch.arange(6), Shard(0, blocks=2), 2, 0)  # two blocks of three, each cut
    tensor([0, 1, 3, 4])
    """
    size = tensor.size(shard.dim)
    if not is_even(shard):
        runs = block_runs(size, shard, world_size, rank)
        return torch.cat([tensor.narrow(shard.dim, *run) for run in runs], shard.dim)
    start, length = _run_of_rank(size, shard, world_size, rank)
    if shard.blocks == 1:
        return tensor.narrow(shard.dim, start, length)
    assert isinstance(shard.blocks, int)
    blocks = tensor.unflatten(shard.dim, (shard.blocks, size // shard.blocks))
    return blocks.narrow(shard.dim + 1, start, length).flatten(shard.dim, shard.dim + 1)


def join_parts(parts: list[torch.Tensor], shard: Shard) -> torch.Tensor:
    """Return the whole tensor of all ranks' parts, in the order of ranks. Inverse of `take_part`.

    >>> join_parts([torch.tensor([0, 1, 3, 4]), torch.tensor([2, 5])], Shard(0, blocks=2))
    tensor([0, 1, 2, 3, 4, 5])
    """
    if not is_even(shard):
        return _joined_blocks(parts, shard)
    if shard.blocks == 1:
        return torch.cat(parts, shard.dim)
    assert isinstance(shard.blocks, int)
    # Blocks lie end to end in the whole, while a part has its runs of all blocks end to end.
    blocks = [
        part.unflatten(shard.dim, (shard.blocks, part.size(shard.dim) // shard.blocks))
        for part in parts
    ]
    return torch.cat(blocks, shard.dim + 1).flatten(shard.dim, shard.dim + 1)


def _joined_blocks(parts: list[torch.Tensor], shard: Shard) -> torch.Tensor:
    """Return what `join_parts` does where blocks are not alike. Of what several ranks hold, the
    first one's counts, or, where it is pending, the sum.
    """
    # The ranks together hold as much of every block as its repeat says.
    total = sum(shard.blocks) if isinstance(shard.blocks, tuple) else shard.blocks
    blocks = block_sizes(total, shard.blocks, 1, shard.repeat)
    held = sum(part.size(shard.dim) for part in parts)
    size = held * total // sum(length * repeat for length, _, repeat in blocks)
    shape = list(parts[0].shape)
    shape[shard.dim] = size
    whole = parts[0].new_zeros(shape)
    for rank, part in enumerate(parts):
        put_part(whole, part, shard, len(parts), rank)
    return whole


def places_of_rank(size: int, shard: Shard, world_size: int, rank: int) -> torch.Tensor:
    """Return the places along a whole dim of `size` that a rank holds, in the order of its part.

    >>> places_of_rank(8, Shard(1, blocks=2), 2, 0)
    tensor([0, 1, 4, 5])
    """
    return take_part(torch.arange(size), replace(shard, dim=0), world_size, rank)


def run_lengths(size: int, shard: Shard, group: Group) -> list[_Lengths]:
    """Return the length of every rank's run inside each block; the first is the longest.

    size: of the whole dim. group: the ranks that split it. A rank's is one number where all blocks
    are cut alike, else a number for each block.

    >>> from autoparallel.runtime.groups import thread_groups
    >>> run_lengths(5, Shard(0), thread_groups(2)[0])
    [3, 2]
    >>> run_lengths(10, Shard(0, blocks=(3, 2)), thread_groups(4)[0])
    [(2, 1), (2, 1), (2, 1), (0, 1)]
    """
    ranks = range(group.world_size)
    if is_even(shard):
        return [_run_of_rank(size, shard, group.world_size, rank)[1] for rank in ranks]
    return [
        tuple([length for _, length in block_runs(size, shard, group.world_size, rank)])
        for rank in ranks
    ]


def pad_part(part: torch.Tensor, shard: Shard, longest: _Lengths, length: _Lengths) -> torch.Tensor:
    """Return a part with every block's run padded with zeros to the longest rank's.

    longest, length: of the longest rank's run and of this one's, from `run_lengths`.

    >>> pad_part(torch.tensor([1, 2]), Shard(0, blocks=2), longest=2, length=1)
    tensor([1, 0, 2, 0])
    """
    if length == longest:
        return part
    shape = list(part.shape)
    if isinstance(longest, tuple):
        assert isinstance(length, tuple)
        shape[shard.dim] = sum(longest)
        padded = part.new_zeros(shape)
        first, at = 0, 0
        for space, held in zip(longest, length, strict=True):
            padded.narrow(shard.dim, first, held).copy_(part.narrow(shard.dim, at, held))
            first, at = first + space, at + held
        return padded
    assert isinstance(shard.blocks, int)
    assert isinstance(length, int)
    shape[shard.dim : shard.dim + 1] = [shard.blocks, longest]
    padded = part.new_zeros(shape)
    blocks = part.unflatten(shard.dim, (shard.blocks, length))
    padded.narrow(shard.dim + 1, 0, length).copy_(blocks)
    return padded.flatten(shard.dim, shard.dim + 1)


def unpad_part(
    part: torch.Tensor, shard: Shard, longest: _Lengths, length: _Lengths
) -> torch.Tensor:
    """Return a part without its padding. Inverse of `pad_part`.

    >>> unpad_part(torch.tensor([1, 0, 2, 0]), Shard(0, blocks=2), longest=2, length=1)
    tensor([1, 2])
    """
    if length == longest:
        return part
    if isinstance(longest, tuple):
        assert isinstance(length, tuple)
        runs = part.split(longest, shard.dim)
        held = [run.narrow(shard.dim, 0, n) for run, n in zip(runs, length, strict=True)]
        return torch.cat(held, shard.dim)
    assert isinstance(shard.blocks, int)
    assert isinstance(length, int)
    blocks = part.unflatten(shard.dim, (shard.blocks, longest))
    return blocks.narrow(shard.dim + 1, 0, length).flatten(shard.dim, shard.dim + 1)


def put_part(whole: torch.Tensor, part: torch.Tensor, shard: Shard, ranks: int, rank: int) -> None:
    """Write a rank's part into its places of a whole tensor. Of what several ranks hold, the first
    one's is written, or, where it is pending, every one's is added.

    >>> whole = torch.zeros(4)
    >>> put_part(whole, torch.tensor([1.0, 2.0]), Shard(0, blocks=2), 2, 1)
    >>> whole
    tensor([0., 1., 0., 2.])
    """
    size = whole.size(shard.dim)
    if is_even(shard):
        assert isinstance(shard.blocks, int)
        start, length = _run_of_rank(size, shard, ranks, rank)
        places = whole.unflatten(shard.dim, (shard.blocks, size // shard.blocks))
        blocks = part.unflatten(shard.dim, (shard.blocks, length))
        places.narrow(shard.dim + 1, start, length).copy_(blocks)
        return
    at = 0
    blocks = block_sizes(size, shard.blocks, shard.unit, shard.repeat)
    runs = block_runs(size, shard, ranks, rank)
    for (start, length), (_, _, repeat) in zip(runs, blocks, strict=True):
        place, run = whole.narrow(shard.dim, start, length), part.narrow(shard.dim, at, length)
        if shard.pending:
            place.add_(run)
        elif rank % repeat == 0:
            place.copy_(run)
        at += length


def runs_in_common(
    size: int, source: Shard, target: Shard, ranks: int, sender: int, receiver: int
) -> tuple[tuple[int, int, int], ...]:
    """Return what one rank's part under `source` has in common with another's under `target`, both
    of one dim: (start in the former, start in the latter, length) of every run.

    size: of the whole dim. What several ranks hold is only in common with the first of them, but
    where it is pending: each of them has a summand.

    >>> runs_in_common(8, Shard(0), Shard(0, blocks=2), 2, 0, 1)
    ((2, 0, 2),)
    """
    ways = (size, source, target, ranks, sender, receiver)
    # A compiler traces through what is kept, and says so.
    return _common(*ways) if torch.compiler.is_compiling() else _kept_common(*ways)


def _common(
    size: int, source: Shard, target: Shard, ranks: int, sender: int, receiver: int
) -> tuple[tuple[int, int, int], ...]:
    """Return what `runs_in_common` does, found now."""
    held, at = [], 0
    blocks = block_sizes(size, source.blocks, source.unit, source.repeat)
    for (start, length), (_, _, repeat) in zip(
        block_runs(size, source, ranks, sender), blocks, strict=True
    ):
        if source.pending or sender % repeat == 0:
            held.append((start, length, at))
        at += length
    wanted, at = [], 0
    for start, length in block_runs(size, target, ranks, receiver):
        wanted.append((start, length, at))
        at += length
    common, i, j = [], 0, 0
    # Both are in the order of the whole.
    while i < len(held) and j < len(wanted):
        (one, length, here), (two, other, there) = held[i], wanted[j]
        first, last = max(one, two), min(one + length, two + other)
        if first < last:
            common.append((here + first - one, there + first - two, last - first))
        if one + length <= two + other:
            i += 1
        else:
            j += 1
    return tuple(common)


_kept_common = cache(_common)


def keep_on_first(
    part: torch.Tensor, shard: Shard, size: int, ranks: int, rank: int
) -> torch.Tensor:
    """Return a rank's part with zeros in place of what an earlier rank holds as well: the terms of
    a sum over the ranks that share a part. size: of the whole dim.

    >>> [keep_on_first(torch.ones(2), Shard(0, repeat=2), 4, 4, rank) for rank in (2, 3)]
    [tensor([1., 1.]), tensor([0., 0.])]
    """
    kept, at = part.clone(memory_format=torch.contiguous_format), 0
    blocks = block_sizes(size, shard.blocks, shard.unit, shard.repeat)
    runs = block_runs(size, shard, ranks, rank)
    for (_, length), (_, _, repeat) in zip(runs, blocks, strict=True):
        if rank % repeat:
            kept.narrow(shard.dim, at, length).zero_()
        at += length
    return kept


def cut_and_pad(tensor: torch.Tensor, shard: Shard, group: Group) -> list[torch.Tensor]:
    """Return every rank's part of a whole tensor, padded to the longest.

    >>> from autoparallel.runtime.groups import thread_groups
    >>> cut_and_pad(torch.tensor([1, 2, 3]), Shard(0), thread_groups(2)[0])
    [tensor([1, 2]), tensor([3, 0])]
    """
    lengths = run_lengths(tensor.size(shard.dim), shard, group)
    return [
        pad_part(take_part(tensor, shard, group.world_size, r), shard, lengths[0], length)
        for r, length in enumerate(lengths)
    ]


def join_padded(
    rows: Sequence[torch.Tensor], shard: Shard, lengths: list[_Lengths]
) -> torch.Tensor:
    """Return the whole tensor of all ranks' padded parts. Inverse of `cut_and_pad`.

    rows: the parts, in the order of ranks. lengths: from `run_lengths`.

    >>> join_padded([torch.tensor([1, 2]), torch.tensor([3, 0])], Shard(0), [2, 1])
    tensor([1, 2, 3])
    """
    parts = [
        unpad_part(row, shard, lengths[0], length)
        for row, length in zip(rows, lengths, strict=True)
    ]
    return join_parts(parts, shard)


def _lies_first(shape: Sequence[int], dim: int) -> bool:
    """Say whether nothing lies before a dim, so that parts of it lie end to end in memory."""
    return math.prod(shape[:dim]) == 1


def join_rows(rows: torch.Tensor, shard: Shard, lengths: list[_Lengths]) -> torch.Tensor:
    """Return the whole tensor of all ranks' padded parts, as an all-gather brings them.

    rows: (ranks, *part), in memory of its own. lengths: from `run_lengths`. Where the split dim
    lies first, the parts are the whole already, and nothing is copied. The result is no view for
    autograd, so that it may be written to.

    >>> join_rows(torch.tensor([[[1, 2]], [[3, 4]]]), Shard(1), [2, 2])
    tensor([[1, 2, 3, 4]])
    """
    part = rows.shape[1:]
    if (
        shard.blocks == shard.repeat == 1
        and lengths[0] == lengths[-1]
        and _lies_first(part, shard.dim)
    ):
        whole = (*part[: shard.dim], len(rows) * part[shard.dim], *part[shard.dim + 1 :])
        return rows.view(whole).detach()
    return join_padded(rows.unbind(0), shard, lengths)


def cut_rows(tensor: torch.Tensor, shard: Shard, group: Group) -> torch.Tensor:
    """Return every rank's part of a whole tensor, padded to the longest: (ranks, *part).

    Where the split dim lies first and divides by the ranks, this is a view. Inverse of `join_rows`.

    >>> from autoparallel.runtime.groups import thread_groups
    >>> cut_rows(torch.tensor([1, 2, 3]), Shard(0), thread_groups(2)[0])
    tensor([[1, 2],
            [3, 0]])
    """
    lengths = run_lengths(tensor.size(shard.dim), shard, group)
    alike = shard.blocks == shard.repeat == 1 and lengths[0] == lengths[-1]
    if alike and tensor.is_contiguous() and _lies_first(tensor.shape, shard.dim):
        assert isinstance(lengths[0], int)
        part = (*tensor.shape[: shard.dim], lengths[0], *tensor.shape[shard.dim + 1 :])
        return tensor.view(group.world_size, *part)
    return torch.stack(cut_and_pad(tensor, shard, group))
