"""Kernels that split any op of a kind: look-ups, reductions that combine, means, parts of results.

Each takes the op's own arguments, with this rank's tensors, then `group`, the whole `size` of the
loop that is split, the `operation` to run (its qualified name), and `where`, which says which
operands and dims the kernel is about. Operands are counted among the tensors that the op is given,
those in lists too. Discovery proves that an op is of the kind before it names one of these kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from autoparallel.graph.operators import operator_of
from autoparallel.placement import Invariant, Shard, part_bounds
from autoparallel.runtime.collectives import convert, pending_sum
from autoparallel.runtime.groups import Group
from autoparallel.runtime.split_indices import places_here
from autoparallel.runtime.stand_ins import silenced, stand_ins_for, without_stand_ins

__all__ = ["alike_elsewhere", "combined_parts", "masked_lookup", "weighted_mean"]


def _tensors(structure: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested lists and tuples, in order."""
    if isinstance(structure, torch.Tensor):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from _tensors(item)


def _operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an op is given, those in lists too: its operands, in order."""
    return list(_tensors((args, tuple(kwargs.values()))))


def _run(
    operation: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    others: Mapping[int, torch.Tensor],
) -> torch.Tensor:
    """Run the op on its arguments, with the tensors of `others` in the places that are its keys."""
    count = iter(range(len(_operands(args, kwargs))))

    def actual(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return others.get(next(count), item)
        if isinstance(item, (list, tuple)):
            return [actual(part) for part in item]
        return item

    result: torch.Tensor = operator_of(operation)(
        *[actual(arg) for arg in args], **{key: actual(item) for key, item in kwargs.items()}
    )
    return result


def _standing_in(
    tensors: Sequence[torch.Tensor], split: Sequence[tuple[int, int]]
) -> dict[int, torch.Tensor]:
    """Return stand-ins for all operands of the op, for a rank that holds nothing.

    split: pairs of an operand and a dim of it that is split.
    """
    dims = [[dim for other, dim in split if other == index] for index in range(len(tensors))]
    return dict(enumerate(stand_ins_for(tensors, dims)))


def alike_elsewhere(
    *args: Any, group: Group, size: int, operation: str, **kwargs: Any
) -> tuple[torch.Tensor, ...]:
    """Run an op on parts of a loop that some of its results do not have: those are alike on every
    rank, and no pending sums. The factors of a matrix, beside parts of the solutions, are so.
    """
    results: Any = _run(operation, args, kwargs, {})
    return tuple(results)


def masked_lookup(
    *args: Any,
    group: Group,
    size: int,
    operation: str,
    where: tuple[int, int, int, tuple[int, ...]],
    **kwargs: Any,
) -> torch.Tensor:
    """Look up in a table whose rows are split: elements of this rank's rows, zeros elsewhere; a
    pending sum.

    where: the table's place among the operands, the index's, the table's split dim, and for each
    dim of the index the dim of the result that it becomes. size: of the table's dim in the whole.
    The index is the same on every rank and counts from the start of the whole.
    Raises IndexError for an index outside of [0, size).
    """
    table, index, dim, places = where
    tensors = _operands(args, kwargs)
    index_tensor = tensors[index]
    with torch.no_grad():
        start, stop = part_bounds(size, group.world_size, group.rank)
        local, elsewhere = places_here(index_tensor, size, group, f"{operation}: index")
        # Elements of other ranks' rows are looked up at a place that is looked up anyway, so that
        # their result (0 times a derivative) is finite where the unsplit op's is. A zero is
        # appended for an index without elements, of which there is no maximum.
        somewhere = torch.cat([local.flatten(), local.new_zeros(1)]).amax()
        local = torch.where(elsewhere, somewhere, local)
        nothing = elsewhere.all()
    if stop == start:
        others = _standing_in(tensors, [(table, dim)])
    else:
        others = {at: silenced(tensor, nothing) for at, tensor in enumerate(tensors)}
    looked_up = _run(operation, args, kwargs, {**others, index: local})
    # The mask has the index's dims. It is brought to the order that they have in the result, with
    # size 1 in the result's other dims, so that it broadcasts.
    order = sorted(range(len(places)), key=lambda i: places[i])
    shape = [1] * looked_up.dim()
    for i in order:
        shape[places[i]] = elsewhere.size(i)
    mask = elsewhere.permute(order).reshape(shape)
    return pending_sum(looked_up.masked_fill(mask, 0), group)


def combined_parts(
    *args: Any,
    group: Group,
    size: int,
    operation: str,
    where: tuple[int, int, tuple[int, ...]],
    **kwargs: Any,
) -> torch.Tensor:
    """Reduce a split dim with an op that is the reduction of its parts' results, such as a maximum;
    the same on every rank.

    where: the operand, its split dim, and for each of its dims the dim of the result that it
    becomes, or -1 for a dim that is reduced. All ranks' results are gathered along the split dim
    and reduced once more.
    """
    operand, dim, result_dims = where
    tensors = _operands(args, kwargs)
    bounds = [part_bounds(size, group.world_size, rank) for rank in range(group.world_size)]
    holders = sum(start < stop for start, stop in bounds)
    held = tensors[operand].size(dim) > 0
    part_result = _run(
        operation, args, kwargs, {} if held else _standing_in(tensors, [(operand, dim)])
    )
    # The parts' results get the operand's dims back, the reduced ones with size 1, so that they can
    # be laid side by side and given to the op once more.
    shape = [part_result.size(place) if place >= 0 else 1 for place in result_dims]
    part_result = part_result.reshape(shape)
    # A rank without elements adds no row to those that are reduced, whatever its stand-in gave.
    if not held:
        part_result = without_stand_ins(part_result, [0], [{dim: 0}])
    parts = convert(part_result, group, Shard(dim), Invariant(), holders)
    return _run(operation, args, kwargs, {operand: parts})


def weighted_mean(
    *args: Any,
    group: Group,
    size: int,
    operation: str,
    where: tuple[tuple[int, int], ...],
    **kwargs: Any,
) -> torch.Tensor:
    """Take a mean over a split loop: each rank's own mean times its share of the whole, a pending
    sum.

    where: pairs of an operand and a dim of it that is split.
    """
    tensors = _operands(args, kwargs)
    operand, dim = where[0]
    held = tensors[operand].size(dim)
    if not held:
        mean = _run(operation, args, kwargs, _standing_in(tensors, where))
        return pending_sum(without_stand_ins(mean, [0], [{}]), group)
    mean = _run(operation, args, kwargs, {})
    # The parts may be unequal: sum_r (n_r / n) mean_r is the mean of the whole.
    return pending_sum(mean * (held / size), group)
