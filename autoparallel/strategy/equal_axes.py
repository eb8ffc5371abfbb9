"""Mesh axes of the same size on equal links are interchangeable: layouts that differ in their order
cost the same.

On four axes an op has thousands of joint strategies, and most of them are others of them with axes
exchanged. A network of one state for all of these is small. It takes for granted that neighbours
agree on the order wherever that saves something, so that its optimum is no dearer than that of the
whole: a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.links import Link
from autoparallel.placement import Invariant, Layout, Partial, Placement, Replicate, Shard
from autoparallel.strategy.parameter_storage import ParameterStorage

__all__ = ["AxisGroups", "arranged", "arranged_layout", "arranged_storage", "equal_axes",
           "placement_rank", "places_that_differ"]  # fmt: skip

# The axes of a mesh, each in one group; those of a group are interchangeable.
AxisGroups = tuple[tuple[int, ...], ...]
Part = TypeVar("Part")


def equal_axes(
    sizes: Sequence[int], links: Sequence[Link], in_time: Sequence[bool] = ()
) -> AxisGroups:
    """Return the groups of axes that have the same size and equal links.

    in_time: per axis, whether its places are micro-batches; they are no devices. Axes of one rank
    are left alone.

    >>> from autoparallel.cost.hardware import find_hardware
    >>> sizes = (2, 2, 2, 2)
    >>> equal_axes(sizes, find_hardware("dgx-a100").links(sizes))
    ((0,), (1, 2, 3))
    """
    groups: dict[Any, list[int]] = {}
    for axis, (size, link) in enumerate(zip(sizes, links, strict=True)):
        alone = size == 1 or (bool(in_time) and in_time[axis])
        groups.setdefault((axis,) if alone else (size, link), []).append(axis)
    return tuple(map(tuple, groups.values()))


def arranged(
    parts: Sequence[Part], groups: AxisGroups, rank: Callable[[Part], Any]
) -> tuple[Part, ...]:
    """Return what each axis has, sorted by rank within each group of axes.

    >>> arranged("dbca", ((0,), (1, 2, 3)), ord)
    ('d', 'a', 'b', 'c')
    """
    result = list(parts)
    for group in groups:
        if len(group) > 1:
            some = sorted((parts[axis] for axis in group), key=rank)
            for axis, part in zip(group, some, strict=True):
                result[axis] = part
    return tuple(result)


def placement_rank(placement: Placement) -> tuple[Any, ...]:
    """Return a key that sorts placements. I and R, which memory does not tell apart, are next to
    each other.
    """
    if not isinstance(placement, Shard):
        return ((Invariant, Replicate, Partial).index(type(placement)), 0, (), (), (), False)
    blocks, unit, repeat = (
        number if isinstance(number, tuple) else (number,)
        for number in (placement.blocks, placement.unit, placement.repeat)
    )
    return (3, placement.dim, blocks, unit, repeat, placement.pending)


def arranged_layout(layout: Layout, groups: AxisGroups) -> Layout:
    """Return the layout with the placements sorted within each group of axes.

    >>> arranged_layout((Shard(1), Shard(0), Invariant()), ((0, 1, 2),)) == (
    ...     (Invariant(), Shard(0), Shard(1))
    ... )
    True
    """
    return arranged(layout, groups, placement_rank)


def arranged_storage(stored: ParameterStorage, groups: AxisGroups) -> ParameterStorage:
    """Return the way to store a parameter with its axes sorted within each group, all three layouts
    alike.

    Example: `arranged_storage(ParameterStorage.as_used(layout), equal_axes(sizes, links))`
    """
    columns = zip(stored.storage, stored.gradient, stored.state, strict=True)
    rows = arranged(
        tuple(columns), groups, lambda column: tuple(placement_rank(one) for one in column)
    )
    storage, gradient, state = zip(*rows, strict=True)
    return ParameterStorage(storage, gradient, state)


def places_that_differ(
    ones: Sequence[Layout], twos: Sequence[Layout], groups: AxisGroups
) -> NDArray[np.intp]:
    """Return table[one, two]: on how many axes two layouts differ at least, in whatever order
    groups have theirs.

    >>> places_that_differ([(Shard(0), Shard(1))], [(Shard(1), Shard(2))], ((0, 1),))
    array([[1]])
    """
    numbers: dict[Placement, int] = {}
    for layout in (*ones, *twos):
        for placement in layout:
            numbers.setdefault(placement, len(numbers))
    table = np.zeros((len(ones), len(twos)), dtype=np.intp)
    for group in groups:
        counts = [np.zeros((len(numbers), len(some)), dtype=np.intp) for some in (ones, twos)]
        for count, some in zip(counts, (ones, twos), strict=True):
            for column, layout in enumerate(some):
                for axis in group:
                    count[numbers[layout[axis]], column] += 1
        # What one has more than the other, the other has more of something else.
        for first, second in zip(*counts, strict=True):
            table += np.maximum(first[:, None] - second[None], 0)
    return table
