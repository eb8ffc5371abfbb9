"""The layouts in which the user and the optimizer keep parameters, in the words of DTensor.

DTensor cuts a dim as torch.chunk does, or in equal blocks, each cut by itself. It has no words for
blocks of unequal size, for parts that several ranks hold, nor for parts in whole runs of elements,
such as a head's width, where the ranks get unequal numbers of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from autoparallel.placement import Layout, Placement, Shard

__all__ = ["kept_layout"]


def kept_layout(layout: Layout, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Layout:
    """Return the layout itself where DTensor can say it, else one that splits the same dims evenly.

    shape: of the whole tensor. sizes: of the mesh axes. What DTensor is not told rightly, it puts
    together wrongly, without a word: `full_tensor()`, torch's state dicts and its checkpoints.

    >>> kept_layout((Shard(0, unit=4),), (12, 5), (2,))
    (Shard(dim=0, blocks=1, unit=1),)
    >>> kept_layout((Shard(0, unit=4),), (16, 5), (2,))
    (Shard(dim=0, blocks=1, unit=4),)
    """
    cuts: dict[int, list[int]] = defaultdict(list)
    for axis, placement in enumerate(layout):
        if isinstance(placement, Shard) and sizes[axis] > 1:
            cuts[placement.dim].append(axis)
    lost = {
        dim
        for dim, axes in cuts.items()
        if not _has_words([layout[axis] for axis in axes], shape[dim], [sizes[a] for a in axes])
    }
    return tuple(
        Shard(placement.dim)
        if isinstance(placement, Shard) and placement.dim in lost
        else placement
        for placement in layout
    )


def _has_words(cuts: Sequence[Placement], size: int, ranks: Sequence[int]) -> bool:
    """Return whether DTensor can say how mesh axes cut one dim of `size` elements.

    cuts: the axes' placements, outermost first. ranks: the axes' sizes.
    """
    shards = [cut for cut in cuts if isinstance(cut, Shard)]
    blocks = {shard.blocks for shard in shards}
    if len(blocks) > 1:
        return False  # DTensor takes it for an order in which the axes cut
    (count,) = blocks
    units = [shard.unit for shard in shards if isinstance(shard.unit, int)]
    if not isinstance(count, int) or len(units) < len(shards):
        return False  # it has no blocks of unequal size
    if any(shard.repeat != 1 for shard in shards):
        return False
    if all(unit == 1 for unit in units) and (count == 1 or len(shards) == 1):
        return True
    # All parts of every block are equal, and consist of whole runs.
    parts = math.prod(ranks)
    return size % (count * parts) == 0 and all(
        size // (count * math.prod(ranks[: number + 1])) % unit == 0
        for number, unit in enumerate(units)
    )
