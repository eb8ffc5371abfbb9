"""The interaction graph: what can be solved apart, and a second opinion on how narrow it is."""

from __future__ import annotations

import random
from collections.abc import Sequence

import networkx
import numpy as np
import pytest
from any_plans import network_of
from broad_cases import broad
from families import build, inputs_for
from networkx.algorithms.approximation import treewidth_min_degree, treewidth_min_fill_in
from planner_problems import layered_problem, random_problem

from autoparallel.mesh import Mesh
from planners import (
    Factor,
    Memo,
    Problem,
    TooWideError,
    Variable,
    conditioning,
    exact,
    exhaustive,
)
from planners.greedy_orders import SCORES, greedy_order, hubs_of
from planners.interaction_graph import (
    components,
    interaction_graph,
    network_graph,
    width_of_order,
)
from planners.ordering import only, schedule
from planners.reduction import ContradictionError, Network, reduce
from planners.schedules import KnownOrder, Orders, Outline


def grid(rows: int, columns: int, states: int, prefix: str = "v", seed: int = 0) -> Problem:
    """Neighbours in a grid share a table; its treewidth is the smaller side."""
    rng = np.random.default_rng(seed)
    names = [[f"{prefix}{i}_{j}" for j in range(columns)] for i in range(rows)]
    pairs = [(names[i][j], names[i][j + 1]) for i in range(rows) for j in range(columns - 1)]
    pairs += [(names[i][j], names[i + 1][j]) for i in range(rows - 1) for j in range(columns)]
    return Problem(
        tuple(Variable(name, rng.random(states)) for row in names for name in row),
        tuple(Factor(pair, rng.random((states, states))) for pair in pairs),
    )


def joined(*problems: Problem) -> Problem:
    """One problem of several that share nothing, their variables interleaved."""
    columns = [list(problem.variables) for problem in problems]
    variables = [
        column[i] for i in range(max(map(len, columns))) for column in columns if i < len(column)
    ]
    return Problem(tuple(variables), tuple(f for p in problems for f in p.factors))


def networks() -> list[Network]:
    """Of random problems, of layers, of grids."""
    problems = [random_problem(np.random.default_rng(seed), 12, 3, 4) for seed in range(60)]
    problems += [layered_problem(layers) for layers in (2, 3, 5)]
    problems += [grid(4, 9, 3), grid(5, 5, 2), joined(grid(3, 6, 3, "a"), grid(4, 4, 2, "b"))]
    found = []
    for problem in problems:
        try:
            found.append(reduce(problem.weighed(0.0), Memo()))
        except ContradictionError:
            continue
    assert len(found) > 20
    return found


def test_the_graph_joins_what_shares_a_table() -> None:
    """Against all pairs of all scopes; what is decided is no node of a network's graph."""
    ones = np.ones((2, 2, 1))
    variables = tuple(
        Variable(name, np.zeros(n)) for name, n in zip("abcd", (2, 2, 1, 2), strict=True)
    )
    problem = Problem(variables, (Factor(("a", "b", "c"), ones),))
    graph = interaction_graph(problem)
    assert sorted(graph.edges) == [(0, 1), (0, 2), (1, 2)]
    assert components(graph) == [[0, 1, 2], [3]]
    for network in networks():
        graph = network_graph(network)
        assert list(graph) == [v for v, size in enumerate(network.sizes) if size > 1]
        pairs = {
            frozenset((one, other))
            for scope, _ in network.terms
            for one in scope
            for other in scope
            if one != other
        }
        assert set(map(frozenset, graph.edges)) == pairs


def test_the_width_that_a_schedule_reports_is_that_of_its_order() -> None:
    """Elimination on the graph joins neighbours just as tables do."""
    for network in networks():
        plan = schedule(network, 2**26)
        order = [step.variable for step in plan.steps]
        assert plan.width == width_of_order(network_graph(network), order)


def test_networkx_finds_no_order_that_is_much_narrower() -> None:
    """Two other heuristics; a schedule weighs states too, and may be one wider."""
    for network in networks():
        graph = network_graph(network)
        best = min(treewidth_min_fill_in(graph)[0], treewidth_min_degree(graph)[0])
        assert schedule(network, 2**26).width <= best + 1


@pytest.mark.parametrize("name", ["gpt", *broad("bert", "hf-llama")])
def test_the_networks_of_models_are_as_narrow_as_networkx_finds_them(name: str) -> None:
    """On two axes; and each model is one connected problem."""
    _, network = network_of(build(name), inputs_for(name), Mesh(dp=2, tp=2))
    reduced = reduce(network.problem(1.0, {}, None).weighed(0.0), Memo())
    graph = network_graph(reduced)
    assert sum(len(part) > 1 for part in components(graph)) == 1
    assert schedule(reduced, 2**26).width <= treewidth_min_fill_in(graph)[0] + 1


