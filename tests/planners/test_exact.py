"""The planners against each other: brute force is the oracle, the integer program a second."""

import itertools
import math
import tracemalloc
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_problems import feasible, layered_problem, random_problem, subproblem

from planners import (
    Factor,
    InfeasibleError,
    Memo,
    Problem,
    Solution,
    TooWideError,
    Variable,
    conditioning,
    exact,
    exhaustive,
    ilp,
    min_marginals,
)
from planners.contraction import contract

SOLVERS = pytest.mark.parametrize("solver", [exact, ilp, exhaustive], ids=lambda s: s.__name__)
seeds = st.integers(0, 2**32 - 1)


def close(value: float, expected: float, problem: Problem) -> bool:
    """Equal up to rounding, measured by the largest finite entry of the problem."""
    tables = [v.unary for v in problem.variables] + [f.table for f in problem.factors]
    largest = max(float(np.abs(t[np.isfinite(t)]).max(initial=0.0)) for t in tables)
    return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9 * largest)


def check(solution: Solution, expected: float, problem: Problem) -> None:
    """The cost is the expected one, and the assignment really has it."""
    assert close(solution.cost, expected, problem)
    assert solution.cost == problem.cost(solution.assignment)
    assert list(solution.assignment) == list(problem.names)
    assert solution.lower_bound <= solution.cost
    assert close(solution.lower_bound, solution.cost, problem)


# Every solver against brute force


@settings(max_examples=300, deadline=None, derandomize=True)
@given(seed=seeds)
def test_exact_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, int(rng.integers(1, 8)), 4, reach=7)
    try:
        expected = exhaustive.solve(problem)
    except InfeasibleError:
        with pytest.raises(InfeasibleError) as raised:
            exact.solve(problem)
        names = raised.value.variables
        assert names
        assert not feasible(subproblem(problem, names))
        for name in names:  # none is named in vain
            assert feasible(subproblem(problem, tuple(n for n in names if n != name)))
    else:
        check(exact.solve(problem), expected.cost, problem)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=seeds)
def test_integer_program_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, int(rng.integers(1, 7)), 3, reach=6)
    try:
        expected = exhaustive.solve(problem)
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            ilp.solve(problem)
    else:
        check(ilp.solve(problem), expected.cost, problem)
        relaxed = ilp.lp_bound(problem)
        assert relaxed <= expected.cost or close(relaxed, expected.cost, problem)


def test_brute_force_equals_pricing_every_assignment() -> None:
    problem = random_problem(np.random.default_rng(4), 5, 3, reach=4)
    spaces = [range(variable.size) for variable in problem.variables]
    costs = [
        problem.cost(dict(zip(problem.names, states, strict=True)))
        for states in itertools.product(*spaces)
    ]
    assert math.isclose(exhaustive.solve(problem).cost, min(costs))


@pytest.mark.parametrize("seed", range(20))
def test_exact_equals_integer_program_on_narrow_problems(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed), 30, 5, reach=3)
    try:
        expected = ilp.solve(problem)
    except InfeasibleError:
        with pytest.raises(InfeasibleError) as raised:
            exact.solve(problem)
        assert not feasible(subproblem(problem, raised.value.variables))
    else:
        check(exact.solve(problem), expected.cost, problem)


@pytest.mark.parametrize("everywhere", [False, True])
def test_exact_equals_integer_program_with_shared_variables(everywhere: bool) -> None:
    problem = layered_problem(5, width=4, states=3, everywhere=everywhere)
    expected = exact.solve(problem)
    check(ilp.solve(problem), expected.cost, problem)
    check(expected, expected.cost, problem)


@SOLVERS
def test_corner_cases(solver: ModuleType) -> None:
    """No variable, no factor, only single states, and the two orders of a factor's variables."""
    assert solver.solve(Problem(())).cost == 0.0
    lonely = Problem((Variable("a", np.array([3.0, 1.0, 1.0])), Variable("b", np.array([2.0]))))
    assert solver.solve(lonely).cost == 3.0
    table = np.array([[5.0], [1.0], [2.0]])
    one = Problem(lonely.variables, (Factor(("a", "b"), table), Factor(("b", "a"), table.T)))
    assert solver.solve(one).assignment == {"a": 1, "b": 0}
    assert solver.solve(one).cost == 5.0


# Repetition, determinism, limits


@pytest.mark.parametrize("everywhere", [False, True])
def test_repeated_layers_are_computed_once(everywhere: bool) -> None:
    computed = {}
    for layers in (24, 96):
        memo = Memo()
        problem = layered_problem(layers, width=12, states=5, everywhere=everywhere)
        solution = exact.solve(problem, memo=memo)
        assert memo.computed + memo.reused == len(problem.variables)
        computed[layers] = memo.computed
        again = exact.solve(problem, memo=memo)
        assert memo.computed == computed[layers]
        assert again == solution
    # A chain of equal layers is halved again and again: two steps for each doubling, and its ends.
    assert computed[96] <= computed[24] + 24
    assert computed[96] < 96


