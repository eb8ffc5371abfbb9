"""Two usages with one limit: what keeps both within it keeps every mean of both within it.

So a solver for one usage bounds the cost of all that keeps both (a surrogate constraint; Glover
1965), and finds it, where the mean is the right one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from planners.problem import Problem
from planners.solution import Solution
from planners.tables import Alternative, Table
from planners.variables import Factor, Variable

__all__ = ["mean_usage", "usage_of"]


def mean_usage(first: Problem, second: Problem, share: float) -> Problem:
    """Return a problem whose usage is a mean of those of two, which differ in nothing else.

    share: of the second's usage, between 0 and 1. The limit is that of `first`.

    >>> import numpy as np
    >>> costs, usages = np.zeros(2), (np.array([4.0, 0.0]), np.array([0.0, 8.0]))
    >>> first, second = (Problem((Variable("a", costs, usage),)) for usage in usages)
    >>> mean_usage(first, second, 0.25).variables[0].usage
    array([3., 2.])
    """
    if not share:
        return first
    means: dict[tuple[int, int], Table] = {}

    def mean(one: Table | None, two: Table | None) -> Table | None:
        """Return the mean of two tables: one object for tables that are shared."""
        if one is two:
            return one
        key = id(one), id(two)
        if key not in means:
            ours, theirs = (
                np.zeros(()) if table is None else weight * table
                for table, weight in ((one, 1 - share), (two, share))
            )
            means[key] = ours + theirs
        return means[key]

    def ways(one: Variable | Factor, two: Variable | Factor) -> tuple[Alternative, ...]:
        """Return the alternatives of a table, with the means of their usages."""
        pairs = zip(one.alternatives, two.alternatives, strict=True)
        return tuple(Alternative(a.cost, mean(a.usage, b.usage)) for a, b in pairs)

    variables = tuple(
        replace(one, usage=mean(one.usage, two.usage), alternatives=ways(one, two))
        for one, two in zip(first.variables, second.variables, strict=True)
    )
    factors = tuple(
        replace(one, usage=mean(one.usage, two.usage), alternatives=ways(one, two))
        for one, two in zip(first.factors, second.factors, strict=True)
    )
    return Problem(variables, factors, first.limit)


def usage_of(problem: Problem, solution: Solution) -> float:
    """Return what a solution uses by the tables of a problem, paid in the ways of the solution.

    solution: of that problem, or of one that differs from it in its usages alone.

    >>> import numpy as np
    >>> problem = Problem((Variable("a", np.zeros(2), np.array([3.0, 5.0])),))
    >>> usage_of(problem, Solution({"a": 1}, 0.0, 0.0, ""))
    5.0
    """
    index = problem.index
    places = [(index(variable.name),) for variable in problem.variables] + problem.scopes()
    chosen = [solution.assignment[variable.name] for variable in problem.variables]
    paid = (*solution.variable_alternatives, *solution.factor_alternatives) or (0,) * len(places)
    usages = []
    items: tuple[Variable | Factor, ...] = (*problem.variables, *problem.factors)
    for item, scope, way in zip(items, places, paid, strict=True):
        usage = item.alternatives[way - 1].usage if way else item.usage
        if usage is not None:
            usages.append(float(usage[tuple(chosen[place] for place in scope)]))
    return math.fsum(usages)
