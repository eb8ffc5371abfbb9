"""Planning by groups of states: the bound holds, and what is found is near the optimum."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_problems import priced_problem

from planners import (
    Factor,
    InfeasibleError,
    Problem,
    Solution,
    Table,
    Variable,
    conditioning,
    exact,
    exhaustive,
)
from planners import coarsening as coarse
from planners import lagrangian as limited

seeds = st.integers(0, 2**32 - 1)


def axes_problem(
    rng: np.random.Generator, count: int, sizes: tuple[int, ...]
) -> tuple[Problem, list[coarse.Grouping]]:
    """A chain with skips whose states are choices on several axes, and what merges each axis.

    Costs are nearly a sum over the axes; a choice on one changes what the others cost a little.
    """
    states = np.indices(sizes).reshape(len(sizes), -1)
    weights = [1.0, 0.4, 0.15][: len(sizes)]

    def table(scope: int) -> Table:
        parts = [rng.random((size,) * scope) for size in sizes]
        total = sum(
            weight * part[np.ix_(*[own] * scope)]
            for weight, part, own in zip(weights, parts, states, strict=True)
        )
        return np.asarray(total) * (1.0 + 0.2 * rng.random((states.shape[1],) * scope))

    tables = [table(2) for _ in range(3)]
    variables = tuple(Variable(f"v{i}", table(1)) for i in range(count))
    factors = [
        Factor((f"v{i}", f"v{i + step}"), tables[(i + step) % 3])
        for step in (1, 2)
        for i in range(count - step)
    ]
    groupings: list[coarse.Grouping] = []
    for axis in range(len(sizes)):
        others = [own for k, own in enumerate(states) if k != axis]
        _, groups = np.unique(np.stack(others), axis=1, return_inverse=True)
        groupings.append({f"v{i}": groups.reshape(-1) for i in range(count)})
    return Problem(variables, tuple(factors)), groupings


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=seeds)
def test_brackets_brute_force(seed: int) -> None:
    """With random groups of random problems, some of them impossible."""
    rng = np.random.default_rng(seed)
    problem = priced_problem(rng, int(rng.integers(1, 7)), 4)
    groupings = []
    for _ in range(int(rng.integers(0, 3))):
        grouping = {}
        for variable in problem.variables:
            if rng.random() < 0.8:
                drawn = rng.integers(0, max(1, variable.size - 1), variable.size)
                grouping[variable.name] = np.unique(drawn, return_inverse=True)[1].reshape(-1)
        groupings.append(grouping)
    # Exactly, by fixing some variables, or without any groups where these are too wide.
    limit = int(rng.choice([2**22, 16, 1]))
    try:
        expected = exhaustive.solve(problem).cost
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            coarse.solve(problem, groupings, max_table_entries=limit)
        return
    solution = coarse.solve(problem, groupings, max_table_entries=limit)
    assert solution.lower_bound <= expected + 1e-9
    assert solution.cost >= expected - 1e-9
    assert problem.spent(solution.assignment).cost == solution.cost


def test_three_axes_come_near_the_optimum() -> None:
    problem, groupings = axes_problem(np.random.default_rng(1), 12, (3, 4, 3))
    optimum = exact.solve(problem).cost
    solution = coarse.solve(problem, groupings)
    assert solution.lower_bound <= optimum <= solution.cost <= 1.01 * optimum
    assert solution.lower_bound >= 0.7 * optimum
    assert coarse.solve(problem, groupings) == solution
    for grouping in groupings:
        assert exact.solve(coarse.merged(problem, grouping)).cost <= optimum
    best = exact.solve(problem).assignment
    assert coarse.solve(problem, groupings, start=best).cost == optimum


def test_too_wide_groupings_are_passed_over() -> None:
    problem, groupings = axes_problem(np.random.default_rng(2), 6, (2, 3))
    optimum = exact.solve(problem).cost
    solution = coarse.solve(problem, groupings, max_table_entries=4)
    assert solution.lower_bound <= optimum <= solution.cost


def test_groups_that_are_too_wide_are_conditioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem itself, whose states are many, is not: that would take far longer."""
    problem, groupings = axes_problem(np.random.default_rng(2), 12, (3, 4))
    optimum = exact.solve(problem).cost
    solved: list[int] = []
    solve = conditioning.solve

    def counted(part: Problem, **options: Any) -> Solution:
        solved.append(max(variable.size for variable in part.variables))
        return solve(part, **options)

    monkeypatch.setattr(conditioning, "solve", counted)
    solution = coarse.solve(problem, groupings, max_table_entries=8)
    assert solution.lower_bound <= optimum <= solution.cost <= 1.05 * optimum
    assert solution.lower_bound >= 0.5 * optimum
    assert solved == [4, 3, 3, 4]


def test_within_a_limit() -> None:
    """As the solver of plain problems in a search within a limit: its bounds stay bounds."""
    rng = np.random.default_rng(3)
    problem, groupings = axes_problem(rng, 8, (3, 2))
    usage = 1.0 + rng.random(6)
    variables = tuple(Variable(v.name, v.unary, usage) for v in problem.variables)
    problem = Problem(variables, problem.factors, limit=8 * 1.3)
    optimum = limited.solve(problem, enough=0.0).cost
    solution = limited.solve(problem, solver=lambda plain: coarse.solve(plain, groupings))
    assert problem.fits(solution.usage)
    assert solution.lower_bound <= optimum <= solution.cost + 1e-9
    proven = limited.solve(
        problem, solver=lambda plain: coarse.solve(plain, groupings), prover=exact.solve
    )
    assert solution.lower_bound < proven.lower_bound <= optimum <= proven.cost + 1e-9


def test_groups_that_do_not_fit_are_refused() -> None:
    problem = Problem((Variable("a", np.zeros(3)),))
    with pytest.raises(ValueError, match=r"groups of 'a' have shape \(2,\), not \(3,\)"):
        coarse.solve(problem, [{"a": np.array([0, 1])}])
    with pytest.raises(ValueError, match="numbered from 0 on"):
        coarse.solve(problem, [{"a": np.array([0, 2, 2])}])
    with pytest.raises(ValueError, match="unknown variable 'b'"):
        coarse.solve(problem, [{"b": np.array([0])}])
