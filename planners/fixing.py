"""Forbidding the states that no better solution within the limit can have (reduced-cost fixing)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planners import exact
from planners.problem import Problem
from planners.solution import InfeasibleError
from planners.table_memo import Memo
from planners.tables import Alternative, Prices

# Min-marginals of more work, in table entries read, take longer than what they spare.
_MOST_WORK = 2**27

__all__ = ["forbid", "is_allowed", "possible_states"]


def possible_states(
    problem: Problem, most_cost: float, multiplier: float
) -> dict[str, NDArray[np.bool_]]:
    """Return, per variable, which states an assignment of at most that cost can have.

    multiplier: at which usage is charged, best the one at which the bound is best. A state is out
    where the least cost with it, usage charged, exceeds the cost plus the charge for the whole
    limit. Nothing is possible where the problem has no assignment at all.
    Raises TooWideError where the min-marginals need too large tables or too long.

    >>> from planners.variables import Variable
    >>> variable = Variable("a", np.array([1.0, 2.0, 9.0]), np.array([4.0, 1.0, 0.0]))
    >>> possible_states(Problem((variable,), limit=2.0), 3.0, multiplier=0.5)["a"]
    array([ True,  True, False])
    """
    limit = 0.0 if problem.limit is None else problem.limit
    try:
        weighed = problem.weighed(multiplier)
        marginals = exact.min_marginals(weighed, problem.names, memo=Memo(), most_work=_MOST_WORK)
    except InfeasibleError:
        return {variable.name: np.zeros(variable.size, np.bool_) for variable in problem.variables}
    # An assignment x has cost(x) <= most_cost and usage(x) <= limit, so its charged cost is at most
    # this. What is added allows for rounding.
    most = most_cost + multiplier * limit
    most += 1e-9 * (abs(most) + abs(most_cost))
    return {name: table <= most for name, table in marginals.items()}


def forbid(problem: Problem, possible: dict[str, NDArray[np.bool_]]) -> Problem:
    """Return the problem where only some states are possible; all numbers of states stay."""
    variables = []
    for variable in problem.variables:
        out = ~possible[variable.name]
        if out.any():
            # A state whose own cost is infinite may still be possible in an alternative way.
            ways = tuple(
                Alternative(np.where(out, np.inf, way.cost), way.usage)
                for way in variable.alternatives
            )
            unary = np.where(out, np.inf, variable.unary)
            variable = replace(variable, unary=unary, alternatives=ways)
        variables.append(variable)
    return replace(problem, variables=tuple(variables))


def is_allowed(problem: Problem, assignment: Mapping[str, int]) -> bool:
    """Return whether every variable may have its state, whatever the others have.

    >>> from planners.variables import Variable
    >>> problem = Problem((Variable("a", np.array([1.0, 2.0])),))
    >>> [is_allowed(problem.pinned({"a": 1}), {"a": state}) for state in range(2)]
    [False, True]
    """
    states = problem.states(assignment)
    unary = (group for group in problem.alike() if len(group.scopes) == 1)
    return all(
        np.isfinite(Prices(group.ways).weighed(0.0))[group.entries(states)].all() for group in unary
    )
