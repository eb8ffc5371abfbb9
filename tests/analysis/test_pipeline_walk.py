"""Steps of pipelines by hand: what waits, what is sent, what is put off; and as plans tell them."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.analysis.pipeline_step import PipelineTimeline
from autoparallel.analysis.pipeline_walk import (
    SEND,
    StageSeconds,
    held,
    longest_path,
    most_held,
    walk,
)
from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.runtime.schedule_orders import Pass, ranks_of_stages, schedule_order
from autoparallel.view.trace import trace_json

STAGE = StageSeconds(1.0, 2.0, weights=1.0)


@pytest.mark.parametrize(
    ("schedule", "each", "seconds"),
    [
        # Three ranks, six micro-batches: (M + P - 1) passes forward and back.
        ("gpipe", 1, 24.0),
        ("1f1b", 1, 24.0),
        # Two stages of half the work on each rank: the bubble is half as long.
        ("gpipe", 2, 42.0),
        ("1f1b", 2, 42.0),
        # Gradients of weights fill what is waited for, but for the ranks' way to their first pass.
        ("zero_bubble", 1, 20.0),
        ("zbv", 2, 38.0),
    ],
)
def test_steps_by_hand(schedule: str, each: int, seconds: float) -> None:
    order = schedule_order(schedule, 3, each, 6)
    passes = walk(order, [STAGE] * (3 * each))
    assert max(one.end for one in passes) == pytest.approx(seconds)
    # Everything runs once, no rank does two things at a time, and nothing before what it needs.
    assert len({one.work for one in passes}) == len(passes) == sum(map(len, order))
    ends: dict[int, float] = {}
    done = {one.work: one.end for one in passes}
    for one in passes:
        assert one.start >= ends.get(one.rank, 0.0)
        ends[one.rank] = one.end
        before = Pass(one.work.stage - 1, "F", one.work.microbatch)
        if one.work.kind == "F" and before in done:
            assert one.start >= done[before]


@pytest.mark.parametrize("send", [0.0, 0.4])
@pytest.mark.parametrize(
    ("schedule", "each"), [("1f1b", 2), ("zero_bubble", 1), ("zbv", 2), ("dualpipev", 2)]
)
def test_the_longest_path_is_the_step(schedule: str, each: int, send: float) -> None:
    """Passes on it take the step, one after the other, and bound steps in which stages differ."""
    draw = random.Random(each)
    order = schedule_order(schedule, 3, each, 8)

    def stages() -> list[StageSeconds]:
        """Return stages of which each takes something else."""
        return [
            StageSeconds(draw.uniform(1, 2), 3.0, draw.uniform(1, 2), 0.0, send, send)
            for _ in range(3 * each)
        ]

    def along(seconds: list[StageSeconds]) -> float:
        """Return what the path takes with other stages."""
        total = 0.0
        for (kind, stage), count in path.items():
            one = seconds[stage]
            halves = {"I": one.backward - one.weights, "W": one.weights, SEND: send}
            total += count * {"F": one.forward, "B": one.backward, **halves}[kind]
        return total

    first = stages()
    passes = walk(order, first)
    path = longest_path(passes)
    assert along(first) == pytest.approx(max(one.end for one in passes))
    for _ in range(10):
        others = stages()
        assert along(others) <= max(one.end for one in walk(order, others)) + 1e-9


def test_sends_and_waits() -> None:
    """What is sent arrives later, one thing after the other; a rank computes meanwhile."""
    stages = [StageSeconds(1.0, 2.0, send_on=1.5), StageSeconds(1.0, 2.0, send_back=0.5)]
    passes = walk(schedule_order("gpipe", 2, 1, 2), stages)
    times = {(o.rank, o.work.kind, o.work.microbatch): (o.start, o.end) for o in passes}
    assert times[0, "F", 1] == (1.0, 2.0)
    assert times[1, "F", 0] == (2.5, 3.5)
    assert times[1, "F", 1] == (4.0, 5.0)  # sent after the first one had gone, from 2.5 on
    assert times[0, "B", 0] == (7.5, 9.5)
    with pytest.raises(ValueError, match="waits for itself"):
        walk([[Pass(0, "B", 0), Pass(0, "F", 0)], [Pass(1, "F", 0), Pass(1, "B", 0)]], stages)


def test_what_schedules_hold() -> None:
    """GPipe all micro-batches, 1F1B as many as stages follow, and interleaved ones more of both."""
    assert most_held(schedule_order("gpipe", 3, 1, 6)) == (6, 6, 6)
    assert most_held(schedule_order("1f1b", 3, 1, 6)) == (3, 2, 1)
    order = schedule_order("1f1b", 2, 2, 4)
    assert ranks_of_stages(order) == (0, 1, 0, 1)
    assert most_held(order) == (4, 3, 2, 1)
    # Of both stages together fewer than the most of each.
    assert [moment.nbytes for moment in held(order, [1.0] * 4)] == [5.0, 3.0]


def planned(**options: object) -> Plan:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    stack = nn.Sequential(*[nn.Sequential(*block) for _ in range(8)])
    choices = {"mesh": Mesh(pp=2), "microbatches": 4, **options}
    return autoparallel.make_plan(
        stack, example_inputs=torch.zeros(8192, 256), hardware="dgx-a100", **choices
    )


def test_a_plans_step_is_that_of_its_schedule() -> None:
    """The plan's seconds, its timeline, its trace, also of a plan that was read."""
    plan = planned()
    step = autoparallel.timeline(Plan.from_json(plan.to_json()))
    assert isinstance(step, PipelineTimeline)
    assert plan.pipeline is not None
    assert step.seconds == plan.step == plan.step_seconds
    assert step.bubble == pytest.approx(plan.pipeline.bubble)
    # What ranks compute and wait is all of their time, until all have gone back.
    passes = step.forward_seconds + step.backward_seconds
    update = step.busy(COMPUTE, "update")
    assert step.busy(COMPUTE) - update == pytest.approx(passes * (1 - step.bubble))
    assert passes + max(plan.pipeline.once_seconds) == pytest.approx(step.seconds)
    sends = [event for event in step.events if event.stream == COMMUNICATION]
    assert len(sends) == 2 * 4
    rows = json.loads(trace_json(step))["traceEvents"]
    assert {row["pid"] for row in rows} == {0, 1}
    assert sum(row["name"] == "process_name" for row in rows) == 2
    assert step.places_text.count("\n") == 1
    with pytest.raises(PlanError, match="as it was planned"):
        autoparallel.timeline(plan, hardware="dgx-h100")


def test_micro_batches_are_chosen_by_the_step() -> None:
    """The number that is chosen is no slower than those beside it."""
    chosen = planned(microbatches=None)
    assert chosen.pipeline is not None
    count = chosen.pipeline.microbatches
    assert count > 1
    for other in (count // 2, 2 * count):
        assert planned(microbatches=other).step >= chosen.step * 0.99
