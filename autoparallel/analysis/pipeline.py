"""An estimate of pipeline stages of equal blocks: bubbles, sends, and the memory of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoparallel.analysis.pipeline_walk import StageSeconds, most_held, walk
from autoparallel.analysis.training_step import COMPUTE, Timeline, TrainingStep
from autoparallel.cost.collective_times import collective_seconds
from autoparallel.cost.hardware import Link
from autoparallel.errors import PlanError
from autoparallel.placement import Collective
from autoparallel.runtime.schedule_orders import schedule_order

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

    stages, micro_batches, schedule: as asked for. bubble: share of the passes' time in which a
    stage waits, between 0 and 1. send_seconds: of one micro-batch from one stage to the next.
    in_flight: micro-batches whose activations the first stage holds at most; later stages hold no
    more. activation_nbytes: bytes of these on a rank.
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
    """Return an estimate of the timeline's model cut into equal stages, each with as many ranks as
    the model has.

    timeline: of one micro-batch. micro_batches: how many make a step. schedule: "1f1b" or "gpipe".
    send_nbytes: bytes that a rank sends to the next stage per micro-batch, forward, and receives
    back as a gradient. link: between stages; None for sends that take no time. activation_nbytes:
    bytes that a rank saves of one micro-batch for the backward pass of the whole model. The passes
    take as long as the schedule makes them (`schedule_seconds`); the work after the backward pass
    (reducing gradients, updating) is done once, each stage its own part.
    Raises PlanError for another schedule, and for fewer than one stage or micro-batch.

    >>> import torch, autoparallel
    >>> layer, inputs = torch.nn.Linear(512, 512, bias=False), torch.zeros(8, 512)
    >>> plan = autoparallel.make_plan(layer, 2, example_inputs=inputs)
    >>> estimate = pipeline(autoparallel.timeline(plan), stages=4, micro_batches=12)
    >>> f"{estimate.bubble:.2f}", estimate.in_flight
    ('0.20', 4)
    """
    _check(stages, micro_batches, schedule)
    send = send_seconds(send_nbytes, link) if link is not None and stages > 1 else 0.0
    forward, backward = timeline.forward_seconds / stages, timeline.backward_seconds / stages
    again = timeline.busy(COMPUTE, "recompute") / stages
    passes = schedule_seconds(
        stages, micro_batches, schedule, forward, backward - again, recompute=again, send=send
    )
    rest = timeline.seconds - timeline.forward_seconds - timeline.backward_seconds
    held_batches = in_flight(stages, micro_batches, schedule)
    work = micro_batches * (forward + backward)
    return PipelineEstimate(
        stages=stages,
        micro_batches=micro_batches,
        schedule=schedule,
        seconds=passes + rest / stages,
        bubble=1 - work / passes if passes else 0.0,
        send_seconds=send,
        in_flight=held_batches,
        activation_nbytes=held_batches * activation_nbytes / stages,
        tokens=timeline.tokens * micro_batches,
        flops=timeline.flops * micro_batches,
        peak=timeline.peak * stages,
    )


def send_seconds(nbytes: float, link: Link) -> float:
    """Return the predicted seconds of sending `nbytes` over a link.

    Model: half of an all-gather of two ranks, in which each sends its half to the other at once.

    Example: `send_seconds(2 * batch * sequence * hidden, hardware.links((stages,))[0])`
    """
    # In an all-gather of 2 * nbytes in all, either rank sends nbytes.
    return collective_seconds(Collective.ALL_GATHER, 2 * nbytes, link, 2)


def in_flight(stages: int, micro_batches: int, schedule: str) -> int:
    """Return how many micro-batches the first stage has run forward and not yet backward, at most.

    Raises PlanError as `pipeline` does.

    >>> in_flight(4, 12, "1f1b"), in_flight(4, 12, "gpipe")
    (4, 12)
    """
    _check(stages, micro_batches, schedule)
    return most_held(schedule_order(schedule, stages, 1, micro_batches))[0]


def schedule_seconds(
    stages: int,
    micro_batches: int,
    schedule: str,
    forward: float | Sequence[float],
    backward: float | Sequence[float],
    *,
    recompute: float = 0.0,
    send: float = 0.0,
    per_rank: int = 1,
) -> float:
    """Return the seconds from the first forward to the last backward pass of a pipeline.

    forward, backward, recompute: seconds of one micro-batch on one stage, or on each of them; what
    is recomputed needs no gradient and can fill a bubble. send: seconds between stages; a stage
    computes while it sends. per_rank: stages on each of `stages` ranks, of which the first rank has
    the first, and the last the last; `forward` and `backward` are then of all of these.
    Model: every rank works off its passes in the order of torch's schedule (`walk`). "gpipe" runs
    all forward passes, then all backward (arXiv:1811.06965); "1f1b" runs backward as soon as it can
    (arXiv:2104.04473, section 2.2). With neither sends nor recomputation both take (micro_batches +
    stages - 1) (forward + backward).
    Raises PlanError as `pipeline` does.

    >>> schedule_seconds(4, 12, "1f1b", forward=1.0, backward=2.0)
    45.0
    """
    _check(stages, micro_batches, schedule)
    count = stages * per_rank
    forwards, backwards = (
        (float(each),) * count if isinstance(each, int | float) else tuple(each)
        for each in (forward, backward)
    )
    each = [
        StageSeconds(ahead, back + recompute, again=recompute, send_on=send, send_back=send)
        for ahead, back in zip(forwards, backwards, strict=True)
    ]
    passes = walk(schedule_order(schedule, stages, per_rank, micro_batches), each)
    return max(one.end for one in passes)


def _check(stages: int, micro_batches: int, schedule: str) -> None:
    """Raise PlanError for a schedule or counts that make no pipeline."""
    if schedule not in SCHEDULES:
        raise PlanError(
            f"there is no schedule {schedule!r} for pipelines",
            fix=f"pass schedule={' or '.join(map(repr, SCHEDULES))}",
        )
    if not all(type(count) is int and count > 0 for count in (stages, micro_batches)):
        raise PlanError(
            f"{stages} stages and {micro_batches} micro-batches make no pipeline",
            why="both are counted: whole numbers, at least 1",
            fix="pass stages=4, micro_batches=16, for example",
        )
