"""Layouts in the words of torch's DTensor, which has fewer of them.

DTensor cuts a dim as torch.chunk does. It has a private placement for a dim that is laid out in
blocks, each cut by itself. A layout that it has no words for is not kept by a parameter
(`plan/kept_layouts.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as DTensorReplicate
from torch.distributed.tensor import Shard as DTensorShard

from autoparallel.placement import Invariant, Layout, Placement, Shard
from autoparallel.support.torch_private import strided_shard, strided_split_factor

__all__ = ["distributed_placements", "layout_in_blocks", "layout_of"]


def distributed_placements(layout: Layout, sizes: Sequence[int]) -> list[Any]:
    """Return the layout as DTensor's placements. sizes: of the mesh axes.

    Our blocks of a dim are counted in the part that the outer axes' cuts leave; DTensor's
    _StridedShard counts them in the whole dim, and so once for each outer part.
    """
    placements: list[Any] = []
    # The number of parts into which axes so far have cut each dim.
    parts_of_dim: dict[int, int] = {}
    for axis, cut in enumerate(layout):
        if not isinstance(cut, Shard):
            placements.append(DTensorReplicate())
            continue
        outer = parts_of_dim.get(cut.dim, 1)
        parts_of_dim[cut.dim] = outer * sizes[axis]
        if cut.blocks != 1:
            assert isinstance(cut.blocks, int)
            placements.append(strided_shard(cut.dim, cut.blocks * outer))
        else:
            placements.append(DTensorShard(cut.dim))
    return placements


def layout_of(tensor: DTensor) -> Layout | None:
    """Return the layout of a DTensor; None where its placements stand for an order of axes.

    Inverse of `distributed_placements`. DTensor's placement of a dim in blocks also stands for the
    order in which mesh axes cut a dim, where an axis that cuts later is outer. The innermost cut is
    then a plain one.
    """
    layout: list[Placement] = []
    parts_of_dim: dict[int, int] = {}
    cuts: dict[int, list[bool]] = defaultdict(list)
    for axis, placement in enumerate(tensor.placements):
        factor = strided_split_factor(placement)
        if factor is None and not isinstance(placement, DTensorShard):
            layout.append(Invariant())
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]
        outer = parts_of_dim.get(dim, 1)
        parts_of_dim[dim] = outer * tensor.device_mesh.size(axis)
        cuts[dim].append(factor is not None)
        if factor is not None and factor % outer:
            return None
        layout.append(Shard(dim, 1 if factor is None else factor // outer))
    orders = any(any(in_blocks) and not in_blocks[-1] for in_blocks in cuts.values())
    return None if orders else tuple(layout)


def layout_in_blocks(tensor: DTensor) -> Layout | None:
    """Return the layout of a DTensor that has dims in blocks; None for one that has no such dim.

    Of all others torch knows by itself which rectangle a rank holds.
    """
    layout = layout_of(tensor)
    blocks = any(isinstance(cut, Shard) and cut.blocks != 1 for cut in layout or ())
    return layout if blocks else None
