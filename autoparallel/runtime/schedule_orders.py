"""The orders in which a pipeline's ranks compute: those of torch.distributed.pipelining.

Whoever runs stages and whoever predicts what they take read the same tables, so that a schedule of
torch's is told in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autoparallel.options import SCHEDULES
from autoparallel.support.torch_private import pipeline_order

__all__ = [
    "BACKWARD",
    "FORWARD",
    "INPUTS",
    "WEIGHTS",
    "Pass",
    "ranks_of_stages",
    "schedule_class",
    "schedule_order",
]

# The kinds of passes, as torch's tables name them: a whole backward pass, or its two halves: the
# gradients of what came in, which the stage before waits for, and those of the weights.
FORWARD, BACKWARD, INPUTS, WEIGHTS = "F", "B", "I", "W"


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of one micro-batch through one stage. kind: FORWARD, BACKWARD, INPUTS or WEIGHTS."""

    stage: int
    kind: str
    microbatch: int


def schedule_class(schedule: str, ranks: int, per_rank: int, microbatches: int) -> str:
    """Return the name of torch's class that trains with a schedule.

    ranks: that share out the stages, per_rank: stages on each of them. Where the one that was asked
    for takes no so few micro-batches, it is one that has the same stages on each rank.

    >>> schedule_class("1f1b", 4, 1, 8), schedule_class("1f1b", 4, 1, 2)
    ('Schedule1F1B', 'ScheduleGPipe')
    """
    asked, plain = SCHEDULES[schedule], SCHEDULES["gpipe"]
    few = microbatches < ranks * per_rank
    if asked.folded:
        return (SCHEDULES["zbv"] if asked.per_stage and few else asked).several
    if per_rank > 1 or asked.alone == asked.several:
        return asked.several
    # Some take no fewer micro-batches than there are stages, where they would be GPipe's order.
    return (plain if few else asked).alone


@lru_cache(maxsize=32)
def schedule_order(
    schedule: str, ranks: int, per_rank: int, microbatches: int
) -> tuple[tuple[Pass, ...], ...]:
    """Return the passes of each rank, in the order in which it computes them.

    Raises ValueError for numbers that torch's schedule does not take.

    >>> [f"{each.kind}{each.microbatch}" for each in schedule_order("1f1b", 2, 1, 2)[0]]
    ['F0', 'F1', 'B0', 'B1']
    """
    kind = schedule_class(schedule, ranks, per_rank, microbatches)
    if kind == "Schedule1F1B":
        # Its run goes by no table, and the table that it shows leaves out the last rank's first
        # micro-batch.
        return tuple(_one_by_one(rank, ranks, microbatches) for rank in range(ranks))
    return tuple(
        tuple(Pass(*each) for each in order)
        for order in pipeline_order(kind, ranks, per_rank, microbatches)
    )


def ranks_of_stages(order: Sequence[Sequence[Pass]]) -> tuple[int, ...]:
    """Return the rank that computes each stage. order: as of `schedule_order`.

    >>> ranks_of_stages(schedule_order("1f1b", 2, 2, 4))
    (0, 1, 0, 1)
    """
    places = {work.stage: rank for rank, passes in enumerate(order) for work in passes}
    return tuple(places[stage] for stage in sorted(places))


def _one_by_one(rank: int, ranks: int, microbatches: int) -> tuple[Pass, ...]:
    """Return the passes of a rank with one stage, which goes back as soon as it can."""
    # It runs as many forward passes ahead as there are stages from it to the last.
    ahead = min(ranks - rank, microbatches)
    order = [Pass(rank, FORWARD, batch) for batch in range(ahead)]
    for batch in range(microbatches):
        order.append(Pass(rank, BACKWARD, batch))
        if ahead + batch < microbatches:
            order.append(Pass(rank, FORWARD, ahead + batch))
    return tuple(order)
