"""The problem itself: what it refuses, what it shares, and how parts of it are fixed."""

import numpy as np
import pytest
from planner_problems import layered_problem

from planners import Factor, Problem, Variable, exact, exhaustive, ilp

A, B = Variable("a", np.zeros(2)), Variable("b", np.zeros(3))


@pytest.mark.parametrize(
    ("variables", "factors", "message"),
    [
        ((A, A), (), "'a' is declared twice"),
        ((A,), (Factor(("a", "b"), np.zeros((2, 3))),), "unknown variable 'b'"),
        ((A, B), (Factor(("a", "b"), np.zeros((3, 2))),), r"shape \(3, 2\), not \(2, 3\)"),
        ((A, B), (Factor(("a", "b"), np.zeros(2)),), r"shape \(2,\), not \(2, 3\)"),
        ((A,), (Factor(("a", "a"), np.zeros((2, 2))),), "add to the unary table"),
        ((A, B), (Factor(("a", "b"), np.full((2, 3), np.nan)),), "'a' and 'b' holds NaN"),
        ((A, B), (Factor(("b", "a"), np.full((3, 2), -np.inf)),), "'b' and 'a' holds -inf"),
        ((Variable("c", np.array([0.0, np.nan])),), (), "unary table of 'c' holds NaN"),
        ((Variable("c", np.array([-np.inf])),), (), "unary table of 'c' holds -inf"),
        ((Variable("c", np.zeros(0)),), (), "must be a vector"),
        ((Variable("c", np.zeros((1, 1))),), (), "must be a vector"),
    ],
)
def test_malformed_problems_are_refused(
    variables: tuple[Variable, ...], factors: tuple[Factor, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Problem(variables, factors)


def test_malformed_assignments_are_refused() -> None:
    problem = Problem((A, B))
    with pytest.raises(ValueError, match="lacks variable 'b'"):
        problem.cost({"a": 0})
    with pytest.raises(ValueError, match="unknown variable 'c'"):
        problem.cost({"a": 0, "b": 0, "c": 0})
    with pytest.raises(ValueError, match="state -1 of 'b' is out of range: it has 3"):
        problem.cost({"a": 0, "b": -1})


def test_pinned_fixes_states_and_keeps_their_cost() -> None:
    problem = layered_problem(2, width=3, states=3, shared=1)
    pinned = problem.pinned({"0.1": 2, "shared0": 1})
    for solver in (exact, ilp, exhaustive):
        solution = solver.solve(pinned)
        assert (solution.assignment["0.1"], solution.assignment["shared0"]) == (2, 1)
        assert problem.cost(solution.assignment) == solution.cost
    assert pinned.factors == problem.factors
    assert exact.solve(problem).cost <= exact.solve(pinned).cost
    with pytest.raises(ValueError, match=r"state 3 of '0\.1' is out of range"):
        problem.pinned({"0.1": 3})
    with pytest.raises(ValueError, match="unknown variable 'x'"):
        problem.pinned({"x": 0})


def test_tables_are_kept_by_reference_and_cannot_be_written() -> None:
    problem = layered_problem(4)
    ours = {id(v.unary.base) for v in problem.variables if v.name.endswith(".1")}
    assert len(ours) == 1
    with pytest.raises(ValueError, match="read-only"):
        problem.variables[0].unary[0] = 1.0


def test_problem_text() -> None:
    assert layered_problem(3).text() == (
        "20 variables of 3 to 4 states (mean 3.9)\n"
        "38 factors between 38 groups; 21 distinct tables, 0.00 MiB"
    )
    assert exact.solve(Problem((Variable("a", np.array([2.0, 1.5])),))).text() == (
        "cost 1.5, bound 1.5, gap 0 (variable elimination, 1 variables)"
    )


def test_another_limit() -> None:
    """The tables are the same objects, and the limit is checked as before."""
    problem = Problem((Variable("a", np.zeros(2), np.array([4.0, 0.0])),), limit=3.0)
    looser = problem.within(5.0)
    assert (problem.limit, looser.limit) == (3.0, 5.0)
    assert looser == Problem(problem.variables, problem.factors, 5.0)
    assert looser.variables is problem.variables
    assert looser.cost({"a": 1}) == 0.0
    with pytest.raises(ValueError, match="NaN"):
        problem.within(np.nan)
