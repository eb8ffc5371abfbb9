"""Kernels that split any op of a kind: look-ups, reductions that combine, means.

Each takes the op's own arguments, with local tensors, then `group`, the split loop's `size` in the
whole, the `operation` to run, and `where`: which operands (counted among the tensors that the op is
given) and dims it is about. That an op is of the kind is for the discovery of its rule to prove.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from autoparallel.graph.operators import operator_of
from autoparallel.placement import Invariant, Shard, part_bounds
from autoparallel.runtime.collectives import convert, pending_sum
from autoparallel.runtime.groups import Group
from autoparallel.runtime.stand_ins import shortened, silenced, some
from autoparallel.support.torch_private import assert_on_device

__all__ = ["combined_parts", "masked_lookup", "weighted_mean"]


def _tensors(structure: Any) -> Iterator[torch.Tensor]:
    if isinstance(structure, torch.Tensor):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from _tensors(item)


def _run(
    operation: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    others: Mapping[int, torch.Tensor],
) -> torch.Tensor:
    """The op, with other tensors at some places."""
    count = iter(range(len(list(_tensors((args, tuple(kwargs.values())))))))

    def actual(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return others.get(next(count), item)
        if isinstance(item, (list, tuple)):
            return [actual(part) for part in item]
        return item

    made: torch.Tensor = operator_of(operation)(
        *[actual(arg) for arg in args], **{key: actual(item) for key, item in kwargs.items()}
    )
    return made


def _standing_in(
    tensors: Sequence[torch.Tensor], split: Sequence[tuple[int, int]]
) -> dict[int, torch.Tensor]:
    """The operands of the op on a rank that has nothing, all of them standing in for others.

    split: operands and their dims that are split.
    """
    dims = [[dim for other, dim in split if other == index] for index in range(len(tensors))]
    return dict(enumerate(some(tensors, dims)))


def masked_lookup(
    *args: Any,
    group: Group,
    size: int,
    operation: str,
    where: tuple[int, int, int, tuple[int, ...]],
    **kwargs: Any,
) -> torch.Tensor:
    """A look-up in a table that is split: what is found here or zeros, a pending sum.

    where: the table's place among the operands, the index's, the table's split dim, and for each
    dim of the index the result's dim that it becomes. Raises IndexError for a place outside it.
    """
    table, index, dim, places = where
    tensors = list(_tensors((args, tuple(kwargs.values()))))
    asked = tensors[index]
    with torch.no_grad():
        inside = ((asked >= 0) & (asked < size)).all()
        if asked.is_cuda:
            assert_on_device(inside)
        elif asked.device.type != "meta" and not bool(inside):
            raise IndexError(f"{operation}: an index is not in [0, {size})")
        start, stop = part_bounds(size, group.world_size, group.rank)
        local = asked - start
        elsewhere = (local < 0) | (local >= stop - start)
        # What is not here is looked up at a place that is looked up anyway, so that what comes of
        # it (0 times a derivative) is finite where the unsplit op's is. Nothing at all may be here.
        anyway = local.masked_fill(elsewhere, 0).flatten()
        anyway = torch.cat([anyway, anyway.new_zeros(1)]).amax()
        local = torch.where(elsewhere, anyway, local)
        nothing = elsewhere.all()
    if stop == start:
        others = _standing_in(tensors, [(table, dim)])
    else:
        others = {at: silenced(tensor, nothing) for at, tensor in enumerate(tensors)}
    made = _run(operation, args, kwargs, {**others, index: local})
    order = sorted(range(len(places)), key=lambda i: places[i])
    shape = [1] * made.dim()
    for i in order:
        shape[places[i]] = elsewhere.size(i)
    mask = elsewhere.permute(order).reshape(shape)
    return pending_sum(made.masked_fill(mask, 0), group)


def combined_parts(
    *args: Any,
    group: Group,
    size: int,
    operation: str,
    where: tuple[int, int, tuple[int, ...]],
    **kwargs: Any,
) -> torch.Tensor:
    """A reduction of which the whole is the reduction of its parts' results, same on every rank.

    where: the operand, its split dim, and for each of its dims the result's dim that it becomes, -1
    for those that are reduced. All ranks' results are gathered and reduced once more.
    """
    operand, dim, kept = where
    tensors = list(_tensors((args, tuple(kwargs.values()))))
    bounds = [part_bounds(size, group.world_size, rank) for rank in range(group.world_size)]
    holders = sum(start < stop for start, stop in bounds)
    held = tensors[operand].size(dim) > 0
    made = _run(operation, args, kwargs, {} if held else _standing_in(tensors, [(operand, dim)]))
    shape = [made.size(place) if place >= 0 else 1 for place in kept]
    made = made.reshape(shape)
    if not held:
        made = shortened(made, [0], [{dim: 0}])
    parts = convert(made, group, Shard(dim), Invariant(), holders)
    return _run(operation, args, kwargs, {operand: parts})


def weighted_mean(
    *args: Any,
    group: Group,
    size: int,
    operation: str,
    where: tuple[tuple[int, int], ...],
    **kwargs: Any,
) -> torch.Tensor:
    """A mean over a split loop: each rank's own mean by its share of the whole, a pending sum.

    where: the operands and their dims that are split.
    """
    tensors = list(_tensors((args, tuple(kwargs.values()))))
    operand, dim = where[0]
    held = tensors[operand].size(dim)
    if not held:
        made = _run(operation, args, kwargs, _standing_in(tensors, where))
        return pending_sum(shortened(made, [0], [{}]), group)
    made = _run(operation, args, kwargs, {})
    return pending_sum(made * (held / size), group)
