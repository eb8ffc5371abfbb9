"""Closing a known solution's gap by an integer program over the few states left in question."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from planners import ilp
from planners.fixing import possible_states
from planners.greedy_orders import TooWideError
from planners.problem import Problem
from planners.solution import InfeasibleError, Solution

__all__ = ["refine_by_integer_program"]

# Larger programs are left with their gap: they would take longer than the search itself.
MOST_ENTRIES = 3000
MOST_NODES = 20


def refine_by_integer_program(
    problem: Problem, known: Solution, enough: float, most_entries: int = MOST_ENTRIES
) -> Solution:
    """Return an optimum, if the states that can still be better than a known solution are few.

    known: a solution within the limit, with the multiplier at which its bound was found. enough:
    the gap at which to stop, as a share of the cost. most_entries: the known solution is returned
    if the tables left have more entries than this.
    The min-marginals at the known solution's multiplier say which states no better solution can
    have (see `fixing`). What is left goes to the integer program.
    """
    try:
        possible = possible_states(problem, known.cost, known.multiplier)
    except TooWideError:
        return known
    left = {name: np.flatnonzero(states) for name, states in possible.items()}
    if not all(len(states) for states in left.values()):
        return replace(known, lower_bound=known.cost)
    entries = sum(len(states) for states in left.values() if len(states) > 1)
    for factor in problem.factors:
        table_entries = (1 + len(factor.alternatives)) * math.prod(
            len(left[name]) for name in factor.scope
        )
        entries += table_entries if table_entries > 1 else 0
    if entries > most_entries:
        return known
    restricted = problem.restricted(left)
    try:
        refined = ilp.solve(restricted, relative_gap=max(enough, 1e-9), most_nodes=MOST_NODES)
    except InfeasibleError:
        return replace(known, lower_bound=known.cost)
    except TimeoutError:
        return known
    bound = max(known.lower_bound, min(refined.lower_bound, known.cost))
    if refined.cost >= known.cost:
        return replace(known, lower_bound=bound)
    assignment = {name: int(states[refined.assignment[name]]) for name, states in left.items()}
    method = f"{known.method}, closed by the {refined.method}"
    return replace(
        refined,
        assignment=assignment,
        lower_bound=bound,
        method=method,
        multiplier=known.multiplier,
    )
