"""A search that is ended early returns the best so far, with what is proven of it."""

from __future__ import annotations

import io
import math
import sys
from typing import Any

import pytest
import torch
from broad_cases import broad
from torch import nn

import autoparallel
from autoparallel import Mesh, Plan
from autoparallel.errors import PlanError
from autoparallel.planning import planning_progress as progress
from autoparallel.planning.step_search import StepSearch
from autoparallel.train.models import GPT, GPTConfig
from planners import exact
from planners.effort import Effort, effort

pytestmark = pytest.mark.usefixtures("one_trace")
MESH = Mesh(dp=2, tp=2)


def planned(**options: Any) -> Plan:
    """The plan of a GPT of one layer."""
    with torch.device("meta"):
        model = GPT(GPTConfig(layers=1, hidden=64, heads=4, vocabulary=256, positions=64))
    options = {"mesh": MESH, "hardware": "dgx-a100", **options}
    return autoparallel.make_plan(model, example_inputs=model.example_inputs(batch=8), **options)


def need(plan: Plan) -> int:
    return sum(size for _, size in plan.memory)


@pytest.mark.parametrize("share", [None, *broad(0.8)], ids=["free", "within a limit"])
def test_the_search_ends_after_so_many_seconds(share: float | None) -> None:
    """It is the same plan each time, with a bound that holds, and it says so."""
    limit = None if share is None else int(need(planned()) * share)
    whole = planned(memory_limit=limit)
    assert "ended" not in whole.method
    short = planned(memory_limit=limit, seconds=1e-6)
    assert "ended after 1e-06 s" in short.method
    assert short.lower_bound <= whole.cost * (1 + 1e-9)
    assert short.lower_bound > 0.0
    assert short.step_bound <= whole.step_seconds <= short.step_seconds * (1 + 1e-9)
    if limit is not None:
        assert need(short) <= limit
    assert planned(memory_limit=limit, seconds=1e-6).to_json() == short.to_json()
    assert Plan.from_json(short.to_json()).options.seconds == 1e-6
    # A long time changes nothing but what was asked for.
    assert planned(memory_limit=limit, seconds=1e6).parameters == whole.parameters


@pytest.mark.parametrize("seconds", [0, -1.0, True, math.inf, math.nan, "10"])
def test_seconds_are_a_length_of_time(seconds: Any) -> None:
    with pytest.raises(PlanError, match="seconds="):
        planned(seconds=seconds)


def test_every_solve_counts() -> None:
    """Or the end of a search would never come."""
    with torch.device("meta"):
        model = nn.Linear(64, 64)
    plan = autoparallel.make_plan(model, 2, example_inputs=torch.zeros(4, 64, device="meta"))
    assert plan.captured is not None
    with effort(Effort()) as spent:
        autoparallel.make_plan(model, 2, example_inputs=torch.zeros(4, 64, device="meta"))
        # Planning has an effort of its own.
        assert spent.spent == 0.0
        from planner_problems import chain_problem

        exact.solve(chain_problem(4))
        once = spent.spent
        exact.solve(chain_problem(4))
    assert 0.0 < once < spent.spent


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_returns_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its bounds; but not on one of several ranks, which would have another plan."""
    whole = planned()
    monkeypatch.setattr(StepSearch, "reply_to_waits", interrupt)
    begun = planned()
    assert "interrupted" in begun.method
    assert 0 < begun.step_bound <= whole.step_seconds
    assert begun.lower_bound == pytest.approx(whole.lower_bound)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(KeyboardInterrupt):
        planned()


def test_an_interrupt_between_meshes_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tells how many were not tried; before there is a plan, it is what it always was."""
    first: list[Any] = []
    begin = StepSearch.__init__

    def once(self: StepSearch, *args: Any, **options: Any) -> None:
        if first:
            raise KeyboardInterrupt
        first.append(self)
        begin(self, *args, **options)

    monkeypatch.setattr(StepSearch, "__init__", once)
    plan = planned(mesh="auto", world_size=4)
    assert "interrupted" in plan.method
    assert "other meshes not tried" in plan.method
    with pytest.raises(KeyboardInterrupt):
        planned()


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar with the time that is left, on rank 0 alone."""
    with progress.planning_progress() as report:
        assert report is None
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    planned()
    assert "batch" in written.getvalue()
    assert "planning" in written.getvalue()
    monkeypatch.setenv("RANK", "1")
    with progress.planning_progress() as report:
        assert report is None
