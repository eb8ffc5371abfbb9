"""Whole tensors and the parts of them that the ranks of a mesh of several axes hold.

Where two axes split the same dim, the outer one cuts first: parts are taken from the outermost axis
inwards, and put together from the innermost outwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from autoparallel.errors import PlanError
from autoparallel.placement import (
    Layout,
    Partial,
    Shard,
    block_runs,
    layout_text,
)
from autoparallel.runtime.axis_parts import join_parts, take_part

__all__ = [
    "join_layout",
    "layout_pieces",
    "require_refined",
    "take_layout_part",
]


def take_layout_part(
    tensor: torch.Tensor, layout: Layout, sizes: tuple[int, ...], coordinates: tuple[int, ...]
) -> torch.Tensor:
    """Return the part of a whole tensor that one rank of a mesh holds. It may be a view.

    layout: a placement per mesh axis, outermost first. sizes: of the axes. coordinates: the rank's
    place along each axis. A pending sum counts as whole: every rank gets all of it.

    >>> take_layout_part(torch.arange(8), (Shard(0), Shard(0)), (2, 2), (1, 0))
    tensor([4, 5])
    """
    for placement, size, rank in zip(layout, sizes, coordinates, strict=True):
        if isinstance(placement, Shard):
            tensor = take_part(tensor, placement, size, rank)
    return tensor


def join_layout(
    parts: Sequence[torch.Tensor], layout: Layout, sizes: tuple[int, ...]
) -> torch.Tensor:
    """Return the whole tensor of all ranks' parts, in the order of the ranks' numbers.

    layout, sizes: per mesh axis, outermost first. Pending sums are added; of equal copies the first
    counts. Inverse of `take_layout_part`.

    >>> parts = [torch.tensor([rank]) for rank in range(4)]
    >>> join_layout(parts, (Shard(0), Shard(0)), (2, 2))
    tensor([0, 1, 2, 3])
    >>> join_layout(parts, (Partial(), Shard(0)), (2, 2))
    tensor([2, 4])
    """
    # The last axis is innermost, so its ranks are neighbours in the list. Joining each run of them
    # leaves a list of the ranks of the outer axes.
    row = list(parts)
    for placement, size in reversed(list(zip(layout, sizes, strict=True))):
        lines = [row[at : at + size] for at in range(0, len(row), size)]
        if isinstance(placement, Shard):
            row = [join_parts(line, placement) for line in lines]
        elif isinstance(placement, Partial):
            row = [torch.stack(line).sum(0) for line in lines]
        else:
            row = [line[0] for line in lines]
    return row[0]


def layout_pieces(
    shape: torch.Size, layout: Layout, sizes: tuple[int, ...], coordinates: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return the rectangles of a whole tensor that one rank holds, none of them empty.

    Each is (its start in the whole, its start in the part, its lengths), a number per dim. layout,
    sizes, coordinates: as in `take_layout_part`. A split in blocks holds several rectangles.

    >>> layout_pieces(torch.Size([8]), (Shard(0, blocks=2),), (2,), (1,))
    [((2,), (0,), (2,)), ((6,), (2,), (2,))]
    """
    rows: list[list[tuple[int, int, int]]] = []
    for dim, size in enumerate(shape):
        runs = [(0, size)]
        for placement, count, rank in zip(layout, sizes, coordinates, strict=True):
            if isinstance(placement, Shard) and placement.dim == dim:
                runs = _cut(runs, placement, count, rank)
        row, local = [], 0
        for start, length in runs:
            row.append((start, local, length))
            local += length
        rows.append(row)
    return [
        (
            tuple(start for start, _, _ in piece),
            tuple(local for _, local, _ in piece),
            tuple(length for _, _, length in piece),
        )
        for piece in itertools.product(*rows)
    ]


def _cut(
    runs: list[tuple[int, int]], shard: Shard, world_size: int, rank: int
) -> list[tuple[int, int]]:
    """Return what one axis leaves of a dim: the runs (start in the whole, length) that this rank
    holds.

    runs: those that the outer axes left, which the cut sees laid end to end.
    """
    size = sum(length for _, length in runs)
    left: list[tuple[int, int]] = []
    for first, held in block_runs(size, shard, world_size, rank):
        low, high, local = first, first + held, 0
        # `local` is where the run begins among the runs laid end to end; what lies in [low, high)
        # of them is this rank's.
        for start, length in runs:
            begin, end = max(low, local), min(high, local + length)
            if begin < end:
                place = start + begin - local
                if left and sum(left[-1]) == place:
                    left[-1] = (left[-1][0], left[-1][1] + end - begin)
                else:
                    left.append((place, end - begin))
            local += length
    return left


def require_refined(coarse: Layout, fine: Layout, what: str) -> None:
    """Raise PlanError unless `fine` is `coarse` with more axes split, outer cuts first.

    what: the tensor, for the message. Each part that the optimizer updates must be a part of one
    that computes, so that gathering it needs no other exchange.

    >>> from autoparallel.placement import Invariant
    >>> require_refined((Invariant(), Invariant()), (Shard(0), Invariant()), "weight")
    """
    for axis, (coarse_placement, fine_placement) in enumerate(zip(coarse, fine, strict=True)):
        if coarse_placement == fine_placement:
            continue
        # A cut by this axis, outer than others of the same dim, would cut before them, and so
        # elsewhere.
        inner = [later for later in coarse[axis + 1 :] if isinstance(later, Shard)]
        if (
            isinstance(coarse_placement, Shard)
            or not isinstance(fine_placement, Shard)
            or fine_placement.dim in {s.dim for s in inner}
        ):
            raise PlanError(
                f"{what} cannot be {layout_text(fine)} where {layout_text(coarse)} computes",
                why="every part that is updated must be cut from one part that computes",
            )
