"""Planning within a limit: usage, alternatives and tables over several variables."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_problems import limited_problem, priced_problem

from planners import (
    Alternative,
    Factor,
    InfeasibleError,
    OverLimitError,
    Problem,
    Solution,
    Variable,
    exact,
    exhaustive,
    ilp,
    min_marginals,
)

seeds = st.integers(0, 2**32 - 1)


def accounts_for(problem: Problem, solution: Solution) -> None:
    """Cost and usage are those of the assignment, paid the way that the solution says."""
    costs, usages = [], []
    items: list[Variable | Factor] = [*problem.variables, *problem.factors]
    scopes = [(name,) for name in problem.names] + [f.scope for f in problem.factors]
    ways = [*solution.variable_alternatives, *solution.factor_alternatives]
    for item, scope, way in zip(items, scopes, ways, strict=True):
        entry = tuple(solution.assignment[name] for name in scope)
        cost, usage = list(item.prices.at(entry))[way]
        costs.append(cost)
        usages.append(usage)
    assert math.isclose(solution.cost, math.fsum(costs), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(solution.usage, math.fsum(usages), rel_tol=1e-9, abs_tol=1e-9)
    assert solution.lower_bound <= solution.cost
    assert problem.fits(solution.usage)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=seeds)
def test_tables_over_several_variables_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = priced_problem(rng, int(rng.integers(2, 7)), 3)
    try:
        expected = exhaustive.solve(problem)
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            exact.solve(problem)
        return
    solution = exact.solve(problem)
    assert solution.cost == pytest.approx(expected.cost)
    accounts_for(problem, solution)
    assert problem.cost(solution.assignment) == solution.cost
    for name, table in min_marginals(problem, problem.names[:2]).items():
        for state, value in enumerate(table):
            try:
                pinned = exhaustive.solve(problem.pinned({name: state})).cost
            except InfeasibleError:
                pinned = math.inf
            assert value == pytest.approx(pinned)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=seeds)
def test_integer_program_equals_brute_force_within_a_limit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = limited_problem(rng, int(rng.integers(1, 6)), 3, alternatives=1)
    try:
        expected = exhaustive.solve(problem)
    except OverLimitError as error:
        least = error.usage
        with pytest.raises(OverLimitError, match="the least usage found is") as raised:
            ilp.solve(problem)
        assert raised.value.usage == pytest.approx(least)
        assert problem.limit is not None
        assert problem.limit < raised.value.least <= raised.value.usage
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            ilp.solve(problem)
    else:
        solution = ilp.solve(problem)
        assert solution.cost == pytest.approx(expected.cost)
        accounts_for(problem, solution)
        accounts_for(problem, expected)
        assert ilp.lp_bound(problem) <= expected.cost + 1e-9


def test_every_table_says_how_it_is_paid() -> None:
    """Two things to keep or to make again: the limit lets one be kept, the dearer to make."""
    unary = Variable("a", np.zeros(2), np.array([8.0, 9.0]), (Alternative(np.array([3.0, 1.0])),))
    table = np.array([[5.0, 5.0], [0.0, 0.0]])
    factor = Factor(("b", "a"), table, np.full((2, 2), 8.0), (Alternative(table + 2.0),))
    problem = Problem((unary, Variable("b", np.array([0.0, 1.0]))), (factor,), limit=8.0)
    for solver in (exhaustive, ilp):
        solution = solver.solve(problem)
        assert solution.assignment == {"a": 1, "b": 1}
        assert (solution.cost, solution.usage) == (2.0, 8.0)
        assert (solution.variable_alternatives, solution.factor_alternatives) == ((1, 0), (0,))
    free = exact.solve(problem)
    assert (free.cost, free.usage) == (1.0, 16.0)
    spent = problem.spent({"a": 1, "b": 1}, multiplier=1.0)
    assert (spent.cost, spent.usage) == (4.0, 0.0)
    assert problem.weighed(0.125).cost({"a": 1, "b": 1}) == 1.0 + 1.0 + 1.0
    assert "usage of at most 8" in problem.text()
    assert "usage 16" in free.text()


def test_shared_tables_stay_shared_when_weighed() -> None:
    costs, usage = np.eye(3), np.ones((3, 3))
    variables = tuple(Variable(f"v{i}", np.zeros(3)) for i in range(4))
    factors = tuple(Factor((f"v{i}", f"v{i + 1}"), costs, usage) for i in range(3))
    weighed = Problem(variables, factors).weighed(2.0)
    assert weighed.plain
    assert len({id(factor.table) for factor in weighed.factors}) == 1


@pytest.mark.parametrize(
    ("usage", "alternatives", "limit", "message"),
    [
        (np.zeros(3), (), None, r"usage of 'a' has shape \(3,\), not \(2,\)"),
        (np.array([0.0, np.inf]), (), None, "usage of 'a' holds inf"),
        (None, (Alternative(np.zeros(3)),), None, "alternative unary table of 'a' has shape"),
        (None, (Alternative(np.zeros(2), np.zeros(1)),), None, "usage of an alternative"),
        (None, (), math.nan, "the limit is NaN"),
    ],
)
def test_malformed_usage_is_refused(
    usage: np.ndarray | None,
    alternatives: tuple[Alternative, ...],
    limit: float | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        Problem((Variable("a", np.zeros(2), usage, alternatives),), (), limit)
