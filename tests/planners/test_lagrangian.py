"""Planning within a limit: usage, alternatives and tables over several variables."""

import math
from dataclasses import replace

import numpy as np
import pytest
from broad_cases import broad
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_problems import chain_problem, limited_problem, priced_problem

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
from planners import lagrangian as limited
from planners import local_improvement as filling
from planners.charged_solutions import ChargedSolutions
from planners.integer_refinement import refine_by_integer_program

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


def bounds_the_optimum(seed: int) -> None:
    """Planning within a limit against brute force: never above it, and at it for small problems."""
    rng = np.random.default_rng(seed)
    problem = limited_problem(rng, int(rng.integers(1, 6)), 3, alternatives=1)
    try:
        expected = exhaustive.solve(problem)
    except OverLimitError as error:
        least = error.usage
        with pytest.raises(OverLimitError) as raised:
            limited.solve(problem)
        assert raised.value.usage == pytest.approx(least)
        assert raised.value.least == pytest.approx(least)
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            limited.solve(problem)
    else:
        solution = limited.solve(problem)
        accounts_for(problem, solution)
        slack = 1e-9 * (1.0 + abs(expected.cost))
        assert solution.lower_bound <= expected.cost + slack
        assert expected.cost <= solution.cost + slack
        assert solution.gap <= limited.ENOUGH * abs(solution.cost) + slack
        exactly = limited.solve(problem, enough=0.0)
        assert exactly.cost == pytest.approx(expected.cost)
        assert exactly.gap <= 1e-6 * abs(exactly.cost) + slack


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=seeds)
def test_limited_equals_brute_force(seed: int) -> None:
    bounds_the_optimum(seed)


