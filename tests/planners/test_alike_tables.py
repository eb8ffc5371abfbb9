"""Tables that are the same arrays are looked up together: as each table by itself, and at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from planner_problems import chain_problem, priced_problem

from planners import Factor, Problem, Solution, Table, Variable
from planners.two_usages import usage_of


def table_by_table(problem: Problem, states: dict[str, int], each: list[float]) -> Solution:
    """Return the assignment with every table in its best way, at a multiplier for each."""
    items: list[Variable | Factor] = [*problem.variables, *problem.factors]
    scopes = [(name,) for name in problem.names] + [factor.scope for factor in problem.factors]
    ways, costs, usages = [], [], []
    for item, scope, multiplier in zip(items, scopes, each, strict=True):
        entry = tuple(states[name] for name in scope)
        ways.append(item.prices.pick(entry, multiplier))
        cost, usage = list(item.prices.at(entry))[ways[-1]]
        costs.append(cost)
        usages.append(usage)
    split = len(problem.variables)
    parts = tuple(ways[:split]), tuple(ways[split:])
    return Solution(states, math.fsum(costs), 0.0, "", math.fsum(usages), *parts)


@pytest.mark.parametrize("seed", range(40))
def test_assignments_cost_and_use_what_each_table_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = chain_problem(5, seed=seed) if seed % 2 else priced_problem(rng, 5, 3)
    states = {v.name: int(rng.integers(v.size)) for v in problem.variables}
    count = len(problem.variables) + len(problem.factors)
    charges: list[float | Table] = [
        *(float(charge) for charge in (0.0, 0.02, 1.0, np.inf)),
        rng.random(count),
    ]
    for charge in charges:
        each = [charge] * count if isinstance(charge, float) else charge.tolist()
        expected = table_by_table(problem, states, each)
        spent = problem.spent(states, charge)
        assert (spent.cost, spent.usage) == (expected.cost, expected.usage)
        assert spent.variable_alternatives == expected.variable_alternatives
        assert spent.factor_alternatives == expected.factor_alternatives
        assert usage_of(problem, expected) == expected.usage
        if math.isfinite(max(each)):
            charged = problem.weighed(charge)
            assert charged.plain
            whole = table_by_table(charged, states, [0.0] * count)
            assert charged.cost(states) == whole.cost
    assert problem.cost(states) == table_by_table(problem, states, [0.0] * count).cost


def test_layers_add_no_tables_but_those_of_their_own() -> None:
    """Also with usage charged, with another limit, and with some states forbidden: of the eight
    tables of a layer, one is an array of its own.
    """
    few, many = (chain_problem(layers) for layers in (8, 64))
    added = 64 - 8
    assert len(many.variables) + len(many.factors) > 7 * added
    assert len(many.alike()) == len(few.alike()) + added
    assert len(many.weighed(0.5).alike()) == len(few.weighed(0.5).alike()) + added
    assert many.within(3.0).alike()[0] is many.alike()[0]
    pinned = {"tied": 1}
    assert len(many.pinned(pinned).alike()) == len(few.pinned(pinned).alike()) + added
