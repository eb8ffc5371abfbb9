"""An estimate of pipeline stages of equal blocks: bubbles, sends, and what a stage must hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoparallel.analysis.timeline import COMPUTE, Timeline, TrainingStep
from autoparallel.cost.collective_times import collective_seconds
from autoparallel.cost.hardware import Link
from autoparallel.placement import Collective

__all__ = [
    "SCHEDULES",
    "PipelineEstimate",
    "in_flight",
    "pipeline",
    "schedule_seconds",
    "send_seconds",
]

SCHEDULES = ("gpipe", "1f1b")


@dataclass(frozen=True, kw_only=True)
class PipelineEstimate(TrainingStep):
    """A predicted step of a pipeline: all micro-batches, and the update.

    bubble: share of the passes' time in which a stage waits. send_seconds: of one micro-batch from
    one stage to the next. in_flight: micro-batches whose activations the first stage holds at most;
    the later ones hold no more. activation_nbytes: of these.
    """

    stages: int
    micro_batches: int
    schedule: str
    bubble: float
    send_seconds: float
    in_flight: int
    activation_nbytes: float


def pipeline(
    timeline: Timeline,
    stages: int,
    micro_batches: int,
    *,
    schedule: str = "1f1b",
    send_nbytes: float = 0.0,
    link: Link | None = None,
    activation_nbytes: float = 0.0,
) -> PipelineEstimate:
    """The model of a timeline, cut into equal stages that each have as many ranks as it has.

    timeline: of one micro-batch. send_nbytes: what a rank sends to the next stage per micro-batch,
    forward, and receives back as a gradient. link: between stages. activation_nbytes: what a rank
    keeps of one micro-batch for the backward pass of the whole model.
    The passes take as long as the schedule makes them (`schedule_seconds`); what comes after the
    backward pass (reducing gradients, updating) is done once, each stage its own part.
    Raises ValueError for another schedule, and for fewer than one stage or micro-batch.
    """
    _check(stages, micro_batches, schedule)
    send = send_seconds(send_nbytes, link) if link is not None and stages > 1 else 0.0
    forward, backward = timeline.forward_seconds / stages, timeline.backward_seconds / stages
    again = timeline.busy(COMPUTE, "recompute") / stages
    passes = schedule_seconds(
        stages, micro_batches, schedule, forward, backward - again, recompute=again, send=send
    )
    rest = timeline.seconds - timeline.forward_seconds - timeline.backward_seconds
    held = in_flight(stages, micro_batches, schedule)
    work = micro_batches * (forward + backward)
    return PipelineEstimate(
        stages=stages,
        micro_batches=micro_batches,
        schedule=schedule,
        seconds=passes + rest / stages,
        bubble=1 - work / passes if passes else 0.0,
        send_seconds=send,
        in_flight=held,
        activation_nbytes=held * activation_nbytes / stages,
        tokens=timeline.tokens * micro_batches,
        flops=timeline.flops * micro_batches,
        peak=timeline.peak * stages,
    )


def send_seconds(nbytes: float, link: Link) -> float:
    """Predicted time of one send: half of what two ranks gather from each other."""
    return collective_seconds(Collective.ALL_GATHER, 2 * nbytes, link, 2)


def in_flight(stages: int, micro_batches: int, schedule: str) -> int:
    """Micro-batches that the first stage has run forward and not yet backward, at most."""
    _check(stages, micro_batches, schedule)
    waiting = most = 0
    for kind, _ in _order(0, stages, micro_batches, schedule):
        waiting += 1 if kind == "forward" else -1
        most = max(most, waiting)
    return most


def schedule_seconds(
    stages: int,
    micro_batches: int,
    schedule: str,
    forward: float,
    backward: float,
    *,
    recompute: float = 0.0,
    send: float = 0.0,
) -> float:
    """Seconds from the first forward to the last backward pass of equal stages.

    forward, backward, recompute: of one micro-batch on one stage; what is run again needs no
    gradient and can fill a bubble. A stage computes while it sends.
    "gpipe": all forward, then all backward (arXiv:1811.06965). "1f1b": a stage runs backward as
    soon as it can (arXiv:2104.04473, section 2.2). With neither sends nor recomputation both take
    (micro_batches + stages - 1) (forward + backward).
    """
    _check(stages, micro_batches, schedule)
    orders = [_order(stage, stages, micro_batches, schedule) for stage in range(stages)]
    free = [0.0] * stages
    done: dict[tuple[int, str, int], float] = {}
    at = [0] * stages
    while any(place < len(order) for place, order in zip(at, orders, strict=True)):
        moved = False
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                kind, batch = order[at[stage]]
                above = stage + 1 if kind == "backward" else stage - 1
                needs = (above, kind, batch)
                if 0 <= above < stages and needs not in done:
                    break
                ready = done[needs] + send if 0 <= above < stages else 0.0
                if kind == "backward":
                    free[stage] = max(free[stage] + recompute, ready) + backward
                else:
                    free[stage] = max(free[stage], ready) + forward
                done[stage, kind, batch] = free[stage]
                at[stage] += 1
                moved = True
        assert moved, "a schedule that waits for itself"
    return max(free)


def _order(stage: int, stages: int, micro_batches: int, schedule: str) -> Sequence[tuple[str, int]]:
    """What a stage does, in order: ("forward" or "backward", number of the micro-batch)."""
    ahead = micro_batches if schedule == "gpipe" else min(stages - stage, micro_batches)
    order = [("forward", batch) for batch in range(ahead)]
    for batch in range(micro_batches):
        order.append(("backward", batch))
        if ahead + batch < micro_batches:
            order.append(("forward", ahead + batch))
    return order


def _check(stages: int, micro_batches: int, schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is none of {', '.join(SCHEDULES)}")
    if not all(type(count) is int and count > 0 for count in (stages, micro_batches)):
        raise ValueError(
            f"{stages} stages and {micro_batches} micro-batches: whole numbers, at least 1"
        )
