"""The reduction of a gradient that is differentiated in turn: conversions, one after the other."""

from __future__ import annotations

import torch

from autoparallel.placement import Invariant, Layout, Partial, Placement, Shard, local_layout_size
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.joint_moves import ReductionSteps
from autoparallel.runtime.ranks import Ranks

__all__ = ["recorded_reduction"]


def recorded_reduction(
    gradient: torch.Tensor, layout: Layout, wanted: Layout, shape: tuple[int, ...], ranks: Ranks
) -> torch.Tensor:
    """Return what `joint_moves.reduced` makes of a gradient, through which derivatives flow back.
    Collective.

    gradient: of this rank. layout, wanted: before and after. shape: of the whole.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> from autoparallel.runtime.ranks import one_axis
    >>> leaf, single = torch.ones(2, requires_grad=True), one_axis(SingleGroup())
    >>> recorded_reduction(leaf * leaf, (Partial(),), (Shard(0),), (2,), single).requires_grad
    True
    """
    steps = ReductionSteps.between([layout], [wanted], len(layout))
    now = list(layout)

    def to(axis: int, target: Placement) -> None:
        nonlocal gradient
        source, size = now[axis], 0
        if isinstance(source, Shard):
            # Inner axes cut what the outer ones leave.
            outer = (*now[:axis], *(Invariant(),) * (len(now) - axis))
            whole = shape[source.dim]
            size = local_layout_size(whole, source.dim, outer, ranks.sizes, ranks.coordinates)
        gradient = convert(gradient, ranks.groups[axis], source, target, size)
        now[axis] = target

    for axis, _, _, (target,) in steps.exchanges:
        to(axis, target)
    for _, axis, _ in steps.spreads:
        to(axis, Partial())
    if steps.gathers is not None:
        (_, (coarse,)) = steps.gathers
        for axis in reversed(range(len(now))):
            if coarse[axis] != now[axis]:
                to(axis, coarse[axis])
    for axis, cuts, _, shards in steps.scatters:
        to(axis, shards[0] if shards else cuts[0][1])
    for axis, _ in steps.sums:
        to(axis, Invariant())
    for _, axis, shard in steps.cuts:
        to(axis, shard)
    return gradient
