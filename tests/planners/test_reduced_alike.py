"""Problems that differ in entries alone are reduced alike, from what the one before them told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from planner_problems import random_problem

from planners import Factor, Memo, Problem
from planners.reduction import ContradictionError, Network, reduce
from planners.tables import Table


def with_factors(problem: Problem, change: Callable[[Table], Table]) -> Problem:
    """Return the problem with other entries of all tables over several variables."""
    return replace(
        problem, factors=tuple(Factor(f.scope, change(f.table)) for f in problem.factors)
    )


CHANGES: dict[str, Callable[[Problem], Problem]] = {
    "the same": lambda problem: problem,
    "other prices": lambda problem: with_factors(problem, lambda table: 3.0 * table),
    # Sums of vectors are taken apart, and what differs by a constant is one table.
    "no prices": lambda problem: with_factors(
        problem, lambda table: np.where(np.isfinite(table), 0.0, table)
    ),
    "a pin": lambda problem: problem.pinned({problem.variables[0].name: 0}),
    "another state": lambda problem: problem.pinned(
        {problem.variables[0].name: problem.variables[0].size - 1}
    ),
    "another variable": lambda problem: problem.pinned({problem.variables[-1].name: 0}),
}


def told(network: Network) -> tuple[object, ...]:
    """Return all that is known of a network, in a form that compares."""
    states = tuple(tuple(states.tolist()) for states in network.states)
    return network.terms, network.offset_terms, network.blamed, network.form, network.sizes, states


@pytest.mark.parametrize("seed", range(12))
def test_what_is_known_changes_no_network(seed: int) -> None:
    """Each change after each other one, with the memo emptied between them as between prices."""
    problem = random_problem(np.random.default_rng(seed), 8, 4, 3)
    memo, compared, reused = Memo(), 0, 0
    for before in CHANGES.values():
        for after in CHANGES.values():
            for change in (before, after):
                memo = memo.emptied()
                changed = change(problem)
                try:
                    alone = reduce(changed, Memo())
                except ContradictionError:
                    with pytest.raises(ContradictionError):
                        reduce(changed, memo)
                    continue
                last = memo.reduced[0].network if memo.reduced else None
                found = reduce(changed, memo)
                assert told(found) == told(alone)
                compared += 1
                reused += last is memo.reduced[0].network
    # Prices alone are no reason to tell terms anew.
    assert not compared or 0 < reused < compared