def test_layers_that_differ_a_little_are_not_mixed_up() -> None:
    problem = layered_problem(12, shared=0)
    changed = problem.with_unary({"5.2": problem.variable("5.2").unary + np.arange(4.0)})
    memo = Memo()
    exact.solve(problem, memo=memo)
    assert exact.solve(changed, memo=memo) == exact.solve(changed)
    check(ilp.solve(changed), exact.solve(changed).cost, changed)


@SOLVERS
def test_same_problem_gives_same_assignment(solver: ModuleType) -> None:
    """Even with many optima, and with tables that are equal but not the same objects."""

    def tied() -> Problem:
        rng = np.random.default_rng(1)
        variables = tuple(Variable(f"v{i}", np.zeros(3)) for i in range(8))
        tables = [rng.integers(0, 2, (3, 3)).astype(np.float64) for _ in range(10)]
        pairs = rng.choice(8, (10, 2))
        return Problem(
            variables,
            tuple(
                Factor((f"v{a}", f"v{b}"), t)
                for (a, b), t in zip(pairs, tables, strict=True)
                if a != b
            ),
        )

    assert tied() == tied()
    assert solver.solve(tied()) == solver.solve(tied())


def test_ties_go_to_the_lowest_state() -> None:
    problem = layered_problem(1, shared=0)
    flat = Problem(tuple(Variable(name, np.ones(4)) for name in problem.names))
    assert set(exact.solve(flat).assignment.values()) == {0}


def test_too_wide_is_refused_before_any_work() -> None:
    rng = np.random.default_rng(0)
    names = [f"v{i}" for i in range(7)]
    problem = Problem(
        tuple(Variable(name, np.zeros(3)) for name in names),
        tuple(Factor((p, q), rng.random((3, 3))) for p, q in itertools.combinations(names, 2)),
    )
    memo = Memo()
    with pytest.raises(TooWideError, match=r"needs tables of 2\*\*9\.5 entries") as raised:
        exact.solve(problem, max_table_entries=728, memo=memo)
    assert (raised.value.entries, raised.value.limit, memo.computed) == (729, 728, 0)
    expected = exhaustive.solve(problem).cost
    check(exact.solve(problem, max_table_entries=729), expected, problem)
    check(ilp.solve(problem), expected, problem)


def test_a_narrower_order_is_looked_for_when_the_first_is_too_wide() -> None:
    """Least-weight-first needs tables of 2**14 entries here, least-fill-first 2**10."""
    rng = np.random.default_rng(3)
    pairs = [
        (i, int(j)) for i in range(3, 60) for j in rng.choice(range(max(0, i - 12), i), 3, False)
    ]
    problem = Problem(
        tuple(Variable(f"v{i}", rng.random(2)) for i in range(60)),
        tuple(Factor((f"v{i}", f"v{j}"), rng.random((2, 2))) for i, j in pairs),
    )
    expected = exact.solve(problem)
    check(exact.solve(problem, max_table_entries=2**11), expected.cost, problem)
    with pytest.raises(TooWideError):
        min_marginals(problem, ["v0"], max_table_entries=2**7)
    # An optimum does without dominated states, and without the tables between them.
    check(exact.solve(problem, max_table_entries=2**7), expected.cost, problem)
    with pytest.raises(TooWideError):
        exact.solve(problem, max_table_entries=2**6)


def test_large_joint_tables_are_walked_in_pieces() -> None:
    """Four variables of 30 states, all pairs connected: 810 000 joint entries."""
    rng = np.random.default_rng(5)
    problem = Problem(
        tuple(Variable(name, rng.random(30)) for name in "abcd"),
        tuple(Factor((p, q), rng.random((30, 30))) for p, q in itertools.combinations("abcd", 2)),
    )
    expected = exhaustive.solve(problem)
    assert exact.solve(problem).assignment == expected.assignment
    marginals = min_marginals(problem, "abcd")
    for name in "abcd":
        for state in (0, 17, 29):
            pinned = exhaustive.solve(problem.pinned({name: state})).cost
            assert math.isclose(marginals[name][state], pinned)


# Questions about a problem


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=seeds)
def test_min_marginals_equal_solving_with_each_state_fixed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, int(rng.integers(1, 7)), 4, reach=4)
    if not feasible(problem):
        with pytest.raises(InfeasibleError):
            min_marginals(problem, problem.names)
        return
    marginals = min_marginals(problem, problem.names, memo=Memo())
    assert list(marginals) == list(problem.names)
    for variable in problem.variables:
        assert marginals[variable.name].shape == (variable.size,)
        for state, value in enumerate(marginals[variable.name]):
            try:
                expected = exhaustive.solve(problem.pinned({variable.name: state})).cost
            except InfeasibleError:
                assert value == np.inf
            else:
                assert close(float(value), expected, problem)


