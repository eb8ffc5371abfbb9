"""Dropping dominated states, against brute force."""

import numpy as np
import pytest
from planner_problems import priced_problem

from planners import Factor, InfeasibleError, Problem, Variable, exact, exhaustive
from planners.dominance import without_dominated
from planners.reduction import ContradictionError, reduce
from planners.table_memo import Memo


def left(problem: Problem) -> dict[str, list[int]]:
    """The states that stay, by variable."""
    memo = Memo()
    network = without_dominated(problem, reduce(problem, memo), memo)
    return {
        name: list(map(int, states))
        for name, states in zip(problem.names, network.states, strict=True)
    }


@pytest.mark.parametrize("multiplier", [0.0, 0.3])
def test_an_optimum_stays(multiplier: float) -> None:
    """On 300 random problems with forbidden entries, tables over three variables and ties."""
    dropped = kept = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        problem = priced_problem(rng, int(rng.integers(2, 7)), 4).weighed(multiplier)
        try:
            expected = exhaustive.solve(problem)
            states = left(problem)
        except (InfeasibleError, ContradictionError):
            continue
        fewer = problem.restricted({name: np.array(some) for name, some in states.items()})
        assert exhaustive.solve(fewer).cost == pytest.approx(expected.cost)
        dropped += sum(v.size for v in problem.variables) - sum(map(len, states.values()))
        kept += sum(len(some) > 1 for some in states.values())
    # Else nothing was put to the test.
    assert dropped > 100
    assert kept > 100


def test_of_equal_states_the_first_stays() -> None:
    table = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    problem = Problem(
        (Variable("a", np.zeros(3)), Variable("b", np.zeros(2))), (Factor(("a", "b"), table),)
    )
    assert left(problem) == {"a": [0, 2], "b": [0, 1]}


def test_a_state_that_allows_more_is_not_dominated() -> None:
    """State 1 costs less wherever it is possible, but state 0 goes with b=1, too."""
    table = np.array([[3.0, 9.0], [0.0, np.inf]])
    problem = Problem(
        (Variable("a", np.zeros(2)), Variable("b", np.array([50.0, 0.0]))),
        (Factor(("a", "b"), table),),
    )
    assert left(problem) == {"a": [0, 1], "b": [0, 1]}
    assert left(problem.pinned({"b": 0})) == {"a": [1], "b": [0]}


def test_the_optimum_is_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(60):
        problem = priced_problem(np.random.default_rng(seed), 9, 4).weighed(0.0)
        try:
            plain = exact.solve(problem)
        except InfeasibleError:
            continue
        with monkeypatch.context() as patch:
            patch.setattr(exact, "_LITTLE_WORK", -1)
            solution = exact.solve(problem)
        assert solution.cost == pytest.approx(plain.cost)
        assert problem.cost(solution.assignment) == solution.cost


def test_least_costs_among_states_are_those_of_all_marginals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dominated states are dropped, but not those that are asked for, nor what they need."""
    dropped = asked = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        problem = priced_problem(rng, 7, 4).weighed(0.0)
        states = {
            variable.name: np.flatnonzero(rng.random(variable.size) < 0.5).tolist()
            for variable in problem.variables[::2]
        }
        states = {name: some for name, some in states.items() if some}
        try:
            marginals = exact.min_marginals(problem, states)
        except InfeasibleError:
            continue
        with monkeypatch.context() as patch:
            patch.setattr(exact, "_LITTLE_WORK", -1)
            least = exact.least_among(problem, states)
        for name, some in states.items():
            assert least[name] == pytest.approx(np.min(marginals[name][some]))
            asked += np.isfinite(least[name])
        memo = Memo()
        network = reduce(problem, memo)
        flags = {
            problem.index(name): np.isin(np.arange(problem.variable(name).size), some)
            for name, some in states.items()
        }
        fewer = without_dominated(problem, network, memo, flags)
        dropped += sum(network.sizes) - sum(fewer.sizes)
    # Else nothing was put to the test.
    assert dropped > 30
    assert asked > 60
