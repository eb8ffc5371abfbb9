"""Moves between placements, not differentiably: what a rank sends, and what it makes of what comes.

Where the split dim lies outermost in memory and divides by the ranks, what is sent and what comes
lie as the collective has them, and nothing is copied.
"""

from __future__ import annotations

import torch

from autoparallel.placement import (
    Invariant,
    Movement,
    Placement,
    Shard,
    local_size,
    movement,
)
from autoparallel.runtime.axis_parts import (
    cut_rows,
    join_parts,
    join_rows,
    keep_on_first,
    pad_part,
    put_part,
    run_lengths,
    take_part,
    unpad_part,
)
from autoparallel.runtime.groups import Group, Result
from autoparallel.runtime.joint_collectives import (
    exchange_together,
)

__all__ = [
    "move",
    "start_move",
]


def _is_even(size: int, shard: Shard, group: Group) -> bool:
    """Return whether all ranks hold equally long parts of a dim that is one block."""
    assert isinstance(shard.unit, int)
    return size % (group.world_size * shard.unit) == 0


def _start_all_gather(tensor: torch.Tensor, shard: Shard, size: int, group: Group) -> Result:
    """Start gathering the whole tensor of which this rank holds a part. size: of the whole along
    the split dim.
    """
    if shard.outermost and _is_even(size, shard, group):
        part = tensor.movedim(shard.dim, 0).contiguous()
        wait = group.start_all_gather(part)
        shape = (size, *part.shape[1:])
        # No view for autograd, so that the whole may be written to.
        return lambda: wait().view(shape).movedim(0, shard.dim).detach()
    lengths = run_lengths(size, shard, group)
    wait = group.start_all_gather(pad_part(tensor, shard, lengths[0], lengths[group.rank]))
    return lambda: join_rows(wait(), shard, lengths)


def _start_reduce_scatter(tensor: torch.Tensor, shard: Shard, group: Group) -> Result:
    """Start adding up the ranks' whole tensors, of which this rank gets its part."""
    if shard.outermost and _is_even(tensor.size(shard.dim), shard, group):
        whole = tensor.movedim(shard.dim, 0).contiguous()
        each = whole.size(0) // group.world_size
        wait = group.start_reduce_scatter(whole.view(group.world_size, each, *whole.shape[1:]))
        return lambda: wait().movedim(0, shard.dim).detach()
    lengths = run_lengths(tensor.size(shard.dim), shard, group)
    wait = group.start_reduce_scatter(cut_rows(tensor, shard, group))

    def own_part() -> torch.Tensor:
        """Return this rank's part. It is no view for autograd, so that it may be written to."""
        row = wait()
        part = unpad_part(row, shard, lengths[0], lengths[group.rank])
        # Without its padding a part has gaps, or lies in memory that is larger than it. An op may
        # then keep a copy, and not the part itself, on this rank and on no other.
        return (part if part is row else part.clone(memory_format=torch.contiguous_format)).detach()

    return own_part


def _all_to_all(
    tensor: torch.Tensor, source: Shard, target: Shard, size: int, group: Group
) -> torch.Tensor:
    """Return the part under `target` of a tensor of which each rank holds the part under `source`.

    size: of the whole along the source's split dim.
    """
    count = group.world_size
    if source.dim == target.dim:
        (result,) = exchange_together([tensor], [source], [target], [size], group)
        return result
    # Another dim is split: cut what is here along the target's dim, and join along the source's.
    sent = [take_part(tensor, target, count, r).contiguous() for r in range(count)]
    shapes = []
    for r in range(count):
        shape = list(sent[group.rank].shape)
        shape[source.dim] = local_size(size, source, count, r)
        shapes.append(tuple(shape))
    result = join_parts(group.all_to_all(sent, shapes), source)
    if target.pending:
        return keep_on_first(result, target, tensor.size(target.dim), count, group.rank)
    return result


# The moves that `start_move` makes in two halves.
_STARTED = (Movement.ALL_REDUCE, Movement.ALL_GATHER, Movement.REDUCE_SCATTER)


def move(
    tensor: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> torch.Tensor:
    """Bring a tensor from `source` to `target`, not differentiably. Collective.

    tensor: of this rank, as `source` says it lies. size: of the whole along the source's split dim;
    it is not read for other sources. The result may be `tensor` itself, but never a view of it.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> move(torch.ones(2), SingleGroup(), Invariant(), Shard(0))
    tensor([1., 1.])
    """
    step = movement(source, target)
    if step is Movement.NONE or (step.collective is not None and group.world_size == 1):
        return tensor
    if step in _STARTED:
        return start_move(tensor, group, source, target, size)()
    count, rank = group.world_size, group.rank
    if step is Movement.KEEP_ON_FIRST:
        if isinstance(source, Shard):
            return keep_on_first(tensor, source, size, count, rank)
        return tensor if rank == 0 else torch.zeros_like(tensor)
    if step is Movement.SLICE:
        assert isinstance(target, Shard)
        # The part is copied, because a view would keep the whole in memory.
        part = take_part(tensor, target, count, rank)
        if target.pending:
            return keep_on_first(part, target, tensor.size(target.dim), count, rank)
        if target.outermost:
            moved = part.movedim(target.dim, 0).clone(memory_format=torch.contiguous_format)
            return moved.movedim(0, target.dim).detach()
        return part.clone(memory_format=torch.contiguous_format)
    assert isinstance(source, Shard)
    if step is Movement.ALL_TO_ALL:
        assert isinstance(target, Shard)
        return _all_to_all(tensor, source, target, size, group)
    return _pad(tensor, source, size, group)


def start_move(
    tensor: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> Result:
    """Start `move`, and return a function that waits for its result. Collective.

    The arguments are those of `move`. The tensor must not be written to until the result came. What
    is no sum and no gather is done at once.

    >>> from autoparallel.placement import Partial
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> start_move(torch.ones(2), SingleGroup(), Partial(), Invariant())()
    tensor([1., 1.])
    """
    step = movement(source, target)
    if group.world_size > 1:
        if step is Movement.ALL_REDUCE:
            if isinstance(source, Shard):  # pending among the ranks that share a part
                return group.start_all_reduce(_pad(tensor, source, size, group))
            total = group.start_all_reduce(tensor)
            if isinstance(target, Shard):
                return lambda: move(total(), group, Invariant(), target)
            return total
        if step is Movement.REDUCE_SCATTER:
            assert isinstance(target, Shard)
            return _start_reduce_scatter(tensor, target, group)
        if step is Movement.ALL_GATHER:
            assert isinstance(source, Shard)
            return _start_all_gather(tensor, source, size, group)
    moved = move(tensor, group, source, target, size)
    return lambda: moved


def _pad(tensor: torch.Tensor, shard: Shard, size: int, group: Group) -> torch.Tensor:
    """Return zeros in the whole shape, with this rank's part in its place: S -> P without a
    collective.
    """
    shape = list(tensor.shape)
    shape[shard.dim] = size
    whole = tensor.new_zeros(shape)
    put_part(whole, tensor, shard, group.world_size, group.rank)
    return whole