def test_a_grid_is_as_wide_as_its_smaller_side() -> None:
    """The treewidth is known there."""
    for rows, columns in ((2, 8), (3, 7), (4, 9)):
        network = reduce(grid(rows, columns, 3), Memo())
        assert rows <= schedule(network, 2**26).width <= rows + 1


def test_parts_are_solved_apart_to_the_same_optimum() -> None:
    """Wide and narrow parts together: cost and bound are the sums of those of the parts."""
    for seed in range(6):
        wide, narrow = grid(4, 4, 3, "w", seed), grid(1, 9, 4, "n", seed)
        other = grid(4, 4, 2, "o", seed)
        whole = joined(narrow, wide, other)
        limit = 3**3
        names = conditioning.cutset(whole, limit)
        assert names
        assert not any(name.startswith("n") for name in names)
        solution = conditioning.solve(whole, max_table_entries=limit)
        optimum = exact.solve(whole).cost
        alone = [conditioning.solve(part, max_table_entries=limit) for part in (wide, other)]
        expected = sum(each.cost for each in alone) + exact.solve(narrow).cost
        assert solution.cost == pytest.approx(expected, rel=1e-12)
        assert solution.lower_bound <= optimum + 1e-9
        assert solution.cost >= optimum - 1e-9
        bounds = sum(each.lower_bound for each in alone) + exact.solve(narrow).cost
        assert solution.lower_bound == pytest.approx(bounds, rel=1e-12)
        assert whole.cost(solution.assignment) == pytest.approx(solution.cost, rel=1e-12)


def star(leaves: int, name: str, seed: int) -> Problem:
    """A hub with many neighbours, which have no others: as narrow as a chain."""
    rng = np.random.default_rng(seed)
    names = [f"{name}{i}" for i in range(leaves)]
    return Problem(
        tuple(Variable(own, rng.random(2)) for own in (name, *names)),
        tuple(Factor((name, own), rng.random((2, 2))) for own in names),
    )


def test_narrow_parts_give_nothing_to_the_cutset() -> None:
    """However many neighbours their variables have: those of the wide part alone are fixed."""
    wide = grid(4, 4, 2, "w")
    stars = [star(9, f"s{seed}_", seed) for seed in range(40)]
    whole = joined(*stars, wide)
    limit = 2**3
    alone = conditioning.cutset(wide, limit)
    assert alone
    assert conditioning.cutset(whole, limit) == alone
    solution = conditioning.solve(whole, max_table_entries=limit)
    expected = conditioning.solve(wide, max_table_entries=limit)
    narrow = sum(exact.solve(part).cost for part in stars)
    assert solution.cost == pytest.approx(expected.cost + narrow, rel=1e-12)
    assert solution.lower_bound == pytest.approx(expected.lower_bound + narrow, rel=1e-12)


def test_small_problems_in_parts_equal_brute_force() -> None:
    """With variables that share no factor among them."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        first, second = grid(2, 2, 2, "a", seed), grid(1, 3, 3, "b", seed)
        loose = Problem((Variable("loose", rng.random(3)),))
        whole = joined(first, loose, second)
        expected = exhaustive.solve(whole)
        solution = conditioning.solve(whole, fixed_variables=("a0_0", "b0_1"))
        assert solution.cost == pytest.approx(expected.cost, rel=1e-12)
        assert list(solution.assignment) == list(whole.names)


def test_each_part_may_take_the_order_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no one way to order is narrow enough for both, each is ordered by its own."""
    from planners import ordering

    network = reduce(joined(grid(3, 3, 2, "a"), grid(3, 3, 2, "b")), Memo())
    first, second = components(network_graph(network))
    plain = greedy_order

    def picky(
        network: Network, classes: dict[int, int], score: str, limit: int, hubs: Sequence[int]
    ) -> list[int]:
        """One part is too wide by weight, the other by all else."""
        bad = first if score == "weight" else second
        if any(variable in classes for variable in bad):
            raise TooWideError(2 * limit, limit)
        return plain(network, classes, score, limit, hubs)

    monkeypatch.setattr(ordering, "greedy_order", picky)
    plan = schedule(network, 2**10)
    assert sorted(step.variable for step in plan.steps) == sorted(first + second)
    monkeypatch.setattr(
        ordering, "greedy_order", lambda *_: (_ for _ in ()).throw(TooWideError(9, 8))
    )
    with pytest.raises(TooWideError):
        schedule(network, 2**10)


def blocks_with_modes(blocks: int, inside: int, seed: int) -> Problem:
    """A chain of equal blocks; each has one more variable, which shares a table with all others."""
    generator = np.random.default_rng(seed)
    inner = [generator.random((4, 3)) for _ in range(inside)]
    near = [generator.random((4, 4)) for _ in range(inside)]
    variables, factors = [], []
    for block in range(blocks):
        names = [f"{block}.{place}" for place in range(inside)]
        variables += [Variable(name, np.arange(4.0)) for name in names]
        variables.append(Variable(f"mode {block}", np.array([0.0, 0.5, 1.0])))
        for place, name in enumerate(names):
            factors.append(Factor((name, f"mode {block}"), inner[place]))
            if block or place:
                before = names[place - 1] if place else f"{block - 1}.{inside - 1}"
                factors.append(Factor((before, name), near[place]))
    return Problem(tuple(variables), tuple(factors))


