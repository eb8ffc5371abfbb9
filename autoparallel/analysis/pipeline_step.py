"""The predicted step of a plan with stages: every pass of every micro-batch, as it is scheduled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.pipeline import send_seconds
from autoparallel.analysis.pipeline_walk import SEND, StageSeconds, Timed, longest_path, walk
from autoparallel.analysis.step_rates import peak_of, tokens_and_unit
from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE, Event, Timeline
from autoparallel.cost.hardware import Hardware, find_hardware, presets
from autoparallel.cost.links import Link
from autoparallel.errors import PlanError
from autoparallel.mesh import MICROBATCH
from autoparallel.plan import Pipeline, Plan
from autoparallel.runtime.schedule_orders import BACKWARD, FORWARD, INPUTS, WEIGHTS, schedule_order
from autoparallel.support.units import rate_text, seconds_text

__all__ = [
    "PipelineTimeline",
    "link_of_stages",
    "passes_of",
    "path_of",
    "pipeline_timeline",
    "step_of",
    "timeline_of_stages",
]


@dataclass(frozen=True, kw_only=True)
class PipelineTimeline(Timeline):
    """A predicted step of a plan with stages.

    Its events are the passes, of one micro-batch on one stage each, what they send, and what comes
    after them, on every rank of the axis of stages; `Event.place` says on which. stages: their
    number, on `places` ranks, with so many `microbatches`. bubble: the share of the passes' time in
    which ranks wait, from 0 to 1.

    >>> import torch, autoparallel
    >>> layers = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)])
    >>> plan = autoparallel.make_plan(
    ...     layers, mesh=autoparallel.Mesh(pp=2), example_inputs=torch.zeros(64, 256),
    ...     microbatches=4, hardware="dgx-a100",
    ... )
    >>> step = autoparallel.timeline(plan)
    >>> step.places, step.microbatches, len([e for e in step.events if e.phase == "forward"])
    (2, 4, 12)
    """

    stages: int
    places: int
    microbatches: int
    schedule: str
    bubble: float

    def __str__(self) -> str:
        """A few lines; `write_trace` shows every pass."""
        rest = self.seconds - self.forward_seconds - self.backward_seconds
        busy = self.busy(COMPUTE)
        rows = [
            ("step", f"{seconds_text(self.seconds)}, predicted, on {self.ranks} ranks"),
            (
                "passes",
                f"{seconds_text(self.seconds - rest)} for {self.microbatches} micro-batches on "
                f"{self.stages} stages, {self.schedule}; gradients and update after them "
                f"{seconds_text(max(rest, 0.0))}",
            ),
            ("computing", f"{seconds_text(busy)} on the mean rank"),
            ("waiting", f"{self.bubble:.1%} of the passes' time"),
            ("sending", f"{seconds_text(self.busy(COMMUNICATION))} on the mean rank"),
            (self.unit, f"{self.tokens:,} a step, {rate_text(self.tokens_per_second)} a second"),
            ("utilization", f"{self.mfu:.1%} of the peak FLOP/s (MFU)"),
        ]
        return "\n".join(f"{name:15}{text}" for name, text in rows)

    def busy(self, stream: str, phase: str = "") -> float:
        """Return the seconds that a stream of the mean rank works, in all or in one phase."""
        return super().busy(stream, phase) / self.places

    @cached_property
    def places_text(self) -> str:
        """The passes of each rank in a line of text: digits go forward, letters back.

        A column is a hundredth of the passes' time.
        """
        end = self.forward_seconds + self.backward_seconds
        width = 100
        lines = []
        for place in range(self.places):
            line = [" "] * width
            for event in self.events:
                if event.place != place or event.stream != COMPUTE or event.microbatch < 0:
                    continue
                sign = chr(ord("a") + event.microbatch % 26)
                if event.phase == "forward":
                    sign = str(event.microbatch % 10)
                first, last = int(event.start / end * width), int(event.end / end * width)
                for column in range(first, min(max(last, first + 1), width)):
                    line[column] = sign
            lines.append(f"{place:3} |{''.join(line)}|")
        return "\n".join(lines)


def link_of_stages(plan: Plan, ranks: int, hardware: Hardware) -> Link:
    """Return the link between neighbours on the axis of stages.

    plan: with layouts over micro-batches. ranks: that share out the stages.

    Example: `link_of_stages(plan, 4, find_hardware("dgx-a100"))`
    """
    devices = tuple(1 if name == MICROBATCH else size for name, size in plan.mesh.axes)
    return hardware.links((ranks, *devices))[0]


def passes_of(pipeline: Pipeline, link: Link) -> tuple[Timed, ...]:
    """Return the passes of a step as its schedule runs them.

    pipeline: of which the seconds of passes are told. link: between neighbours on the axis.

    Example: `max(each.end for each in passes_of(plan.pipeline, link))`
    """
    stages = [
        StageSeconds(
            forward,
            both - forward,
            weights,
            send_on=send_seconds(ahead, link) if ahead else 0.0,
            send_back=send_seconds(back, link) if back else 0.0,
        )
        for forward, both, weights, ahead, back in zip(
            pipeline.forward_seconds,
            pipeline.seconds,
            pipeline.weight_seconds,
            pipeline.nbytes,
            pipeline.back_nbytes,
            strict=True,
        )
    ]
    order = schedule_order(
        pipeline.schedule,
        pipeline.ranks,
        pipeline.stages // pipeline.ranks,
        pipeline.microbatches,
    )
    return walk(order, stages)


def step_of(pipeline: Pipeline, passes: Sequence[Timed]) -> tuple[float, float, float]:
    """Return the predicted seconds of a step, those until all passes are done, and the share of the
    latter in which ranks wait.

    Every rank reduces its gradients and updates its parameters when its own passes are done.

    Example: `step_of(plan.pipeline, passes_of(plan.pipeline, link))[0]`
    """
    ends, once, busy = [0.0] * pipeline.ranks, [0.0] * pipeline.ranks, 0.0
    place: dict[int, int] = {}
    for each in passes:
        ends[each.rank] = max(ends[each.rank], each.end)
        busy += each.end - each.start
        place[each.work.stage] = each.rank
    for stage, seconds in enumerate(pipeline.once_seconds):
        once[place[stage]] += seconds
    end = max(ends)
    # The loss comes to all ranks before any of them goes on.
    step = max(end + after for after in once)
    return step, end, 1 - busy / (end * pipeline.ranks) if end else 0.0


def path_of(pipeline: Pipeline, passes: Sequence[Timed]) -> NDArray[np.float64]:
    """Return how often the work of each stage is waited for until a step is over, a row for each
    kind of work: forward passes, those of backward passes' seconds that go on to the stage before,
    those that gradients of weights take, what is done once, and what is sent where it starts.

    The step takes what this work together takes, and no less where stages take other times.

    Example: `path_of(plan.pipeline, passes_of(plan.pipeline, link))[0]`
    """
    path = np.zeros((5, pipeline.stages))
    rows = {FORWARD: (0,), BACKWARD: (1, 2), INPUTS: (1,), WEIGHTS: (2,), SEND: (4,)}
    for (kind, stage), count in longest_path(passes).items():
        path[rows[kind], stage] += count
    places = [pipeline.rank_of(stage) for stage in range(pipeline.stages)]
    last = np.bincount(places, pipeline.once_seconds).argmax()
    path[3] = [place == last for place in places]
    return path


def timeline_of_stages(
    plan: Plan, hardware: Hardware | str | None, overlap: bool | None, bucket: int | None
) -> PipelineTimeline:
    """Return the timeline of a plan with stages, on the hardware and with the overlap that it was
    made for.

    hardware, overlap, bucket: None, or what the plan was made for. Raises PlanError for others, and
    for a plan that was written without the seconds of its passes.

    Example: `timeline_of_stages(plan, None, None, None).bubble`
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    planned_for = find_hardware(
        plan.hardware if plan.hardware in presets() else plan.options.hardware
    )
    other = hardware is not None and find_hardware(hardware) != planned_for
    if other or bucket is not None or overlap not in (None, plan.options.overlap):
        raise PlanError(
            "the step of a plan with stages is told as it was planned",
            why="what a stage takes was told when the model was cut, on "
            f"{plan.hardware} and with overlap={plan.options.overlap}",
            fix="plan again, with that hardware or overlap",
        )
    if not pipeline.forward_seconds:
        raise PlanError(
            "the step of this plan cannot be told",
            why="it was written without the seconds of each pass",
            fix="plan again",
        )
    return pipeline_timeline(plan, planned_for)


