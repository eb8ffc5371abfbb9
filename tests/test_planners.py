"""The planners against each other: brute force is the oracle, the integer program a second."""

import itertools
import math
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners import (
    Factor,
    InfeasibleError,
    Memo,
    Problem,
    Solution,
    Table,
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


def random_table(
    rng: np.random.Generator, shape: tuple[int, ...], kind: str, forbidden: float
) -> Table:
    """Costs of mixed signs: `real` ones, `ties` (small whole numbers), or `sums` of two vectors."""
    if kind == "ties":
        table = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "sums" and len(shape) == 2:
        table = rng.normal(size=shape[0])[:, None] + rng.normal(size=shape[1])
    else:
        table = rng.normal(size=shape)
    table[rng.random(shape) < forbidden] = np.inf
    return table


def random_problem(rng: np.random.Generator, count: int, most_states: int, reach: int) -> Problem:
    """Variables linked to others at most `reach` places away: parallel, reversed, or not at all."""
    sizes = rng.integers(1, most_states + 1, count)
    forbidden = float(rng.choice([0.0, 0.1, 0.35]))
    scale = float(rng.choice([1e-6, 1.0, 1e3]))
    variables = tuple(
        Variable(f"v{i}", scale * random_table(rng, (size,), "real", forbidden / 3))
        for i, size in enumerate(sizes)
    )
    factors = []
    for first in range(count):
        for second in range(first + 1, min(first + reach + 1, count)):
            for _ in range(rng.choice([0, 1, 2], p=[0.4, 0.45, 0.15])):
                pair = (first, second) if rng.random() < 0.5 else (second, first)
                kind = str(rng.choice(["real", "ties", "sums"]))
                table = random_table(rng, (sizes[pair[0]], sizes[pair[1]]), kind, forbidden)
                factors.append(Factor((f"v{pair[0]}", f"v{pair[1]}"), scale * table))
    return Problem(variables, tuple(factors))


def layered_problem(
    layers: int, *, width: int = 6, states: int = 4, shared: int = 2, everywhere: bool = False
) -> Problem:
    """Equal layers in a row, and `shared` variables connected to every layer."""
    rng = np.random.default_rng(7)
    unaries = [rng.random(states) * 1e-3 for _ in range(width)]
    inside = {(i, i + 1): rng.random((states, states)) * 1e-3 for i in range(width - 1)}
    inside[0, width - 1] = rng.random((states, states)) * 1e-3
    between = rng.random((states, states)) * 1e-3
    readers = range(width) if everywhere else range(1, width, 2)
    masks = {(g, i): rng.random((3, states)) * 1e-3 for g in range(shared) for i in readers}
    variables = [Variable(f"shared{g}", rng.random(3)) for g in range(shared)]
    factors = []
    for layer in range(layers):
        variables += [Variable(f"{layer}.{i}", unaries[i]) for i in range(width)]
        factors += [Factor((f"{layer}.{i}", f"{layer}.{j}"), t) for (i, j), t in inside.items()]
        factors += [Factor((f"shared{g}", f"{layer}.{i}"), t) for (g, i), t in masks.items()]
        if layer:
            factors.append(Factor((f"{layer - 1}.{width - 1}", f"{layer}.0"), between))
    return Problem(tuple(variables), tuple(factors))


def subproblem(problem: Problem, names: tuple[str, ...]) -> Problem:
    return Problem(
        tuple(v for v in problem.variables if v.name in names),
        tuple(f for f in problem.factors if set(f.scope) <= set(names)),
    )


def feasible(problem: Problem) -> bool:
    try:
        exhaustive.solve(problem)
    except InfeasibleError:
        return False
    return True


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


# Infeasible problems


@SOLVERS
def test_infeasible_by_one_table(solver: ModuleType) -> None:
    forbidden = np.full((2, 2), np.inf)
    variables = tuple(Variable(name, np.zeros(2)) for name in "abc")
    with pytest.raises(InfeasibleError) as raised:
        solver.solve(Problem(variables, (Factor(("c", "a"), forbidden),)))
    if solver is exact:
        assert raised.value.variables == ("a", "c")
        assert "a, c" in str(raised.value)


@SOLVERS
def test_infeasible_by_a_cycle_only(solver: ModuleType) -> None:
    """Three variables of two states that must all differ: every pair alone can."""
    differ = np.array([[np.inf, 0.0], [0.0, np.inf]])
    variables = tuple(Variable(name, np.zeros(2)) for name in "abcd")
    pairs = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]
    with pytest.raises(InfeasibleError) as raised:
        solver.solve(Problem(variables, tuple(Factor((p, q), differ) for p, q in pairs)))
    if solver is exact:
        assert raised.value.variables == ("a", "b", "c")


def test_infeasible_by_a_cycle_and_what_narrows_it() -> None:
    """Three variables of three states could differ, if others did not forbid them one state."""
    differ = np.where(np.eye(3) > 0, np.inf, 0.0)
    narrow = np.array([[0.0, 0.0, np.inf]])
    variables = tuple(Variable(name, np.zeros(3)) for name in "abcd")
    rulers = tuple(Variable(name, np.zeros(1)) for name in "xyz")
    cycle = tuple(Factor((p, q), differ) for p, q in ("ab", "bc", "ca", "cd"))
    rules = tuple(Factor((p, q), narrow) for p, q in ("xa", "yb", "zc"))
    with pytest.raises(InfeasibleError) as raised:
        exact.solve(Problem(variables + rulers, cycle + rules))
    assert raised.value.variables == ("a", "b", "c", "x", "y", "z")
    exact.solve(Problem(variables + rulers, cycle + rules[:2]))


def test_infeasible_far_apart() -> None:
    """Both ends of a chain of equalities want something else: all of it is to blame."""
    same = np.array([[0.0, np.inf], [np.inf, 0.0]])
    count = 50
    problem = Problem(
        tuple(Variable(f"v{i}", np.zeros(2)) for i in range(count)),
        tuple(Factor((f"v{i}", f"v{i + 1}"), same) for i in range(count - 1)),
    )
    with pytest.raises(InfeasibleError) as raised:
        exact.solve(problem.pinned({"v10": 0, "v40": 1}))
    assert raised.value.variables == tuple(f"v{i}" for i in range(10, 41))


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
        exact.solve(problem, max_table_entries=2**7)


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


def test_exhaustive_refuses_large_problems() -> None:
    with pytest.raises(ValueError, match="too many"):
        exhaustive.solve(layered_problem(10))


def test_time_limit_of_the_integer_program() -> None:
    with pytest.raises(TimeoutError):
        ilp.solve(layered_problem(30, everywhere=True), time_limit_seconds=0.0)


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
    solution = conditioning.solve(problem, given=names, max_table_entries=4**4)
    optimum = exact.solve(problem).cost
    assert solution.lower_bound <= optimum <= solution.cost
    assert solution.gap <= 0.02 * solution.cost
    assert solution.cost <= 1.02 * optimum


def test_malformed_assignments_are_refused() -> None:
    problem = Problem((A, B))
    with pytest.raises(ValueError, match="lacks variable 'b'"):
        problem.cost({"a": 0})
    with pytest.raises(ValueError, match="unknown variable 'c'"):
        problem.cost({"a": 0, "b": 0, "c": 0})
    with pytest.raises(ValueError, match="state -1 of 'b' is out of range: it has 3"):
        problem.cost({"a": 0, "b": -1})


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
