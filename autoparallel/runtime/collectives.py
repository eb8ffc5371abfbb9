"""Redistribution between placements, forward and backward by one rule.

Redistributing a value from A to B moves its gradient from gradient(B) to gradient(A), so that one
autograd function and one table of moves (`placement.movement`) are all the differentiable
collectives there are. Megatron's f is I -> R, its g is P -> I (arXiv:1909.08053). The gradient of a
gradient's placement is the placement itself, so the backward of a conversion is a conversion too,
and derivatives of any order follow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
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
    local_size,
    movement,
)
from autoparallel.runtime.axis_parts import (
    cut_rows,
    join_padded,
    join_parts,
    join_rows,
    keep_on_first,
    pad_part,
    put_part,
    run_lengths,
    runs_in_common,
    take_part,
    unpad_part,
)
from autoparallel.runtime.faults import place_of_caller
from autoparallel.runtime.groups import Group, Result

__all__ = [
    "common_sum",
    "convert",
    "convert_fixed",
    "exchange_together",
    "for_parts",
    "gather_together",
    "is_type_checked",
    "move",
    "pending_sum",
    "same_sum",
    "spmd_type",
    "start_move",
    "start_reduce_scatter_together",
    "start_sum_together",
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
    # No view for autograd, so that the part may be written to.
    return lambda: unpad_part(wait(), shard, lengths[0], lengths[group.rank]).detach()


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


class Convert(torch.autograd.Function):
    """The differentiable `move`: its backward is the move between the gradients' placements."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int
    ) -> torch.Tensor:
        """Move x, and remember the size along the split dim that the backward move starts from."""
        ctx.group, ctx.source, ctx.target = group, source, target
        if not torch.compiler.is_compiling():
            # Of `convert`'s caller, an emitted program: an error of the backward pass names its op.
            ctx.place = place_of_caller(2)
        # The backward move starts from gradient(target). Where that is split, x is whole along the
        # dim, except where the source splits the same dim: then the caller's size is the whole one.
        ctx.size = x.size(target.dim) if isinstance(target, Shard) else 0
        if isinstance(target, Shard) and isinstance(source, Shard) and source.dim == target.dim:
            ctx.size = size
        moved = move(x, group, source, target, size)
        # view_as may give dims of size 1 other strides, and torch's batch norm of a tensor with
        # such strides has a wrong gradient.
        return torch.ops.aten.alias(x) if moved is x else moved

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Move the gradient from gradient(target) to gradient(source).

        Where the gradient is to be differentiated in turn, the move is a conversion itself.
        """
        step = Convert.apply if torch.is_grad_enabled() else move
        back = step(grad, ctx.group, gradient(ctx.target), gradient(ctx.source), ctx.size)
        return back, None, None, None, None

    @staticmethod
    def spmd_typecheck(
        *, x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int
    ) -> Any:
        """Return the type of the result, for the checker of `spmd_types`; its arguments are
        `forward`'s.
        """
        from spmd_types import rules

        axis = group.process_group  # type: ignore[attr-defined]
        step = movement(source, target)
        source_type, target_type = spmd_type(source), spmd_type(target)
        if step is Movement.ALL_REDUCE:
            return rules.all_reduce(x, axis, src=source_type, dst=target_type)
        if step is Movement.ALL_GATHER:
            return rules.all_gather(x, axis, src=source_type, dst=target_type)
        if step is Movement.REDUCE_SCATTER:
            return rules.reduce_scatter(x, axis, src=source_type, dst=target_type)
        if step is Movement.ALL_TO_ALL:
            return rules.all_to_all(x, axis, src=source_type, dst=target_type)
        return rules.convert(x, axis, src=source_type, dst=target_type)


def spmd_type(placement: Placement) -> Any:
    """Return the name that `spmd_types` has for a placement: I, R, P, or S of the dim."""
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
    """Redistribute `x` from `source` to `target`; the backward pass brings its gradient back.
    Collective.

    x: of this rank, as `source` says it lies. size: of the whole along the source's split dim; it
    is not read for other sources. This is the differentiable `move`.

    Example: `convert(x, group, Shard(0), Replicate(), 12)` all-gathers a tensor that has 12 rows in
    all, and reduce-scatters the gradient.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> convert(torch.ones(2), SingleGroup(), Partial(), Invariant())
    tensor([1., 1.])
    """
    return Convert.apply(x, group, source, target, size)


def convert_fixed(
    x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> torch.Tensor:
    """Redistribute a tensor without a gradient, as `move` does, and tell the type checker of it.

    size: of the whole along the source's split dim; it is not read for other sources. The checker
    is `spmd_types`, and only where it is at work does this differ from `move`.
    """
    moved = move(x, group, source, target, size)
    checker = _type_checker()
    # Among moves without a gradient the checker cannot see that a slice makes the ranks differ.
    if checker is not None and movement(source, target) is Movement.SLICE:
        axis = group.process_group  # type: ignore[attr-defined]
        return checker.reinterpret(moved, axis, src=checker.R, dst=checker.V, expert_mode=True)
    return moved


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
        flat = torch.cat([tensors[index].reshape(-1) for index in places])
        started.append((places, group.start_all_reduce(flat)))
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


def _type_checker() -> Any:
    """Return the module `spmd_types` while it checks types, else None.

    It is looked up where it was imported by whoever checks, so that running needs no import of it.
    """
    checker = sys.modules.get("spmd_types")
    return checker if checker is not None and checker.is_type_checking() else None


def is_type_checked() -> bool:
    """Say whether `spmd_types` checks what runs now."""
    return _type_checker() is not None


def common_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the sum over ranks of a value that differs among them, for use by each rank on its
    own part: P -> R. Collective.

    It is differentiable where gradients are recorded, so that a backward pass that communicates can
    be differentiated in turn.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> common_sum(torch.ones(2), SingleGroup())
    tensor([1., 1.])
    """
    if torch.is_grad_enabled():
        return convert(x, group, Partial(), Replicate())
    return group.all_reduce(x)


def for_parts(grad: torch.Tensor, group: Group) -> torch.Tensor:
    """Return a gradient that all ranks hold alike, for use by each rank on its own part: I -> R.

    Nothing moves. In the derivative of the backward pass that uses it so, the ranks' shares are
    added up.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> for_parts(torch.ones(2), SingleGroup())
    tensor([1., 1.])
    """
    if torch.is_grad_enabled():
        return convert(grad, group, Invariant(), Replicate())
    return grad


def same_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the sum over ranks of a value that differs among them, the same on every rank.

    x: without a gradient, such as a count. The type checker, if one is at work, then knows that the
    result is the same on all ranks.
    """
    total = group.all_reduce(x)
    checker = _type_checker()
    if checker is not None:
        axis = group.process_group  # type: ignore[attr-defined]
        checker.mutate_type(total, axis, src=checker.V, dst=checker.R)
    return total


def pending_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return `x` itself, as this rank's term of a sum over the ranks: its placement is Partial.

    A kernel that splits a summed loop leaves such terms. The type checker, if one is at work, is
    told that the ranks' values are still to be added.
    """
    checker = _type_checker()
    if checker is not None:
        axis = group.process_group  # type: ignore[attr-defined]
        return checker.reinterpret(x, axis, src=checker.V, dst=checker.P)
    return x