def test_limited_equals_brute_force_without_dominated_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Large problems drop dominated states at every multiplier; here, 300 small ones do."""
    monkeypatch.setattr(exact, "_LITTLE_WORK", -1)
    for seed in range(2000, 2300):
        bounds_the_optimum(seed)


def solvable(seed: int, alternatives: int = 1) -> tuple[Problem, Solution] | None:
    """A random problem and its optimum, unless it has none."""
    rng = np.random.default_rng(seed)
    problem = limited_problem(rng, int(rng.integers(2, 6)), 3, alternatives=alternatives)
    try:
        return problem, exhaustive.solve(problem)
    except InfeasibleError:
        return None


def test_the_bound_is_that_of_the_best_charge() -> None:
    """Between two plans, of which one is too large: half of each would fit, at half the cost."""
    variable = Variable("a", np.array([0.0, 10.0]), np.array([12.0, 2.0]))
    problem = Problem((variable,), limit=7.0)
    solution = limited.solve(problem, solver=exact.solve)  # what is given ends no gap by itself
    assert (solution.cost, solution.usage, solution.multiplier) == (10.0, 2.0, 1.0)
    assert solution.lower_bound == pytest.approx(5.0)
    assert limited.solve(problem).gap == 0.0


def test_bounds_hold_when_the_search_is_cut_short() -> None:
    worse = 0
    for seed in range(150):
        found = solvable(seed, alternatives=0)
        if found is not None:
            problem, expected = found
            for most_solves in (3, 8):
                solution = limited.solve(
                    problem, solver=exact.solve, most_solves=most_solves, enough=0.0
                )
                accounts_for(problem, solution)
                assert solution.lower_bound <= expected.cost + 1e-9
                worse += solution.cost > expected.cost + 1e-9
    assert worse > 0  # else nothing was put to the test


def test_closing_a_gap_finds_the_optimum() -> None:
    """From the plan of least usage, which is mostly far from it, and at any charge."""
    better = 0
    for seed in range(100):
        found = solvable(seed)
        if found is not None:
            problem, expected = found
            least = exact.solve(problem.usage_alone()).assignment
            known = replace(
                Solution.of(problem, least, "known", -math.inf, math.inf), multiplier=0.0
            )
            for charge in (0.0, 0.1, 1.0):
                solution = refine_by_integer_program(
                    problem, replace(known, multiplier=charge), 0.0
                )
                accounts_for(problem, solution)
                assert solution.cost == pytest.approx(expected.cost)
                assert solution.lower_bound == pytest.approx(expected.cost)
            better += known.cost > expected.cost + 1e-9
            assert refine_by_integer_program(problem, known, 0.0, most_entries=-1) == known
    assert better > 10


def test_filling_keeps_the_limit_and_costs_no_more() -> None:
    cheaper = repair_to_limit = 0
    for seed in range(150):
        found = solvable(seed)
        if found is not None:
            problem, expected = found
            least = exact.solve(problem.usage_alone()).assignment
            start = Solution.of(problem, least, "least", -math.inf, math.inf)
            others = []
            for charge in (0.0, 0.05, 0.2, 1.0):
                assignment = exact.solve(problem.weighed(charge)).assignment
                others.append(Solution.of(problem, assignment, "charged", -math.inf, charge))
            solution = filling.improve_within_limit(problem, start, others)
            accounts_for(problem, solution)
            assert expected.cost - 1e-9 <= solution.cost <= start.cost
            cheaper += solution.cost < start.cost
            saved = filling.repair_to_limit(problem, others[0], [start, *others])
            if saved is not None:
                accounts_for(problem, saved)
                repair_to_limit += not problem.fits(others[0].usage)
    assert cheaper > 10
    assert repair_to_limit > 10


def test_solutions_within_one_limit_serve_another() -> None:
    """Beginning with them, the search is as good, its bounds hold, and it takes fewer solves."""
    solves = [0, 0]
    for seed in range(60):
        found = solvable(seed)
        if found is None or found[0].limit is None:
            continue
        problem, known = found[0], list[Solution]()
        for share in (1.0, 0.8, 1.1):
            tried = replace(problem, limit=problem.limit * share)
            try:
                expected = exhaustive.solve(tried)
            except OverLimitError:
                with pytest.raises(OverLimitError):
                    limited.solve(tried, known=known)
                continue
            for place, begun in enumerate((None, known)):

                def counted(plain: Problem, place: int = place) -> Solution:
                    solves[place] += 1
                    return exact.solve(plain)

                solution = limited.solve(tried, solver=counted, enough=0.0, known=begun)
                accounts_for(tried, solution)
                assert solution.lower_bound <= expected.cost + 1e-9 * (1 + abs(expected.cost))
                assert expected.cost <= solution.cost + 1e-9 * (1 + abs(expected.cost))
    assert solves[1] < solves[0]


@pytest.mark.broad
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_limited_equals_brute_force_on_many(start: int) -> None:
    for seed in range(start, start + 100):
        bounds_the_optimum(seed)


@pytest.mark.parametrize(("states", "share"), [(4, 0.02), (4, 0.4), *broad((4, 0.95)), (12, 0.4)])
def test_equal_layers_fill_the_limit(states: int, share: float) -> None:
    """96 equal layers change their mind together, and still the limit is used to the full."""
    problem = chain_problem(96, states)
    free = exact.solve(problem)
    least = exact.solve(problem.usage_alone()).cost
    limit = least + share * (free.usage - least)
    problem = replace(problem, limit=limit)
    solution = limited.solve(problem)
    accounts_for(problem, solution)
    assert solution.gap <= 0.01 * solution.cost
    assert solution.cost >= free.cost


def test_the_same_limit_gives_the_same_plan() -> None:
    problem = replace(chain_problem(12), limit=150.0)
    assert limited.solve(problem) == limited.solve(replace(chain_problem(12), limit=150.0))


def test_known_solutions_with_forbidden_states_are_none() -> None:
    """A search that begins with what another one found takes no state that it is not allowed."""
    problem = replace(chain_problem(12), limit=150.0)
    known: list[Solution] = []
    first = limited.solve(problem, known=known)
    assert known
    name, state = problem.variables[5].name, first.assignment[problem.variables[5].name]
    unary = problem.variable(name).unary.copy()
    unary[state] = math.inf
    forced = problem.with_unary({name: unary})
    assert limited.solve(forced, known=known).assignment[name] != state
    assert limited.solve(forced, known=known).cost >= limited.solve(forced).lower_bound


def test_no_limit_and_a_loose_one_change_nothing() -> None:
    problem = chain_problem(5)
    free = exact.solve(problem)
    for limit in (None, free.usage, 2 * free.usage):
        solution = limited.solve(replace(problem, limit=limit))
        assert (solution.assignment, solution.cost) == (free.assignment, free.cost)
        assert (solution.gap, solution.multiplier) == (0.0, 0.0)


def test_the_least_usage_is_said_when_nothing_fits() -> None:
    problem = chain_problem(5)
    least = exact.solve(problem.usage_alone()).cost
    with pytest.raises(OverLimitError) as raised:
        limited.solve(replace(problem, limit=0.9 * least))
    assert raised.value.usage == pytest.approx(least)
    assert raised.value.least == pytest.approx(least)
    assert raised.value.limit == 0.9 * least
    assert limited.solve(replace(problem, limit=least)).usage == pytest.approx(least)


def test_bounds_of_another_solver_are_kept() -> None:
    """A solver that is not exact: its bounds hold, so that of the whole search does."""
    problem = chain_problem(6)
    free = exact.solve(problem)
    least = exact.solve(problem.usage_alone()).cost
    problem = replace(problem, limit=(free.usage + least) / 2)

    def rough(plain: Problem) -> Solution:
        solution = exact.solve(plain)
        return replace(solution, lower_bound=solution.cost - 0.05 * abs(solution.cost))

    expected = limited.solve(problem, enough=0.0)
    solution = limited.solve(problem, solver=rough)
    accounts_for(problem, solution)
    assert solution.lower_bound < expected.lower_bound <= expected.cost <= solution.cost


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


def test_an_interrupt_returns_the_best_so_far() -> None:
    """At whichever solve it comes: the bound holds, or there is nothing yet and it goes on."""
    problem = chain_problem(6)
    free = exact.solve(problem)
    least = exact.solve(problem.usage_alone()).cost
    problem = replace(problem, limit=least + 0.3 * (free.usage - least))
    best = limited.solve(problem, enough=0.0)
    returned = 0
    for last in range(1, 30):
        solves = 0

        def interrupted(plain: Problem, last: int = last) -> Solution:
            nonlocal solves
            solves += 1
            if solves == last:
                raise KeyboardInterrupt
            return exact.solve(plain)

        try:
            solution = limited.solve(problem, solver=interrupted, enough=0.0)
        except KeyboardInterrupt:
            assert last <= 2
            continue
        accounts_for(problem, solution)
        assert solution.lower_bound <= best.cost + 1e-9
        returned += "interrupted" in solution.method
    assert returned > 3


def test_the_search_ends_at_the_gap_that_is_asked_for() -> None:
    """A larger gap takes no more solves, and every plan is as near to the optimum as it says."""
    counts = []
    for gap in (0.2, 0.01, 0.0):
        solves = 0

        def counted(plain: Problem) -> Solution:
            nonlocal solves
            solves += 1
            return exact.solve(plain)

        problem = chain_problem(24)
        free = exact.solve(problem)
        least = exact.solve(problem.usage_alone()).cost
        problem = replace(problem, limit=least + 0.4 * (free.usage - least))
        solution = limited.solve(problem, solver=counted, enough=gap)
        assert solution.gap <= max(gap, 0.01) * solution.cost
        counts.append(solves)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_no_charge_is_solved_twice_for_other_limits() -> None:
    """Searches within limits that are near each other end at the same charge, with equal plans."""
    free = chain_problem(24)
    most, least = exact.solve(free).usage, exact.solve(free.usage_alone()).cost
    solves = []
    for charged in (None, ChargedSolutions()):
        asked: list[Problem] = []

        def counted(plain: Problem, asked: list[Problem] = asked) -> Solution:
            asked.append(plain)
            return exact.solve(plain)

        known: list[Solution] = []
        found = [
            limited.solve(
                free.within(least + share * (most - least)),
                solver=counted,
                known=known,
                charged=charged,
            )
            for share in (0.4, 0.39, 0.38)
        ]
        solves.append((found, len(asked)))
    assert solves[0][0] == solves[1][0]
    assert solves[1][1] < solves[0][1]


def test_the_best_charge_alone_proves_as_much_in_fewer_solves() -> None:
    """It is all that is of use where the next problem counts otherwise."""
    ways = np.array([1.0, 1.3]), np.array([8.0, 0.0])
    problem = Problem(tuple(Variable(f"layer {i}", *ways) for i in range(9)), limit=31.0)
    solves: dict[bool, int] = {}
    bounds = []
    for charge_alone in (False, True):
        solved: list[Problem] = []

        def solver(plain: Problem, solved: list[Problem] = solved) -> Solution:
            solved.append(plain)
            return exact.solve(plain)

        solution = limited.solve(problem, solver=solver, enough=0.0, charge_alone=charge_alone)
        accounts_for(problem, solution)
        solves[charge_alone] = len(solved)
        bounds.append(solution.lower_bound)
    assert bounds[1] == pytest.approx(bounds[0])
    assert solves[True] < solves[False]
