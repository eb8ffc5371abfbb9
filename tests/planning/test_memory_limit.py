"""The limit on what is counted is lowered by guess, and raised again where that was too far."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import autoparallel
from autoparallel import Mesh
from autoparallel.planning import closest_plan, memory_limit
from autoparallel.strategy.stage_shares import WHOLE_MODEL
from autoparallel.train.models import GPT, GPTConfig
from planners import OverLimitError, Solution

# By what is counted: the cost, and the bytes that the plan really takes. Of 100 that are allowed.
CASES = {
    40: (12.0, 80),
    50: (10.0, 90),
    56: (9.5, 97),
    60: (9.0, 99),
    64: (8.0, 130),
    70: (7.0, 120),
}


class Solver:
    """Finds the cheapest case within a limit; knows those that it has found."""

    def __init__(self, known: list[Solution]) -> None:
        self.known, self.limits = known, list[float]()
        self.start, self.rough = None, list[bool]()

    def within(self, limit: float, charge_alone: bool = False) -> Solution:
        self.limits.append(limit)
        self.rough.append(charge_alone)
        able = [usage for usage in CASES if usage <= limit]
        if not able:
            raise OverLimitError(40, 40, limit)
        self.known.append(solution_of(min(able, key=lambda usage: CASES[usage][0])))
        return self.known[-1]


def solution_of(usage: int) -> Solution:
    return Solution({}, CASES[usage][0], 0.0, "", usage)


def read(*args: Any) -> tuple[Any, Any]:
    """A case as a plan, and what it takes."""
    solution = args[3]
    plan = SimpleNamespace(cost=solution.cost, memory_price=0.0)
    return plan, SimpleNamespace(total=CASES[int(solution.usage)][1], worst="")


def raised(
    monkeypatch: pytest.MonkeyPatch, known: list[int], gap: float = 0.01
) -> tuple[float, Solver]:
    """The bytes counted of the plan that is taken where 50 fitted and nothing within 70 did."""
    monkeypatch.setattr(closest_plan, "_read", read)
    monkeypatch.setattr(closest_plan, "replace", lambda plan, **changes: plan)
    plan, account = read(None, None, None, solution_of(50))
    network = SimpleNamespace(options=SimpleNamespace(memory_limit=100, gap=gap))
    solve = Solver([solution_of(usage) for usage in known])
    best = closest_plan.Candidate(plan, account, 50)
    search = closest_plan._Raised(
        cast(Any, None), "", cast(Any, network), cast(Any, solve), cast(Any, None), best, 70, 6.0
    )
    return search.run(cast(Any, lambda limit: limit), 1.0).counted, solve


def test_what_was_looked_at_is_taken_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closest_plan, "_MOST_RAISES", 0)
    assert raised(monkeypatch, [50, 70])[0] == 50
    assert raised(monkeypatch, [40, 56, 50, 64])[0] == 56


def test_limits_between_two_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    best, solve = raised(monkeypatch, [50, 70])
    assert best == 60
    assert solve.limits[0] == 60


def test_near_the_bound_nothing_more_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    best, solve = raised(monkeypatch, [50, 56, 60], gap=0.5)
    assert best == 50
    assert not solve.limits


def looked_for(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[float, Solver]:
    """The cost of the plan that is closest to 100 bytes, and the solver that was asked."""
    monkeypatch.setattr(closest_plan, "_read", read)
    monkeypatch.setattr(closest_plan, "replace", lambda plan, **changes: plan)
    limits = SimpleNamespace(within=lambda limit: limit)
    network = SimpleNamespace(
        options=SimpleNamespace(memory_limit=100, gap=0.01),
        shares=WHOLE_MODEL,
        fixed_nbytes=0,
        moment=SimpleNamespace(call=""),
        problem=lambda *arguments: limits,
    )
    solve, nothing = Solver([]), cast(Any, None)
    found, _ = closest_plan.closest(
        nothing, "", cast(Any, network), cast(Any, solve), {}, nothing, **options
    )
    return found.plan.cost, solve


def test_solutions_are_rough_until_no_moment_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, solve = looked_for(monkeypatch)
    assert cost == 9.0
    assert solve.limits[:3] == [100, 100, 50]
    assert solve.rough == [True] + [False] * (len(solve.rough) - 1)


def test_a_mode_that_cannot_be_better_is_left_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looked_for(monkeypatch, beat=0.0)[1].limits == [100]


@pytest.mark.broad
def test_recomputed_blocks_take_their_memory_later() -> None:
    """A block that is run again has all of its activations then, which the search learns from the
    plans that it makes. Plans without such blocks are looked at where that leaves it far away.
    """
    with torch.device("meta"):
        model = GPT(GPTConfig(layers=2, hidden=64, heads=4, vocabulary=256, positions=64))
    options: dict[str, Any] = {"mesh": Mesh(dp=2, tp=2), "hardware": "dgx-a100"}
    options["example_inputs"] = model.example_inputs(batch=8)
    free = autoparallel.make_plan(model, **options)
    options["memory_limit"] = int(0.727 * sum(size for _, size in free.memory))
    chosen = autoparallel.make_plan(model, **options)
    without = autoparallel.make_plan(model, recompute="none", **options)
    wide = memory_limit._WIDE * chosen.options.gap
    assert chosen.cost <= max(without.cost, chosen.lower_bound / (1 - wide)) * (1 + 1e-9)
    # A bound of all modes holds for each of them.
    assert chosen.lower_bound <= without.cost
