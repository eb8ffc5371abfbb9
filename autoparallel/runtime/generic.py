"""Kernels that split any op of a kind: look-ups, reductions that combine, means.

Each takes the op's own arguments, with local tensors, then `group`, the split loop's `size` in the
whole, the `operation` to run, and `where`: which operands (counted among the tensors that the op is
given) and dims it is about. That an op is of the kind is for the discovery of its rule to prove.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from autoparallel.graph.operators import operator_of
from autoparallel.placement import Invariant, Shard, part_bounds
from autoparallel.runtime.collectives import convert, pending_sum
from autoparallel.runtime.groups import Group
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
    rows, asked = tensors[table], tensors[index]
    with torch.no_grad():
        inside = ((asked >= 0) & (asked < size)).all()
        if asked.is_cuda:
            assert_on_device(inside)
        elif asked.device.type != "meta" and not bool(inside):
            raise IndexError(f"{operation}: an index is not in [0, {size})")
        start, stop = part_bounds(size, group.world_size, group.rank)
        local = asked - start
        elsewhere = (local < 0) | (local >= stop - start)
        local = local.masked_fill(elsewhere, 0)
    if stop == start:
        shape = [1 if i == dim else length for i, length in enumerate(rows.shape)]
        rows = rows.new_zeros(shape) + rows.sum()
    made = _run(operation, args, kwargs, {table: rows, index: local})
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
    made = _run(operation, args, kwargs, {})
    shape = [made.size(place) if place >= 0 else 1 for place in kept]
    parts = convert(made.reshape(shape), group, Shard(dim), Invariant(), group.world_size)
    return _run(operation, args, kwargs, {operand: parts})


def weighted_mean(
    *args: Any,
    group: Group,
    size: int,
    operation: str,
    where: tuple[int, int],
    **kwargs: Any,
) -> torch.Tensor:
    """A mean over a split loop: each rank's own mean by its share of the whole, a pending sum.

    where: an operand and its split dim.
    """
    operand, dim = where
    held = list(_tensors((args, tuple(kwargs.values()))))[operand]
    made = _run(operation, args, kwargs, {})
    if held.size(dim) == 0:
        return pending_sum(torch.zeros_like(made) + held.sum().to(made.dtype), group)
    return pending_sum(made * (held.size(dim) / size), group)