def test_min_marginals_of_repeated_layers() -> None:
    problem = layered_problem(12)
    memo = Memo()
    best = exact.solve(problem, memo=memo).cost
    marginals = min_marginals(problem, ["shared1", "7.3", "0.0"], memo=memo)
    for name, table in marginals.items():
        assert math.isclose(table.min(), best)
        for state, value in enumerate(table):
            assert math.isclose(value, exact.solve(problem.pinned({name: state})).cost)
    with pytest.raises(ValueError, match="unknown variable 'x'"):
        min_marginals(problem, ["x"])


def test_exhaustive_refuses_large_problems() -> None:
    with pytest.raises(ValueError, match="too many"):
        exhaustive.solve(layered_problem(10))


def test_time_limit_of_the_integer_program() -> None:
    with pytest.raises(TimeoutError):
        ilp.solve(layered_problem(30, everywhere=True), time_limit_seconds=0.0)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=seeds)
def test_conditioning_brackets_brute_force(seed: int) -> None:
    """With tables that allow nearly nothing, so that the cutset is large: the bound holds."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, int(rng.integers(3, 9)), 3, 4)
    try:
        expected = exhaustive.solve(problem).cost
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            conditioning.solve(problem, max_table_entries=4)
        return
    solution = conditioning.solve(problem, max_table_entries=4)
    slack = 1e-9 * sum(abs(term) for term in problem.terms(solution.assignment)) + 1e-9
    assert solution.lower_bound <= expected + slack <= solution.cost + 2 * slack
    assert problem.cost(solution.assignment) == solution.cost
    again = conditioning.solve(problem, max_table_entries=4)
    assert (again.assignment, again.lower_bound) == (solution.assignment, solution.lower_bound)


def test_conditioning_of_a_grid() -> None:
    """As wide as it is long: near the integer program's optimum, which lies above the bound."""
    rng = np.random.default_rng(3)
    side, states = 8, 4
    variables = tuple(
        Variable(f"v{i}_{j}", rng.random(states)) for i in range(side) for j in range(side)
    )
    factors = tuple(
        Factor((f"v{i}_{j}", f"v{i + di}_{j + dj}"), rng.random((states, states)))
        for i in range(side)
        for j in range(side)
        for di, dj in ((0, 1), (1, 0))
        if i + di < side and j + dj < side
    )
    problem = Problem(variables, factors)
    names = conditioning.cutset(problem, 4**4)
    assert 0 < len(names) < side * side / 2
    solution = conditioning.solve(problem, fixed_variables=names, max_table_entries=4**4)
    optimum = exact.solve(problem).cost
    assert solution.lower_bound <= optimum <= solution.cost
    assert solution.gap <= 0.02 * solution.cost
    assert solution.cost <= 1.02 * optimum


def test_contraction_of_a_large_result_takes_little_more_memory() -> None:
    """Sums are written to the same memory, in the order in which they are made at once."""
    rng = np.random.default_rng(0)
    arrays = [rng.random(shape) for shape in ((3, 600, 1), (3, 1, 700), (1, 600, 700))]
    arrays[0][rng.random((3, 600, 1)) < 0.2] = np.inf
    tracemalloc.start()
    found = contract(arrays, (3, 600, 700), (1, 2))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(found, ((arrays[0] + arrays[1]) + arrays[2]).min(axis=0))
    assert most < 1.5 * found.nbytes


@pytest.mark.parametrize("allowed", [0.02, 0.3, 0.9, 1.0])
def test_contraction_skips_what_is_forbidden_and_nothing_else(allowed: float) -> None:
    """Offers that meet needs: blocks of a joint table, beside tables over one and three axes."""
    rng = np.random.default_rng(6)
    shape = (60, 50, 70, 3)
    kinds = rng.random((8, 50)) < allowed  # states of the first axis are of one of eight kinds
    offers = np.where(kinds[rng.integers(0, 8, 60)], 0.0, np.inf)
    arrays = [
        offers.reshape(60, 50, 1, 1),
        rng.random((60, 1, 70, 3)),
        np.where(rng.random((60, 1, 1, 1)) < 0.1, np.inf, rng.random((60, 1, 1, 1))),
        rng.random((1, 50, 70, 1)),
    ]
    joint = sum(arrays, np.zeros(shape))
    np.testing.assert_allclose(contract(arrays, shape, (1, 2, 3)), joint.min(axis=0))
    np.testing.assert_allclose(contract(arrays, shape, (0, 2)), joint.min(axis=(1, 3)))