def pipeline_timeline(plan: Plan, hardware: Hardware) -> PipelineTimeline:
    """Return the predicted step of a plan with stages, pass by pass.

    plan: with a pipeline of which the seconds are told. Between stages, what is returned beside the
    loss is not counted: `model.step` sends the loss alone.

    Example: `print(pipeline_timeline(plan, find_hardware("dgx-a100")))`
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    passes = passes_of(pipeline, link_of_stages(plan, pipeline.ranks, hardware))
    seconds, end, bubble = step_of(pipeline, passes)
    tokens, unit = tokens_and_unit(plan)
    return PipelineTimeline(
        seconds=seconds,
        forward_seconds=max(each.end for each in passes if each.work.kind == FORWARD),
        backward_seconds=end - max(each.end for each in passes if each.work.kind == FORWARD),
        events=_events(pipeline, passes, end),
        tokens=tokens,
        unit=unit,
        # An op's products are those of the whole batch.
        flops=3 * sum(op.whole_flops for op in plan.ops),
        peak=peak_of(plan, hardware) * plan.world_size,
        ranks=plan.world_size,
        stages=pipeline.stages,
        places=pipeline.ranks,
        microbatches=pipeline.microbatches,
        schedule=pipeline.schedule,
        bubble=bubble,
    )


def _events(pipeline: Pipeline, passes: Sequence[Timed], end: float) -> tuple[Event, ...]:
    """Return passes, sends and what comes after them as events of a timeline."""
    events: list[Event] = []
    place: dict[int, int] = {}
    for each in passes:
        stage, kind, batch = each.work.stage, each.work.kind, each.work.microbatch
        place[stage] = each.rank
        phase = "forward" if kind == FORWARD else "backward"
        of = f"stage {stage}, micro-batch {batch}"
        name = f"gradients of weights of {of}" if kind == WEIGHTS else f"{phase} of {of}"
        event = Event(name, COMPUTE, phase, each.start, each.end, each.rank, batch)
        if each.end > each.start:
            events.append(event)
        if each.arrived > each.sent:
            name = f"send of {of}"
            start, until = each.sent, each.arrived
            events.append(Event(name, COMMUNICATION, phase, start, until, each.rank, batch))
    free = [end] * pipeline.ranks
    for stage, seconds in enumerate(pipeline.once_seconds):
        if seconds > 0:
            rank = place[stage]
            name = f"gradients and update of stage {stage}"
            after = free[rank] + seconds
            events.append(Event(name, COMPUTE, "update", free[rank], after, rank))
            free[rank] = after
    return tuple(events)
