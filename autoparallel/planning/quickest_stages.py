"""Starts of stages by which a step is shortest, of cuts that are as even and send as little.

Stages that take equally long cannot always be had, and where the shorter ones lie decides how long
others wait: behind the last stage a micro-batch turns round, and stages of one rank add up. A step
takes as long as the longest way from pass to pass through it, of which the walk tells what work is
on it; and it takes no less than a mean of such ways. So the best cut is looked for by those that
were met (`planners.quickest_cut`), which also says how much shorter any other could be.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.pipeline_step import passes_of, path_of, step_of
from autoparallel.cost.links import Link
from autoparallel.plan import Pipeline
from autoparallel.planning.schedule_figures import figures_of
from autoparallel.planning.stage_work import StageBytes
from planners import quickest_cut

__all__ = ["MOST_PASSES", "StageTimes", "quickest_starts"]

# Steps of more passes than these are not walked for a choice.
MOST_PASSES = 20_000


@dataclass(frozen=True)
class StageTimes:
    """The seconds that each op, in order, brings to the stage that computes it.

    kinds: by kind of work, as of `path_of`. nbytes: by place, of what a cut there sends; sends: the
    seconds of that, as of `partition`. link: between stages.
    """

    kinds: tuple[NDArray[np.float64], ...]
    nbytes: Sequence[float]
    sends: Sequence[float]
    link: Link

    def pipeline(self, empty: Pipeline, starts: Sequence[int]) -> Pipeline:
        """Return a pipeline with the seconds of stages that start at these places.

        empty: that pipeline without them.
        """
        forward, inputs, weights, once = (
            np.add.reduceat(kind, np.array(starts)) for kind in self.kinds
        )
        sent = [int(self.nbytes[start]) for start in starts[1:]]
        return replace(
            empty,
            seconds=tuple((forward + inputs + weights).tolist()),
            forward_seconds=tuple(forward.tolist()),
            weight_seconds=tuple(weights.tolist()),
            once_seconds=tuple(once.tolist()),
            nbytes=(*sent, 0),
            back_nbytes=(0, *sent),
        )


def quickest_starts(
    even: tuple[int, ...],
    times: StageTimes,
    empty: Pipeline,
    sizes: StageBytes | None,
    limit: float,
    owners: Sequence[Collection[int] | None] | None = None,
) -> tuple[int, ...]:
    """Return where stages start so that a step is shortest, none of them longer than in an even cut
    and none sending more.

    empty: as of `StageTimes.pipeline`. sizes, limit, owners: as of `cut_within`; where the even cut
    does not fit, ranks need no more than with it.
    """
    figures = figures_of(empty.schedule, empty.ranks, len(even) // empty.ranks, empty.microbatches)
    if len(even) == 1 or figures.passes > MOST_PASSES:
        return even

    def needs(starts: Sequence[int]) -> float:
        """Tell the bytes of the rank that needs most."""
        return 0.0 if sizes is None else sizes.needs(figures.together, figures.ranks, starts)

    room = max(limit, needs(even))

    def told(starts: tuple[int, ...]) -> tuple[float, NDArray[np.float64]]:
        """Tell the seconds of a step, endless where stages have no room, and what is waited for."""
        pipeline = times.pipeline(empty, starts)
        passes = passes_of(pipeline, times.link)
        step = step_of(pipeline, passes)[0] if needs(starts) <= room else math.inf
        return step, path_of(pipeline, passes)

    forward, inputs, weights, _ = times.kinds
    seconds = (forward + inputs + weights).tolist()
    return quickest_cut(seconds, times.sends, even, told, times.kinds, owners)[0]
