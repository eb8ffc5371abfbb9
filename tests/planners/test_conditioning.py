"""Conditioning: what bounds rule out makes wide problems narrow, and their optima proven."""

import numpy as np
import pytest

from planners import Factor, Problem, Variable, conditioning, exact
from planners.table_memo import Memo


def loop(steps: int, hubs: int, states: int, seed: int) -> Problem:
    """A recurrence: a chain over time, of which every step reads the same few variables."""
    rng = np.random.default_rng(seed)
    names = [f"hub {number}" for number in range(hubs)]
    variables = [Variable(name, rng.random(states) * steps) for name in names]
    variables += [Variable(f"step {time}", rng.random(4)) for time in range(steps)]
    read = {name: rng.random((states, 4)) for name in names}
    after = rng.random((4, 4))
    factors = [
        Factor((name, f"step {time}"), read[name]) for time in range(steps) for name in names
    ]
    factors += [Factor((f"step {time}", f"step {time + 1}"), after) for time in range(steps - 1)]
    return Problem(tuple(variables), tuple(factors))


@pytest.mark.parametrize(
    ("steps", "hubs", "states", "seed"),
    [(8, 3, 5, 0), (12, 4, 6, 1), (12, 4, 6, 2), (16, 5, 6, 1)],
)
def test_the_optimum_of_a_loop_over_time_is_proven(
    steps: int, hubs: int, states: int, seed: int
) -> None:
    """Fixed and relaxed alone, the same search leaves gaps of up to 7%."""
    problem = loop(steps, hubs, states, seed)
    assert conditioning.cutset(problem, 4**2)
    solution = conditioning.solve(problem, max_table_entries=4**2)
    assert solution.cost == pytest.approx(exact.solve(problem).cost, rel=1e-12)
    assert solution.lower_bound == pytest.approx(solution.cost, rel=1e-9)


@pytest.mark.parametrize("kind", ["best", "any"])
def test_an_assignment_to_begin_with_changes_nothing_but_the_way(kind: str) -> None:
    problem = loop(12, 4, 6, 1)
    best = exact.solve(problem)
    start = best.assignment if kind == "best" else dict.fromkeys(problem.names, 0)
    solution = conditioning.solve(problem, start=start, max_table_entries=4**2)
    assert solution.cost == pytest.approx(best.cost, rel=1e-12)
    assert solution.lower_bound == pytest.approx(best.cost, rel=1e-9)


def test_single_states_are_improved_where_nothing_else_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest stays too wide here: the best that was found is no worse than any beside it."""
    kind = conditioning._Conditioning
    asked: list[str] = []

    def noting(name: str, result: object) -> object:
        def noted(*arguments: object) -> object:
            asked.append(name)
            return result(*arguments) if callable(result) else result

        return noted

    monkeypatch.setattr(kind, "finished", noting("finished", None))
    monkeypatch.setattr(kind, "improve", noting("improve", kind.improve))
    problem = loop(12, 4, 6, 2)
    names = conditioning.cutset(problem, 4**2)
    solution = conditioning.solve(problem, max_table_entries=4**2)
    assert asked == [*["finished"] * 4, "improve", "finished"]
    for name in names:
        others = {other: solution.assignment[other] for other in names if other != name}
        assert exact.solve(problem.pinned(others)).cost == pytest.approx(solution.cost, rel=1e-9)


def sheet(side: int, states: int, seed: int) -> Problem:
    """A square of variables, each of which shares a table with those beside it."""
    rng = np.random.default_rng(seed)
    places = [(row, column) for row in range(side) for column in range(side)]
    variables = tuple(Variable(str(place), rng.random(states)) for place in places)
    factors = [
        Factor((str((row, column)), str(other)), rng.random((states, states)))
        for row, column in places
        for other in ((row + 1, column), (row, column + 1))
        if other in places
    ]
    return Problem(variables, tuple(factors))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_few_rounds_bring_the_copies_together(seed: int) -> None:
    """Steps along a subgradient leave the bound more than 2% below."""
    problem = sheet(6, 4, seed)
    names = list(conditioning.cutset(problem, 4**2))
    search = conditioning._Conditioning(problem, names, 4**5, Memo(), {})
    search.run(6)
    optimum = exact.solve(problem).cost
    assert 0.98 * optimum < search.bound < optimum * (1 + 1e-9)
    for copies in search.copies.values():
        total = sum(search.multipliers[copy] for copy in copies)
        assert np.abs(total).max() < 1e-9
