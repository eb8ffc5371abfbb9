"""An estimate of pipeline stages of equal blocks: bubbles, sends, and the memory of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoparallel.analysis.training_step import COMPUTE, Timeline, TrainingStep
from autoparallel.cost.collective_times import collective_seconds
from autoparallel.cost.hardware import Link
from autoparallel.errors import PlanError
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
    waiting = most = 0
    for kind, _ in _order(0, stages, micro_batches, schedule):
        waiting += 1 if kind == "forward" else -1
        most = max(most, waiting)
    return most


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
    Model: "gpipe" runs all forward passes, then all backward (arXiv:1811.06965); "1f1b" runs
    backward as soon as it can (arXiv:2104.04473, section 2.2). With neither sends nor recomputation
    both take (micro_batches + stages - 1) (forward + backward).
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
    orders = [
        [(rank, *work) for work in _order(rank, stages, micro_batches, schedule)]
        if per_rank == 1
        else _interleaved(rank, stages, per_rank, micro_batches, schedule)
        for rank in range(stages)
    ]
    free = [0.0] * stages
    done: dict[tuple[int, str, int], float] = {}
    next_pass = [0] * stages
    # Every rank works off its list in order. A pass starts when its rank is free and its
    # neighbour's pass has arrived; the loop goes round until no rank has anything left.
    while any(place < len(order) for place, order in zip(next_pass, orders, strict=True)):
        progressed = False
        for rank, order in enumerate(orders):
            while next_pass[rank] < len(order):
                stage, kind, batch = order[next_pass[rank]]
                neighbour = stage + 1 if kind == "backward" else stage - 1
                needs = (neighbour, kind, batch)
                if 0 <= neighbour < count and needs not in done:
                    break
                # The last stage goes back what it has gone forward.
                own = done[stage, "forward", batch] if kind == "backward" else 0.0
                ready = done[needs] + send if 0 <= neighbour < count else own
                # Recomputing needs no gradient, so it is done while the rank waits for one.
                if kind == "backward":
                    free[rank] = max(free[rank] + recompute, ready) + backwards[stage]
                else:
                    free[rank] = max(free[rank], ready) + forwards[stage]
                done[stage, kind, batch] = free[rank]
                next_pass[rank] += 1
                progressed = True
        assert progressed, "a schedule that waits for itself"
    return max(free)


def _interleaved(
    rank: int, ranks: int, per_rank: int, micro_batches: int, schedule: str
) -> list[tuple[int, str, int]]:
    """Return the passes of a rank with several stages, in order: (stage, kind, micro-batch).

    A rank takes a round of micro-batches through one of its stages, then through the next one
    (arXiv:2104.04473, section 2.2).
    """
    rounds = 1 if schedule == "gpipe" else max(1, micro_batches // ranks)
    size = -(-micro_batches // rounds)
    passes = [
        (part, batch)
        for start in range(0, micro_batches, size)
        for part in range(per_rank)
        for batch in range(start, min(start + size, micro_batches))
    ]
    backward = [
        (per_rank - 1 - part, batch)
        for start in range(0, micro_batches, size)
        for part in range(per_rank)
        for batch in range(start, min(start + size, micro_batches))
    ]
    ahead = min(len(passes), (per_rank - 1) * size + 2 * (ranks - 1 - rank))
    if schedule == "gpipe":
        ahead = len(passes)
    order = [(part * ranks + rank, "forward", batch) for part, batch in passes[:ahead]]
    for place, (part, batch) in enumerate(backward):
        if ahead + place < len(passes):
            following, number = passes[ahead + place]
            order.append((following * ranks + rank, "forward", number))
        order.append((part * ranks + rank, "backward", batch))
    return order


def _order(stage: int, stages: int, micro_batches: int, schedule: str) -> Sequence[tuple[str, int]]:
    """Return a stage's passes in order: ("forward" or "backward", number of the micro-batch)."""
    # 1F1B: a stage runs as many forward passes ahead as there are stages from it to the last.
    ahead = micro_batches if schedule == "gpipe" else min(stages - stage, micro_batches)
    order = [("forward", batch) for batch in range(ahead)]
    for batch in range(micro_batches):
        order.append(("backward", batch))
        if ahead + batch < micro_batches:
            order.append(("forward", ahead + batch))
    return order


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
