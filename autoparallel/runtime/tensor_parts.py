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
    Invariant,
    Layout,
    Partial,
    Shard,
    layout_text,
    local_layout_size,
    part_bounds,
)
from autoparallel.runtime.collectives import (
    gather_together,
    join_parts,
    reduce_scatter_together,
    sum_together,
    take_part,
)
from autoparallel.runtime.ranks import Ranks

__all__ = [
    "gathered",
    "join_layout",
    "layout_pieces",
    "reduced",
    "require_refined",
    "take_layout_part",
]


def take_layout_part(
    tensor: torch.Tensor, layout: Layout, sizes: tuple[int, ...], coordinates: tuple[int, ...]
) -> torch.Tensor:
    """What one rank of a mesh of `sizes` holds of a whole tensor. May be a view."""
    for placement, size, rank in zip(layout, sizes, coordinates, strict=True):
        if isinstance(placement, Shard):
            tensor = take_part(tensor, placement, size, rank)
    return tensor


def join_layout(
    parts: Sequence[torch.Tensor], layout: Layout, sizes: tuple[int, ...]
) -> torch.Tensor:
    """The whole tensor of all ranks' parts, in the order of their numbers."""
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
    """The rectangles of a whole tensor that one rank holds, none of them empty.

    Of each where it begins in the whole and in the part, and its lengths.
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
    """The runs (start in the whole, length) that are left of `runs`, laid end to end, by a cut."""
    block = sum(length for _, length in runs) // shard.blocks
    first, last = (edge * shard.unit for edge in part_bounds(block // shard.unit, world_size, rank))
    found: list[tuple[int, int]] = []
    for wanted in range(shard.blocks):
        low, high, local = wanted * block + first, wanted * block + last, 0
        for start, length in runs:
            begin, end = max(low, local), min(high, local + length)
            if begin < end:
                at = start + begin - local
                if found and sum(found[-1]) == at:
                    found[-1] = (found[-1][0], found[-1][1] + end - begin)
                else:
                    found.append((at, end - begin))
            local += length
    return found


def require_refined(coarse: Layout, fine: Layout, what: str) -> None:
    """Raise PlanError unless `fine` is `coarse` with more axes split, outer cuts first."""
    for axis, (one, two) in enumerate(zip(coarse, fine, strict=True)):
        if one == two:
            continue
        inner = [later for later in coarse[axis + 1 :] if isinstance(later, Shard)]
        if (
            isinstance(one, Shard)
            or not isinstance(two, Shard)
            or two.dim in {s.dim for s in inner}
        ):
            raise PlanError(
                f"{what} cannot be {layout_text(fine)} where {layout_text(coarse)} computes",
                why="every part that is updated must be cut from one part that computes",
            )


def gathered(
    parts: Sequence[torch.Tensor],
    fine: Sequence[Layout],
    coarse: Sequence[Layout],
    shapes: Sequence[tuple[int, ...]],
    ranks: Ranks,
) -> list[torch.Tensor]:
    """Parts that lie as `fine`, gathered on the axes where `coarse` is not split. Collective.

    shapes: of the wholes. One all-gather per axis and type of element.
    """
    made = list(parts)
    for axis in reversed(range(len(ranks.sizes))):
        which, shards, sizes = [], [], []
        for index, (have, want) in enumerate(zip(fine, coarse, strict=True)):
            cut = have[axis]
            if isinstance(cut, Shard) and want[axis] != cut:
                which.append(index)
                shards.append(cut)
                outer = (*have[:axis], *(Invariant(),) * (len(have) - axis))
                size = shapes[index][cut.dim]
                sizes.append(
                    local_layout_size(size, cut.dim, outer, ranks.sizes, ranks.coordinates)
                )
        if which:
            own = [made[index] for index in which]
            wholes = gather_together(own, shards, sizes, ranks.groups[axis])
            for index, whole in zip(which, wholes, strict=True):
                made[index] = whole
    return made


def reduced(
    tensors: Sequence[torch.Tensor],
    given: Sequence[Layout],
    wanted: Sequence[Layout],
    ranks: Ranks,
) -> list[torch.Tensor]:
    """Gradients that lie as `given`, brought to lie as `wanted`. Collective.

    Per axis: a pending sum is added up, and cut where it is to be split; what is whole is cut. One
    reduce-scatter and one all-reduce per axis and type of element; those are last, on what is left.
    """
    made = list(tensors)
    for axis, group in enumerate(ranks.groups):
        which, shards = [], []
        for index, (have, want) in enumerate(zip(given, wanted, strict=True)):
            cut = want[axis]
            if have[axis] == cut or not isinstance(cut, Shard):
                continue
            if isinstance(have[axis], Partial):
                which.append(index)
                shards.append(cut)
            else:
                part = take_part(made[index], cut, group.world_size, group.rank)
                made[index] = part.clone(memory_format=torch.contiguous_format)
        own = [made[index] for index in which]
        parts = reduce_scatter_together(own, shards, group) if which else []
        for index, part in zip(which, parts, strict=True):
            made[index] = part
    for axis, group in enumerate(ranks.groups):
        which = [
            index
            for index, (have, want) in enumerate(zip(given, wanted, strict=True))
            if isinstance(have[axis], Partial) and not isinstance(want[axis], (Partial, Shard))
        ]
        sums = sum_together([made[index] for index in which], group) if which else []
        for index, total in zip(which, sums, strict=True):
            made[index] = total
    return made
