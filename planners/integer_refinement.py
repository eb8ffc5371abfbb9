"""Closing what gap is left, where few choices are left to make."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from planners import exact, ilp
from planners.ordering import TooWideError
from planners.problem import Problem
from planners.solution import InfeasibleError, Solution
from planners.table_memo import Memo

__all__ = ["refine_by_integer_program"]

MOST_ENTRIES = 3000
MOST_NODES = 20


def refine_by_integer_program(
    problem: Problem, known: Solution, enough: float, most_entries: int = MOST_ENTRIES
) -> Solution:
    """The optimum, if the choices that can still be better than a known solution are few.

    enough: the gap at which to stop, as a share of the cost.
    What each state costs at least, with usage charged at the known solution's multiplier, shows
    which states no better solution can have. What is left goes to the integer program, unless its
    tables have more than `most_entries` entries: then the known solution is returned.
    """
    limit = 0.0 if problem.limit is None else problem.limit
    weighed = problem.weighed(known.multiplier)
    try:
        marginals = exact.min_marginals(weighed, problem.names, memo=Memo())
    except TooWideError:
        return known
    most = known.cost + known.multiplier * limit
    most += 1e-9 * (abs(most) + abs(known.cost))
    left = {name: np.flatnonzero(table <= most) for name, table in marginals.items()}
    if not all(len(states) for states in left.values()):
        return replace(known, lower_bound=known.cost)
    entries = sum(len(states) for states in left.values() if len(states) > 1)
    for factor in problem.factors:
        own = (1 + len(factor.alternatives)) * math.prod(len(left[name]) for name in factor.scope)
        entries += own if own > 1 else 0
    if entries > most_entries:
        return known
    restricted = problem.restricted(left)
    try:
        found = ilp.solve(restricted, relative_gap=max(enough, 1e-9), most_nodes=MOST_NODES)
    except InfeasibleError:
        return replace(known, lower_bound=known.cost)
    except TimeoutError:
        return known
    bound = max(known.lower_bound, min(found.lower_bound, known.cost))
    if found.cost >= known.cost:
        return replace(known, lower_bound=bound)
    assignment = {name: int(states[found.assignment[name]]) for name, states in left.items()}
    method = f"{known.method}, closed by the {found.method}"
    return replace(
        found, assignment=assignment, lower_bound=bound, method=method, multiplier=known.multiplier
    )
