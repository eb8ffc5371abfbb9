"""A plan and a timeline print as short texts, which need nothing that the plan's JSON lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.analysis.communication import collective_totals
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.plan import Break, Plan
from autoparallel.support.units import bytes_text, seconds_text
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.report import plan_text

MOST_LINES = 12


def gpt() -> nn.Module:
    return GPT(GPTConfig(4, hidden=64, heads=8, vocabulary=212, positions=64, dropout=0.0))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return autoparallel.make_plan(gpt(), mesh=Mesh(dp=2, tp=2), hardware="dgx-a100")


@pytest.fixture(scope="module")
def staged() -> Plan:
    return autoparallel.make_plan(gpt(), mesh=Mesh(pp=2, tp=1), microbatches=4, schedule="1f1b")


@pytest.fixture(scope="module")
def limited(plan: Plan) -> Plan:
    limit = sum(nbytes for _, nbytes in plan.memory) * 3 // 4
    inputs = gpt().example_inputs()
    return autoparallel.make_plan(
        gpt(),
        mesh=Mesh(dp=2, tp=2),
        hardware="dgx-a100",
        memory_limit=limit,
        recompute="full",
        example_inputs=inputs,
    )


def test_a_plan_prints_as_a_dozen_lines(plan: Plan) -> None:
    rows = dict(line.split(maxsplit=1) for line in str(plan).splitlines())
    assert len(rows) <= MOST_LINES
    assert rows["mesh"] == "Mesh(dp=2, tp=2), 4 ranks"
    assert (rows["model"], rows["hardware"]) == ("GPT", "dgx-a100")
    assert seconds_text(plan.step_seconds) in rows["step"]
    assert plan.step_proof in rows["step"]
    assert f"lower bound {plan.lower_bound:.6g}" in rows["cost"]
    assert f"{plan.split_flops:.1%} of the FLOPs" in rows["split"]
    assert bytes_text(sum(nbytes for _, nbytes in plan.memory)) in rows["memory"]
    number = sum(count for count, _ in collective_totals(plan).values())
    assert rows["collectives"].startswith(f"{number} in one step: ")
    assert number > 0


def test_what_is_not_proven_is_told_so(plan: Plan) -> None:
    assert "at most 25.00% above" in str(replace(plan, lower_bound=plan.cost * 0.75))


def test_what_is_left_as_python_is_told(plan: Plan) -> None:
    lines = str(replace(plan, breaks=(Break("head", "", "a branch on a value"),))).splitlines()
    assert lines[-1].split(maxsplit=2)[2] == "1 of its modules"
    assert len(lines) <= MOST_LINES


def test_a_limited_plan_tells_the_limit_and_what_runs_again(limited: Plan) -> None:
    assert limited.memory_limit is not None
    text = str(limited)
    assert f" of {bytes_text(limited.memory_limit)} allowed" in text
    assert "recomputed   4 blocks" in text
    assert len(text.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("which", ["plan", "limited"])
def test_a_plan_that_was_read_is_equal_and_prints_the_same(
    which: str, request: pytest.FixtureRequest
) -> None:
    own = request.getfixturevalue(which)
    read = Plan.from_json(own.to_json())
    assert read == own
    assert str(read) == str(own)
    assert repr(read) == repr(own)


def test_a_text_without_counts_is_read_and_printed_without_them(plan: Plan) -> None:
    """Texts of version 2 need not have them."""
    rows = json.loads(plan.to_json())
    rows["memory"] = {}
    del rows["collectives"]
    text = str(Plan.from_json(json.dumps(rows)))
    assert "memory" not in text
    assert "collectives" not in text


def test_reprs_are_short(plan: Plan) -> None:
    for value in (plan, autoparallel.timeline(plan)):
        assert len(repr(value)) < 100
        assert "\n" not in repr(value)
    assert repr(
        plan
    ) == f"<Plan: GPT on Mesh(dp=2, tp=2), {seconds_text(plan.step_seconds)} a step, " + (
        f"{plan.step_proof}>"
    )


def test_a_timeline_prints_as_a_few_lines() -> None:
    layer, inputs = nn.Linear(64, 64), torch.zeros(32, 64)
    plan = autoparallel.make_plan(layer, 1, example_inputs=inputs, hardware="dgx-a100")
    timeline = autoparallel.timeline(plan)
    rows = dict(line.split(maxsplit=1) for line in str(timeline).splitlines())
    assert rows["step"] == f"{seconds_text(timeline.seconds)}, predicted, on 1 rank"
    assert rows["communicating"].startswith("0 s;")
    assert rows["utilization"].startswith(f"{timeline.mfu:.1%}")


def test_a_plan_that_does_not_fit_says_so() -> None:
    """Nobody has asked for a limit, but a device has one."""
    with torch.device("meta"):
        layer, inputs = nn.Linear(2**17, 2**17, bias=False), torch.zeros(4, 2**17)
    plan = autoparallel.make_plan(layer, 2, example_inputs=inputs, hardware="dgx-a100")
    assert plan.device_nbytes == 85197848576
    assert plan.excess_nbytes == sum(size for _, size in plan.memory) - plan.device_nbytes > 0
    assert "MORE THAN A DEVICE HAS: 79.3 GiB" in str(plan)
    assert "DOES NOT FIT" in plan_text(plan)
    again = Plan.from_json(plan.to_json())
    assert again.excess_nbytes == plan.excess_nbytes
    fits = autoparallel.make_plan(layer, 64, example_inputs=inputs, hardware="dgx-a100")
    assert fits.excess_nbytes == 0
    assert "DOES NOT FIT" not in plan_text(fits)


@pytest.mark.parametrize("sizes", ["given", "planned", "dims"])
def test_a_text_with_other_sizes_than_dims_is_refused(plan: Plan, sizes: str) -> None:
    rows = json.loads(plan.to_json())
    rows["inputs"][0][sizes] = rows["inputs"][0][sizes][1:]
    with pytest.raises(PlanError, match="sizes"):
        Plan.from_json(json.dumps(rows))


@pytest.mark.parametrize(
    ("place", "content", "why"),
    [
        ("ops 3 operands 0", "I", "a tensor of op"),
        ("ops 3 makes", [], "layouts for more or fewer tensors"),
        ("ops 3 kernels", [""], "has 1 kernels on Mesh"),
        ("parameters 0 state", "I | S(2)", "and has 2 dims"),
        ("parameters 0 state", "I", "parameter "),
        ("conversions 0 target", "S(0) | S(1)", ", not to S(0) | S(1)"),
        ("conversions 0 steps 0", [1, "P", "R"], "step 1: P -> R of value"),
        ("conversions 0 steps 0", [2, "I", "R"], "step 2: I -> R of value"),
        ("conversions 1 shape", "", "and has 0 dims"),
        ("returned", ["a", "b", "c"], "there are 3 names of what is returned"),
    ],
)
def test_a_text_that_contradicts_itself_is_refused(
    plan: Plan, place: str, content: object, why: str
) -> None:
    """It would be shown without its model, and what is told would be wrong, or fail."""
    rows = json.loads(plan.to_json())
    _write(rows, place, content)
    with pytest.raises(PlanError, match="not a plan") as caught:
        Plan.from_json(json.dumps(rows))
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("place", "content", "why"),
    [
        ("ranks", 0, "0 ranks do not share 2 stages"),
        ("stages", 3, "2 ranks do not share 3 stages"),
        ("microbatches", 0, "no micro-batches"),
        ("schedule", "fast", "there is no schedule 'fast'"),
        ("starts", ["a"], "starts has 1 entries for 2 stages"),
        ("seconds", [], "seconds has 0 entries for 2 stages"),
        ("weight_seconds", [0.5], "weight_seconds has 1 entries for 2 stages"),
        ("in_flight", [1, 1, 1], "in_flight has 3 entries for 2 stages"),
        ("memory", [1], "memory has 1 entries for 2 ranks"),
    ],
)
def test_stages_that_contradict_themselves_are_refused(
    staged: Plan, place: str, content: object, why: str
) -> None:
    rows = json.loads(staged.to_json())
    _write(rows, f"pipeline {place}", content)
    with pytest.raises(PlanError, match="not a plan") as caught:
        Plan.from_json(json.dumps(rows))
    assert why in caught.value.why


def test_what_an_older_text_does_not_tell_is_left_out(staged: Plan) -> None:
    rows = json.loads(staged.to_json())
    for name in "forward_seconds weight_seconds once_seconds back_nbytes in_flight memory".split():
        del rows["pipeline"][name]
    for op in rows["ops"]:
        del op["kernels"]
    read = Plan.from_json(json.dumps(rows))
    assert read.pipeline is not None
    assert not read.pipeline.memory
    assert "1f1b" in plan_text(read)


def _write(rows: Any, place: str, content: object) -> None:
    """Write one place of nested rows. place: the way to it, as keys and numbers."""
    *way, last = [int(step) if step.isdecimal() else step for step in place.split()]
    for step in way:
        rows = rows[step]
    assert rows[last] != content
    rows[last] = content