def test_hubs_are_set_aside_and_come_back_where_they_cost_least() -> None:
    """A mode touches all of its block: with it in its own place, no table holds two modes."""
    problem = blocks_with_modes(blocks=6, inside=24, seed=3)
    network = reduce(problem, Memo())
    hubs = hubs_of(network)
    assert [problem.names[hub] for hub in hubs] == [f"mode {block}" for block in range(6)]
    alone = {variable: variable for variable in range(len(network.sizes))}
    for score in SCORES:
        order = greedy_order(network, alone, score, 2**20, hubs)
        assert sorted(order) == sorted(alone)
        # A block is left by one of its variables and its mode.
        assert width_of_order(network_graph(network), order) <= 3
    optimum = exact.solve(problem)
    assert optimum.cost == pytest.approx(conditioning.solve(problem).cost, rel=1e-12)
    # The limit on tables holds for hubs, too.
    with pytest.raises(TooWideError):
        greedy_order(network, alone, "weight", 8, hubs)


@pytest.mark.parametrize("seed", [16, 21])
def test_where_there_is_much_work_another_order_saves_most_of_it(seed: int) -> None:
    """Tables to come count twice beside that of the step: a grid of variables of many sizes."""
    rows, columns, draw = 8, 10, random.Random(seed)
    states = tuple(np.arange(draw.choice([3, 4, 6, 9])) for _ in range(rows * columns))
    pairs = [
        (at, at + step)
        for at in range(rows * columns)
        for step in (1, columns)
        if (step == columns or (at + 1) % columns) and at + step < rows * columns
    ]
    network = Network(states, tuple((pair, 0) for pair in pairs), (), {})
    work = {scores: schedule(network, 2**26, scores=scores).work for scores in (SCORES[:3], SCORES)}
    assert 2 * work[SCORES] < work[SCORES[:3]]


def test_an_order_by_one_score_is_not_taken_for_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for by all scores where these are asked for; then it is known."""
    from planners import ordering

    monkeypatch.setattr(ordering, "_ENTRIES_PER_VARIABLE", 0)
    sought: list[str] = []

    def told(
        network: Network, classes: dict[int, int], score: str, limit: int, hubs: Sequence[int]
    ) -> list[int]:
        sought.append(score)
        return greedy_order(network, classes, score, limit, hubs)

    monkeypatch.setattr(ordering, "greedy_order", told)
    network, orders = reduce(grid(4, 4, 3), Memo()), Memo().orders
    schedule(network, 2**20, orders, ordering.SCORES[:1])
    assert set(sought) == {"weight"}
    sought.clear()
    best = schedule(network, 2**20, orders)
    assert set(sought) == set(ordering.SCORES)
    sought.clear()
    # A network with a few more variables takes the order, and puts these in their places.
    more = reduce(grid(4, 4, 3, seed=1), Memo())
    assert schedule(more, 2**20, orders).work == best.work
    fewer = [variable for variable in range(16) if variable != 5]
    less = only(more, fewer)
    order = [step.variable for step in best.steps if step.variable != 5]
    orders.clear()
    orders[less.form, SCORES] = KnownOrder(order, best.work, Outline.of(less, order))
    known = schedule(more, 2**20, orders)
    assert sorted(step.variable for step in known.steps) == list(range(16))
    assert known.work <= 1.5 * best.work
    assert not sought


def test_problems_of_one_form_are_scheduled_by_one_outline(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recipes of their own tables, and not anew where these have the same numbers."""
    memo = Memo()
    equal, other = (reduce(grid(4, 4, 3, seed=seed), memo) for seed in (0, 1))
    assert equal.form == other.form
    assert equal.terms != other.terms
    orders: Orders = {}
    first = schedule(equal, 2**20, orders)
    monkeypatch.setattr(Outline, "of", None)
    assert schedule(equal, 2**20, orders) is first
    second = schedule(other, 2**20, orders)
    assert [step.variable for step in second.steps] == [step.variable for step in first.steps]
    monkeypatch.undo()
    order = [step.variable for step in first.steps]
    for network, known in ((equal, first), (other, second)):
        assert Outline.of(network, order).schedule(network) == known


def test_components_are_networkx_own() -> None:
    """In an order that does not depend on that of sets."""
    graph = networkx.Graph([(9, 4), (1, 7), (7, 3)])
    graph.add_node(2)
    assert components(graph) == [[1, 3, 7], [2], [4, 9]]
