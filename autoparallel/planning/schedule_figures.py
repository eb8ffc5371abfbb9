"""Figures of a schedule that its order is walked for, once for all estimates and plans."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from autoparallel.analysis.pipeline_walk import held_together
from autoparallel.options import Options, rank_of_stage
from autoparallel.runtime.schedule_orders import schedule_order
from autoparallel.strategy.stage_shares import StageShares

__all__ = ["ScheduleFigures", "figures_of", "shares_of"]


@dataclass(frozen=True, slots=True)
class ScheduleFigures:
    """Figures of a schedule. ranks: of each stage. together: micro-batches of which each stage
    keeps activations when its rank keeps most. passes: of all ranks together.
    """

    ranks: tuple[int, ...]
    together: tuple[int, ...]
    passes: int

    @property
    def most(self) -> float:
        """The most micro-batches of which a rank keeps activations, over all of its stages."""
        sums = [0] * (max(self.ranks) + 1)
        for rank, count in zip(self.ranks, self.together, strict=True):
            sums[rank] += count
        return float(max(sums))


@lru_cache(maxsize=128)
def figures_of(schedule: str, ranks: int, per_rank: int, microbatches: int) -> ScheduleFigures:
    """Return the figures of a schedule. The numbers are those of `schedule_order`.

    >>> figures_of("1f1b", 2, 1, 8)
    ScheduleFigures(ranks=(0, 1), together=(2, 1), passes=32)
    """
    order = schedule_order(schedule, ranks, per_rank, microbatches)
    places = tuple(rank_of_stage(stage, ranks, schedule) for stage in range(ranks * per_rank))
    return ScheduleFigures(places, held_together(order), sum(map(len, order)))


def shares_of(ranks: int, count: int, options: Options) -> StageShares:
    """Return what one of so many micro-batches bears of a step. ranks: that share out the stages.

    >>> shares_of(4, 8, Options(schedule="1f1b"))
    StageShares(ranks=4, passes=11.0, in_flight=4.0, in_parts=False)
    """
    each = options.each_rank
    most = figures_of(options.order, ranks, each, count).most
    return StageShares(ranks, count + (ranks - 1) / each, most / each)
