"""Conversions between placements, forward and backward by one rule.

Converting a value from A to B moves its gradient from gradient(B) to gradient(A), so one
autograd function and one table of moves are all the differentiable collectives there are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from autoparallel.placement import (
    Invariant,
    Movement,
    Partial,
    Placement,
    Replicate,
    Shard,
    gradient,
    movement,
    part_bounds,
)
from autoparallel.runtime.groups import Group

__all__ = [
    "convert",
    "convert_fixed",
    "gather_together",
    "join_parts",
    "move",
    "pending_sum",
    "reduce_scatter_together",
    "same_sum",
    "spmd_type",
    "sum_together",
    "take_part",
]


def _run_length(size: int, shard: Shard, world_size: int, rank: int) -> tuple[int, int]:
    """Start and length of a rank's run of elements inside each block."""
    start, stop = part_bounds(size // (shard.blocks * shard.unit), world_size, rank)
    return start * shard.unit, (stop - start) * shard.unit


def take_part(tensor: torch.Tensor, shard: Shard, world_size: int, rank: int) -> torch.Tensor:
    """The part of a whole tensor that `rank` holds under `shard`."""
    size = tensor.size(shard.dim)
    start, length = _run_length(size, shard, world_size, rank)
    if shard.blocks == 1:
        return tensor.narrow(shard.dim, start, length)
    blocks = tensor.unflatten(shard.dim, (shard.blocks, size // shard.blocks))
    return blocks.narrow(shard.dim + 1, start, length).flatten(shard.dim, shard.dim + 1)


def join_parts(parts: list[torch.Tensor], shard: Shard) -> torch.Tensor:
    """The whole tensor of all ranks' parts. Inverse of `take_part`."""
    if shard.blocks == 1:
        return torch.cat(parts, shard.dim)
    blocks = [
        part.unflatten(shard.dim, (shard.blocks, part.size(shard.dim) // shard.blocks))
        for part in parts
    ]
    return torch.cat(blocks, shard.dim + 1).flatten(shard.dim, shard.dim + 1)


def _padded(part: torch.Tensor, shard: Shard, longest: int, length: int) -> torch.Tensor:
    """A part with every block's run padded with zeros to the longest rank's."""
    if length == longest:
        return part
    shape = list(part.shape)
    shape[shard.dim : shard.dim + 1] = [shard.blocks, longest]
    padded = part.new_zeros(shape)
    blocks = part.unflatten(shard.dim, (shard.blocks, length))
    padded.narrow(shard.dim + 1, 0, length).copy_(blocks)
    return padded.flatten(shard.dim, shard.dim + 1)


def _unpadded(part: torch.Tensor, shard: Shard, longest: int, length: int) -> torch.Tensor:
    if length == longest:
        return part
    blocks = part.unflatten(shard.dim, (shard.blocks, longest))
    return blocks.narrow(shard.dim + 1, 0, length).flatten(shard.dim, shard.dim + 1)


def _lengths(size: int, shard: Shard, group: Group) -> list[int]:
    """Of every rank's run of elements inside each block; the first is the longest."""
    return [_run_length(size, shard, group.world_size, r)[1] for r in range(group.world_size)]


def _all_gather(tensor: torch.Tensor, shard: Shard, size: int, group: Group) -> torch.Tensor:
    lengths = _lengths(size, shard, group)
    rows = group.all_gather(_padded(tensor, shard, lengths[0], lengths[group.rank])).unbind(0)
    return _whole_of_rows(rows, shard, lengths)


def _whole_of_rows(rows: Sequence[torch.Tensor], shard: Shard, lengths: list[int]) -> torch.Tensor:
    """The whole of all ranks' padded parts."""
    parts = [
        _unpadded(row, shard, lengths[0], length) for row, length in zip(rows, lengths, strict=True)
    ]
    return join_parts(parts, shard)


def _rows_to_scatter(tensor: torch.Tensor, shard: Shard, group: Group) -> list[torch.Tensor]:
    """Every rank's part of a whole tensor, padded to the longest."""
    lengths = _lengths(tensor.size(shard.dim), shard, group)
    return [
        _padded(take_part(tensor, shard, group.world_size, r), shard, lengths[0], length)
        for r, length in enumerate(lengths)
    ]


def _reduce_scatter(tensor: torch.Tensor, shard: Shard, group: Group) -> torch.Tensor:
    lengths = _lengths(tensor.size(shard.dim), shard, group)
    rows = torch.stack(_rows_to_scatter(tensor, shard, group))
    return _unpadded(group.reduce_scatter(rows), shard, lengths[0], lengths[group.rank])


def _indices(size: int, shard: Shard, world_size: int, rank: int) -> torch.Tensor:
    """Places along the whole dim that a rank holds, in the order in which it holds them."""
    return take_part(torch.arange(size), Shard(0, shard.blocks, shard.unit), world_size, rank)


def _all_to_all(
    tensor: torch.Tensor, source: Shard, target: Shard, size: int, group: Group
) -> torch.Tensor:
    count = group.world_size
    if source.dim != target.dim:
        sent = [take_part(tensor, target, count, r).contiguous() for r in range(count)]
        shapes = []
        for r in range(count):
            shape = list(sent[group.rank].shape)
            shape[source.dim] = source.blocks * _run_length(size, source, count, r)[1]
            shapes.append(tuple(shape))
        return join_parts(group.all_to_all(sent, shapes), source)
    dim = source.dim
    have = [_indices(size, source, count, r) for r in range(count)]
    want = [_indices(size, target, count, r) for r in range(count)]
    mine, needed = have[group.rank], want[group.rank]
    sent = [
        tensor.index_select(dim, torch.isin(mine, want[r]).nonzero()[:, 0].to(tensor.device))
        for r in range(count)
    ]
    places = [torch.isin(needed, have[r]).nonzero()[:, 0] for r in range(count)]
    shapes = []
    for r in range(count):
        shape = list(tensor.shape)
        shape[dim] = len(places[r])
        shapes.append(tuple(shape))
    received = group.all_to_all(sent, shapes)
    shape = list(tensor.shape)
    shape[dim] = len(needed)
    result = tensor.new_empty(shape)
    for place, part in zip(places, received, strict=True):
        result.index_copy_(dim, place.to(tensor.device), part)
    return result


def move(
    tensor: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> torch.Tensor:
    """Bring a tensor from `source` to `target`, not differentiably.

    size: of the whole along the source's split dim; not read for other sources.
    """
    step = movement(source, target)
    if step is Movement.NONE:
        return tensor
    if step is Movement.ALL_REDUCE:
        return group.all_reduce(tensor)
    if step is Movement.KEEP_ON_FIRST:
        return tensor if group.rank == 0 else torch.zeros_like(tensor)
    if step is Movement.SLICE:
        assert isinstance(target, Shard)
        # A copy: a view would keep the whole in memory.
        part = take_part(tensor, target, group.world_size, group.rank)
        return part.clone(memory_format=torch.contiguous_format)
    if step is Movement.REDUCE_SCATTER:
        assert isinstance(target, Shard)
        return _reduce_scatter(tensor, target, group)
    assert isinstance(source, Shard)
    if step is Movement.ALL_GATHER:
        return _all_gather(tensor, source, size, group)
    if step is Movement.ALL_TO_ALL:
        assert isinstance(target, Shard)
        return _all_to_all(tensor, source, target, size, group)
    return _pad(tensor, source, size, group)


def _pad(tensor: torch.Tensor, shard: Shard, size: int, group: Group) -> torch.Tensor:
    """Zeros in the whole shape, with this rank's part in its place."""
    shape = list(tensor.shape)
    shape[shard.dim : shard.dim + 1] = [shard.blocks, size // shard.blocks]
    whole = tensor.new_zeros(shape)
    start, length = _run_length(size, shard, group.world_size, group.rank)
    own = tensor.unflatten(shard.dim, (shard.blocks, length))
    whole.narrow(shard.dim + 1, start, length).copy_(own)
    return whole.flatten(shard.dim, shard.dim + 1)


class Convert(torch.autograd.Function):
    """The differentiable move."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int
    ) -> torch.Tensor:
        ctx.group, ctx.source, ctx.target = group, source, target
        ctx.size = x.size(target.dim) if isinstance(target, Shard) else 0
        if isinstance(target, Shard) and isinstance(source, Shard) and source.dim == target.dim:
            ctx.size = size
        moved = move(x, group, source, target, size)
        # view_as may give dims of size 1 other strides, and torch's batch norm of a tensor with
        # such strides has a wrong gradient.
        return torch.ops.aten.alias(x) if moved is x else moved

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        back = move(grad, ctx.group, gradient(ctx.target), gradient(ctx.source), ctx.size)
        return back, None, None, None, None

    @staticmethod
    def spmd_typecheck(
        *, x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int
    ) -> Any:
        """The type of the result, for the checker of `spmd_types`."""
        from spmd_types import rules

        axis = group.process_group  # type: ignore[attr-defined]
        step = movement(source, target)
        one, two = spmd_type(source), spmd_type(target)
        if step is Movement.ALL_REDUCE:
            return rules.all_reduce(x, axis, src=one, dst=two)
        if step is Movement.ALL_GATHER:
            return rules.all_gather(x, axis, src=one, dst=two)
        if step is Movement.REDUCE_SCATTER:
            return rules.reduce_scatter(x, axis, src=one, dst=two)
        if step is Movement.ALL_TO_ALL:
            return rules.all_to_all(x, axis, src=one, dst=two)
        return rules.convert(x, axis, src=one, dst=two)


def spmd_type(placement: Placement) -> Any:
    """The name that `spmd_types` has for a placement."""
    import spmd_types

    if isinstance(placement, Shard):
        return spmd_types.S(placement.dim)
    letters: dict[type, Any] = {
        Invariant: spmd_types.I,
        Replicate: spmd_types.R,
        Partial: spmd_types.P,
    }
    return letters[type(placement)]


def convert(
    x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> torch.Tensor:
    """Bring `x` from `source` to `target`, and its gradient back.

    size: of the whole along the source's split dim; not read for other sources.
    """
    return Convert.apply(x, group, source, target, size)


def convert_fixed(
    x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> torch.Tensor:
    """`convert` of a tensor without a gradient. Tells the type checker, if one is at work."""
    made = move(x, group, source, target, size)
    checker = sys.modules.get("spmd_types")
    cut = movement(source, target) is Movement.SLICE
    if cut and checker is not None and checker.is_type_checking():
        axis = group.process_group  # type: ignore[attr-defined]
        return checker.reinterpret(made, axis, src=checker.R, dst=checker.V, expert_mode=True)
    return made


def _by_type(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Places of tensors of one type of element, for every type."""
    found: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        found.setdefault(tensor.dtype, []).append(index)
    return list(found.values())


def sum_together(tensors: Sequence[torch.Tensor], group: Group) -> list[torch.Tensor]:
    """The sums over ranks, in one all-reduce per type of element."""
    sums: list[torch.Tensor] = list(tensors)
    for places in _by_type(tensors):
        flat = torch.cat([tensors[index].reshape(-1) for index in places])
        parts = group.all_reduce(flat).split([tensors[index].numel() for index in places])
        for index, part in zip(places, parts, strict=True):
            sums[index] = part.view(tensors[index].shape)
    return sums


def reduce_scatter_together(
    tensors: Sequence[torch.Tensor], shards: Sequence[Shard], group: Group
) -> list[torch.Tensor]:
    """This rank's parts of the sums over ranks, in one reduce-scatter per type of element."""
    made: list[torch.Tensor] = list(tensors)
    for places in _by_type(tensors):
        rows = [_rows_to_scatter(tensors[index], shards[index], group) for index in places]
        flat = torch.stack(
            [torch.cat([own[r].reshape(-1) for own in rows]) for r in range(group.world_size)]
        )
        parts = group.reduce_scatter(flat).split([own[0].numel() for own in rows])
        for index, own, part in zip(places, rows, parts, strict=True):
            shard = shards[index]
            lengths = _lengths(tensors[index].size(shard.dim), shard, group)
            padded = part.view(own[0].shape)
            made[index] = _unpadded(padded, shard, lengths[0], lengths[group.rank]).contiguous()
    return made


def gather_together(
    tensors: Sequence[torch.Tensor], shards: Sequence[Shard], sizes: Sequence[int], group: Group
) -> list[torch.Tensor]:
    """The wholes of which each rank holds parts, in one all-gather per type of element.

    sizes: of each whole along its split dim.
    """
    made: list[torch.Tensor] = list(tensors)
    for places in _by_type(tensors):
        lengths = {index: _lengths(sizes[index], shards[index], group) for index in places}
        padded = [
            _padded(tensors[index], shards[index], lengths[index][0], lengths[index][group.rank])
            for index in places
        ]
        counts = [tensor.numel() for tensor in padded]
        rows = group.all_gather(torch.cat([tensor.reshape(-1) for tensor in padded]))
        for index, own, part in zip(places, padded, rows.split(counts, dim=1), strict=True):
            parts = [row.view(own.shape) for row in part.unbind(0)]
            made[index] = _whole_of_rows(parts, shards[index], lengths[index])
    return made


def same_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over ranks of what differs among them, which the type checker then knows to be the
    same on all."""
    total = group.all_reduce(x)
    checker = sys.modules.get("spmd_types")
    if checker is not None and checker.is_type_checking():
        axis = group.process_group  # type: ignore[attr-defined]
        checker.mutate_type(total, axis, src=checker.V, dst=checker.R)
    return total


def pending_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """`x` itself. Tells the type checker, if one is at work, that the ranks' values are to be
    added: that is what the split of a summed loop leaves."""
    checker = sys.modules.get("spmd_types")
    if checker is not None and checker.is_type_checking():
        axis = group.process_group  # type: ignore[attr-defined]
        return checker.reinterpret(x, axis, src=checker.V, dst=checker.P)
    return x
