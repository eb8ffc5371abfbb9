"""The parts into which the ranks of one mesh axis cut a tensor: taken, joined and padded.

Ranks may hold parts of different lengths. torch's all-gather and reduce-scatter want equal ones, so
parts travel padded with zeros to the longest, which is always the first rank's. A split in blocks
cuts every block by itself, and padding is added to each block's run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from autoparallel.placement import Shard, part_bounds
from autoparallel.runtime.groups import Group

__all__ = [
    "cut_and_pad",
    "cut_rows",
    "join_padded",
    "join_parts",
    "join_rows",
    "pad_part",
    "places_of_rank",
    "run_lengths",
    "run_of_rank",
    "take_part",
    "unpad_part",
]


def run_of_rank(size: int, shard: Shard, world_size: int, rank: int) -> tuple[int, int]:
    """Return start and length, in elements, of a rank's run inside each block of a dim of `size`.

    >>> run_of_rank(12, Shard(0, blocks=2), 2, 1)
    (3, 3)
    """
    start, stop = part_bounds(size // (shard.blocks * shard.unit), world_size, rank)
    return start * shard.unit, (stop - start) * shard.unit


def take_part(tensor: torch.Tensor, shard: Shard, world_size: int, rank: int) -> torch.Tensor:
    """Return the part of a whole tensor that `rank` holds under `shard`.

    tensor: whole along `shard.dim`, whose size must divide by shard.blocks * shard.unit. The result
    may be a view, and may be empty where there are fewer runs than ranks.

    >>> take_part(torch.arange(6), Shard(0), 2, 1)
    tensor([3, 4, 5])
    >>> take_part(torch.arange(6), Shard(0, blocks=2), 2, 0)  # two blocks of three, each cut
    tensor([0, 1, 3, 4])
    """
    size = tensor.size(shard.dim)
    start, length = run_of_rank(size, shard, world_size, rank)
    if shard.blocks == 1:
        return tensor.narrow(shard.dim, start, length)
    blocks = tensor.unflatten(shard.dim, (shard.blocks, size // shard.blocks))
    return blocks.narrow(shard.dim + 1, start, length).flatten(shard.dim, shard.dim + 1)


def join_parts(parts: list[torch.Tensor], shard: Shard) -> torch.Tensor:
    """Return the whole tensor of all ranks' parts, in the order of ranks. Inverse of `take_part`.

    >>> join_parts([torch.tensor([0, 1, 3, 4]), torch.tensor([2, 5])], Shard(0, blocks=2))
    tensor([0, 1, 2, 3, 4, 5])
    """
    if shard.blocks == 1:
        return torch.cat(parts, shard.dim)
    # Blocks lie end to end in the whole, while a part has its runs of all blocks end to end.
    blocks = [
        part.unflatten(shard.dim, (shard.blocks, part.size(shard.dim) // shard.blocks))
        for part in parts
    ]
    return torch.cat(blocks, shard.dim + 1).flatten(shard.dim, shard.dim + 1)


def places_of_rank(size: int, shard: Shard, world_size: int, rank: int) -> torch.Tensor:
    """Return the places along a whole dim of `size` that a rank holds, in the order of its part.

    >>> places_of_rank(8, Shard(1, blocks=2), 2, 0)
    tensor([0, 1, 4, 5])
    """
    return take_part(torch.arange(size), Shard(0, shard.blocks, shard.unit), world_size, rank)


def run_lengths(size: int, shard: Shard, group: Group) -> list[int]:
    """Return the length of every rank's run inside each block; the first is the longest.

    size: of the whole dim. group: the ranks that split it.

    >>> from autoparallel.runtime.groups import thread_groups
    >>> run_lengths(5, Shard(0), thread_groups(2)[0])
    [3, 2]
    """
    return [run_of_rank(size, shard, group.world_size, r)[1] for r in range(group.world_size)]


def pad_part(part: torch.Tensor, shard: Shard, longest: int, length: int) -> torch.Tensor:
    """Return a part with every block's run padded with zeros to the longest rank's.

    longest, length: of the longest rank's run and of this one's, in elements.

    >>> pad_part(torch.tensor([1, 2]), Shard(0, blocks=2), longest=2, length=1)
    tensor([1, 0, 2, 0])
    """
    if length == longest:
        return part
    shape = list(part.shape)
    shape[shard.dim : shard.dim + 1] = [shard.blocks, longest]
    padded = part.new_zeros(shape)
    blocks = part.unflatten(shard.dim, (shard.blocks, length))
    padded.narrow(shard.dim + 1, 0, length).copy_(blocks)
    return padded.flatten(shard.dim, shard.dim + 1)


def unpad_part(part: torch.Tensor, shard: Shard, longest: int, length: int) -> torch.Tensor:
    """Return a part without its padding. Inverse of `pad_part`.

    >>> unpad_part(torch.tensor([1, 0, 2, 0]), Shard(0, blocks=2), longest=2, length=1)
    tensor([1, 2])
    """
    if length == longest:
        return part
    blocks = part.unflatten(shard.dim, (shard.blocks, longest))
    return blocks.narrow(shard.dim + 1, 0, length).flatten(shard.dim, shard.dim + 1)


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


def join_padded(rows: Sequence[torch.Tensor], shard: Shard, lengths: list[int]) -> torch.Tensor:
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


def join_rows(rows: torch.Tensor, shard: Shard, lengths: list[int]) -> torch.Tensor:
    """Return the whole tensor of all ranks' padded parts, as an all-gather brings them.

    rows: (ranks, *part), in memory of its own. lengths: from `run_lengths`. Where the split dim
    lies first, the parts are the whole already, and nothing is copied. The result is no view for
    autograd, so that it may be written to.

    >>> join_rows(torch.tensor([[[1, 2]], [[3, 4]]]), Shard(1), [2, 2])
    tensor([[1, 2, 3, 4]])
    """
    part = rows.shape[1:]
    if shard.blocks == 1 and lengths[0] == lengths[-1] and _lies_first(part, shard.dim):
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
    alike = shard.blocks == 1 and lengths[0] == lengths[-1]
    if alike and tensor.is_contiguous() and _lies_first(tensor.shape, shard.dim):
        part = (*tensor.shape[: shard.dim], lengths[0], *tensor.shape[shard.dim + 1 :])
        return tensor.view(group.world_size, *part)
    return torch.stack(cut_and_pad(tensor, shard, group))
