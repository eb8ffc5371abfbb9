"""Costs of states: exact where the problem is narrow, and a true range where it is not."""

from __future__ import annotations

import numpy as np
import pytest
from test_conditioning import loop

from planners import Problem, conditioning, exact
from planners.state_costs import StateCosts


def separate(seed: int) -> Problem:
    """Two loops that share nothing."""
    parts = [loop(8, 3, 5, seed), loop(6, 3, 4, seed + 1)]
    variables, factors = [], []
    for number, part in enumerate(parts):
        variables += [type(v)(f"{number} {v.name}", v.unary) for v in part.variables]
        factors += [
            type(f)(tuple(f"{number} {name}" for name in f.scope), f.table) for f in part.factors
        ]
    return Problem(tuple(variables), tuple(factors))


PROBLEMS = {"loop": loop(12, 4, 6, 1), "few": loop(8, 3, 5, 0), "two parts": separate(3)}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_cost_of_every_state_is_in_its_range(problem: Problem) -> None:
    """Held are so few variables that the rest is narrow, at an assignment that is not the best."""
    start = conditioning.solve(problem, max_table_entries=4**2).assignment
    start = {**start, problem.names[0]: 0}
    costs = StateCosts(problem, start, max_table_entries=4**2)
    ranges = costs.of(problem.names)
    assert costs.is_wide
    true = exact.min_marginals(problem, problem.names)
    near = 0
    for name, table in true.items():
        slack = 1e-9 * abs(table)
        assert (ranges[name].least <= table + slack).all(), name
        assert (ranges[name].most >= table - slack).all(), name
        near += int((ranges[name].most <= table + slack).sum())
        # The assignment is one of those that are counted.
        assert ranges[name].most[start[name]] <= problem.cost(start) + slack[0]
    assert near


def test_a_narrow_problem_is_told_exactly() -> None:
    """Both ends are the cost itself."""
    problem = loop(8, 2, 4, 5)
    start = exact.solve(problem).assignment
    costs = StateCosts(problem, start)
    ranges = costs.of(["hub 0", "step 3"])
    assert not costs.is_wide
    assert list(ranges) == ["hub 0", "step 3"]
    for name, one in ranges.items():
        for state in range(problem.variable(name).size):
            wanted = exact.solve(problem.pinned({name: state})).cost
            assert one.least[state] == pytest.approx(wanted, rel=1e-9)
            assert one.most[state] == one.least[state]


def test_too_much_work_is_a_wide_problem() -> None:
    """As little as is allowed."""
    problem = loop(8, 2, 4, 5)
    costs = StateCosts(problem, dict.fromkeys(problem.names, 0), most_work=1.0)
    ranges = costs.of(["step 3"])
    assert costs.is_wide
    assert np.isfinite(ranges["step 3"].most).all()
