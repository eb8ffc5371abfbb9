"""Several tensors at once: one collective on a mesh axis for all of an element type.

A collective costs its latency once, however many tensors it brings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from autoparallel.placement import (
    Shard,
    local_size,
)
from autoparallel.runtime.axis_parts import (
    cut_rows,
    join_padded,
    keep_on_first,
    pad_part,
    run_lengths,
    runs_in_common,
    unpad_part,
)
from autoparallel.runtime.groups import Group
from autoparallel.support.torch_private import laid_end_to_end

__all__ = [
    "exchange_together",
    "gather_together",
    "start_reduce_scatter_together",
    "start_sum_together",
]


def exchange_together(
    tensors: Sequence[torch.Tensor],
    sources: Sequence[Shard],
    targets: Sequence[Shard],
    sizes: Sequence[int],
    group: Group,
) -> list[torch.Tensor]:
    """Return the parts under `targets` of several tensors, of which each rank holds the parts under
    `sources`, of the same dims, in one all-to-all per element type. Collective.

    sizes: of each whole along its split dim. Every rank is sent the elements that it lacks: of what
    several ranks hold, the first one's, or, where it is pending, every one's, to be added up.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> exchange_together([torch.ones(2)], [Shard(0)], [Shard(0)], [2], SingleGroup())
    [tensor([1., 1.])]
    """
    count, rank = group.world_size, group.rank
    ways = list(zip(sources, targets, sizes, strict=True))
    results: list[torch.Tensor] = list(tensors)
    for places in _by_type(tensors):
        sent: list[torch.Tensor] = []
        shapes: list[tuple[int, ...]] = []
        for other in range(count):
            pieces, numbers = [], 0
            for index in places:
                source, target, size = ways[index]
                tensor, dim = tensors[index], source.dim
                for at, _, length in runs_in_common(size, source, target, count, rank, other):
                    pieces.append(tensor.narrow(dim, at, length).reshape(-1))
                comes = runs_in_common(size, source, target, count, other, rank)
                row = prod(tensor.shape[:dim]) * prod(tensor.shape[dim + 1 :])
                numbers += row * sum(length for _, _, length in comes)
            sent.append(torch.cat(pieces) if pieces else tensors[places[0]].new_empty(0))
            shapes.append((numbers,))
        received = group.all_to_all(sent, shapes)
        for index in places:
            source, target, size = ways[index]
            shape = list(tensors[index].shape)
            shape[source.dim] = local_size(size, target, count, rank)
            results[index] = tensors[index].new_zeros(shape)
        for other, flat in enumerate(received):
            first = 0
            for index in places:
                source, target, size = ways[index]
                result, dim = results[index], source.dim
                for _, at, length in runs_in_common(size, source, target, count, other, rank):
                    place = result.narrow(dim, at, length)
                    piece = flat[first : first + place.numel()].view(place.shape)
                    # Of what is not pending, each element comes once.
                    if source.pending:
                        place.add_(piece)
                    else:
                        place.copy_(piece)
                    first += place.numel()
        for index in places:
            target, size = targets[index], sizes[index]
            if target.pending:
                results[index] = keep_on_first(results[index], target, size, count, rank)
    return results


# A function that waits for several tensors that one collective brings, to be called once.
Results = Callable[[], list[torch.Tensor]]


def _by_type(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return the places of tensors of one element type, for every type in order of first
    appearance.
    """
    places: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        places.setdefault(tensor.dtype, []).append(index)
    return list(places.values())


def start_sum_together(tensors: Sequence[torch.Tensor], group: Group) -> Results:
    """Start adding up several tensors over the ranks, in one all-reduce per element type.

    tensors: the same shapes on every rank. Returns a function that waits for the sums. This is how
    a gradient bucket is reduced.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> start_sum_together([torch.ones(2), torch.zeros(1, 1)], SingleGroup())()
    [tensor([1., 1.]), tensor([[0.]])]
    """
    started = []
    for places in _by_type(tensors):
        flat = laid_end_to_end([tensors[index] for index in places])
        started.append((places, group.start_all_reduce_(flat)))
    shapes = [tensor.shape for tensor in tensors]

    def finish() -> list[torch.Tensor]:
        sums: dict[int, torch.Tensor] = {}
        for places, wait in started:
            parts = wait().split([shapes[index].numel() for index in places])
            for index, part in zip(places, parts, strict=True):
                sums[index] = part.view(shapes[index])
        return [sums[index] for index in range(len(shapes))]

    return finish


def start_reduce_scatter_together(
    tensors: Sequence[torch.Tensor], shards: Sequence[Shard], group: Group
) -> Results:
    """Start adding up several tensors over the ranks, of which this rank gets its parts, in one
    reduce-scatter per element type.

    tensors: whole, the same shapes on every rank. shards: how each is split. Returns a function
    that waits for the parts, which are contiguous.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> start_reduce_scatter_together([torch.ones(2)], [Shard(0)], SingleGroup())()
    [tensor([1., 1.])]
    """
    started = []
    lengths = [
        run_lengths(tensor.size(shard.dim), shard, group)
        for tensor, shard in zip(tensors, shards, strict=True)
    ]
    for places in _by_type(tensors):
        # Row r holds rank r's padded part of every tensor, so that one collective gives each rank
        # all of its parts.
        rows = [cut_rows(tensors[index], shards[index], group) for index in places]
        flat = torch.cat([parts.flatten(1) for parts in rows], 1)
        shapes = [parts.shape[1:] for parts in rows]
        started.append((places, shapes, group.start_reduce_scatter(flat)))

    def finish() -> list[torch.Tensor]:
        results: dict[int, torch.Tensor] = {}
        for places, shapes, wait in started:
            parts = wait().split([shape.numel() for shape in shapes])
            for index, shape, part in zip(places, shapes, parts, strict=True):
                longest, length = lengths[index][0], lengths[index][group.rank]
                unpadded = unpad_part(part.view(shape), shards[index], longest, length)
                results[index] = unpadded.contiguous()
        return [results[index] for index in range(len(lengths))]

    return finish


def gather_together(
    tensors: Sequence[torch.Tensor], shards: Sequence[Shard], sizes: Sequence[int], group: Group
) -> list[torch.Tensor]:
    """Return the wholes of several tensors of which each rank holds parts, in one all-gather per
    element type.

    tensors: this rank's parts. shards: how each is split. sizes: of each whole along its split dim.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> gather_together([torch.ones(2)], [Shard(0)], [2], SingleGroup())
    [tensor([1., 1.])]
    """
    wholes: list[torch.Tensor] = list(tensors)
    for places in _by_type(tensors):
        lengths = {index: run_lengths(sizes[index], shards[index], group) for index in places}
        padded = [
            pad_part(tensors[index], shards[index], lengths[index][0], lengths[index][group.rank])
            for index in places
        ]
        counts = [tensor.numel() for tensor in padded]
        rows = group.all_gather(torch.cat([tensor.reshape(-1) for tensor in padded]))
        for index, padded_part, part in zip(places, padded, rows.split(counts, dim=1), strict=True):
            parts = [row.view(padded_part.shape) for row in part.unbind(0)]
            wholes[index] = join_padded(parts, shards[index], lengths[index])
    return wholes
