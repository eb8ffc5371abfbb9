"""The size of a rank's part of a tensor: its shape, and its share of the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from autoparallel.graph.graph import Dim, hint
from autoparallel.placement import Layout, Placement, Shard, local_layout_size, local_size

__all__ = ["exact_fraction", "layout_fraction", "local_shape", "placement_fraction"]


def local_shape(
    shape: tuple[int, ...], layout: Layout, sizes: tuple[int, ...], without: int = -1
) -> tuple[int, ...]:
    """Return the shape of the part that the rank with the largest part holds.

    shape: of the whole tensor. layout: a placement per mesh axis. sizes: the mesh axes' sizes.
    without: the number of an axis whose split is not counted; -1 for none.

    >>> local_shape((6, 8), (Shard(0), Shard(1)), (2, 4))
    (3, 2)
    """
    # An axis of size 1 splits nothing, which is how one is left out.
    counted = tuple(1 if axis == without else size for axis, size in enumerate(sizes))
    return tuple(local_layout_size(size, dim, layout, counted) for dim, size in enumerate(shape))


def layout_fraction(shape: Sequence[Dim], layout: Layout, sizes: tuple[int, ...]) -> float:
    """Return the share of a tensor's bytes that the rank with the largest part holds.

    shape: of the whole tensor; symbolic sizes count as for the example inputs. layout: a placement
    per mesh axis. sizes: the mesh axes' sizes. Each axis is counted by itself, so that the shares
    of a layout's axes can be multiplied.

    >>> layout_fraction((6, 8), (Shard(0), Shard(1)), (2, 4))
    0.125
    """
    share = 1.0
    for placement, count in zip(layout, sizes, strict=True):
        share *= placement_fraction(shape, placement, count)
    return share


def placement_fraction(shape: Sequence[Dim], placement: Placement, count: int) -> float:
    """Return the share of a tensor's bytes that the largest part on
    one mesh axis of `count` ranks holds.

    1 for every placement but Shard, and for a dim without elements.

    >>> placement_fraction((5,), Shard(0), 2)
    0.6
    """
    if not isinstance(placement, Shard):
        return 1.0
    size = hint(shape[placement.dim])
    return local_size(size, placement, count) / size if size else 1.0


@lru_cache(maxsize=1 << 14)
def exact_fraction(
    shape: tuple[int | None, ...], layout: Layout, sizes: tuple[int, ...]
) -> Fraction:
    """Return the largest rank's share of a tensor as an exact fraction,
    with the axes that cut one dim counted together.

    shape: None for a dim whose size is not known; its parts are taken to be equal. layout: a
    placement per mesh axis. sizes: the mesh axes' sizes.

    >>> exact_fraction((5,), (Shard(0), Shard(0)), (2, 2))
    Fraction(2, 5)
    """
    share = Fraction(1)
    for dim in dict.fromkeys(p.dim for p in layout if isinstance(p, Shard)):
        size = shape[dim]
        if size is not None:
            # Counted together because rounding up twice is more than rounding up once would be.
            share *= Fraction(local_layout_size(size, dim, layout, sizes), size)
            continue
        for axis, placement in enumerate(layout):
            if isinstance(placement, Shard) and placement.dim == dim:
                share /= sizes[axis]
    return share
