"""Ranks that hold nothing of a split value: there are more of them than the dim has elements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoparallel.placement import Layout, Shard, local_layout_size
from autoparallel.plan import Plan

__all__ = ["Idle", "idle_ranks"]


@dataclass(frozen=True)
class Idle:
    """The value of which most ranks hold nothing.

    value: its name, or the caller's of an input. dim, size: the dim that is split, and its size.
    ranks: how many hold nothing. planned: whether it is so at the sizes that were planned for, and
    not only at those given.
    """

    value: str
    dim: int
    size: int
    ranks: int
    planned: bool


def idle_ranks(plan: Plan) -> Idle | None:
    """Return the value of which most ranks hold nothing; None where all hold a part of each.

    The sizes are those that were planned for, or else those of the example inputs, which may be
    smaller. Values are those that are redistributed: a part is taken of every value that is split.

    >>> import autoparallel, torch
    >>> plan = autoparallel.make_plan(torch.nn.Linear(8, 8), 2, example_inputs=torch.ones(4, 8))
    >>> idle_ranks(plan) is None
    True
    """
    axes = tuple(size for _, size in plan.mesh.axes)
    paths = {item.name: item.path for item in plan.inputs}
    for planned in (True, False):
        sizes = {
            text: size
            for item in plan.inputs
            for text, size in zip(item.dims, item.planned if planned else item.given, strict=True)
        }
        found = [
            Idle(paths.get(row.value, row.value), dim, size, count, planned)
            for row in plan.conversions
            for layout in (row.source, row.target)
            for dim, size, count in _empty(row.shape, layout, sizes, axes)
        ]
        if found:
            return max(found, key=lambda idle: idle.ranks)
    return None


def _empty(
    shape: str, layout: Layout, sizes: Mapping[str, int], axes: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """Return each split dim of a shape of which some ranks hold nothing, its size, and how many.

    Dims whose size is computed from several others are not looked at.
    """
    found = []
    dims = [text.strip() for text in shape.split(",")]
    split = dict.fromkeys(part.dim for part in layout if isinstance(part, Shard))
    for dim in split:
        text = dims[dim] if dim < len(dims) else ""
        size = int(text) if text.isdigit() else sizes.get(text)
        if not size or size >= math.prod(axes):
            continue
        count = sum(
            local_layout_size(size, dim, layout, axes, place) == 0
            for place in itertools.product(*map(range, axes))
        )
        if count:
            found.append((dim, size, count))
    return found
