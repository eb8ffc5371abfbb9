"""Two usages with one limit: what keeps both within it keeps every mean of both within it.

So a solver for one usage bounds the cost of all that keeps both (a surrogate constraint; Glover
1965), and finds it, where the mean is the right one.
"""

from __future__ import annotations

import math
from itertools import zip_longest

import numpy as np

from planners.alike_tables import paid
from planners.problem import Problem
from planners.solution import Solution
from planners.tables import Alternative, Table
from planners.variables import Factor, Variable

__all__ = ["mean_usage", "require_same_ways", "usage_of"]


def mean_usage(first: Problem, second: Problem, share: float) -> Problem:
    """Return a problem whose usage is a mean of those of two, which differ in nothing else.

    share: of the second's usage, between 0 and 1. The limit is that of `first`. Raises ValueError
    where the two have other tables, or other ways to pay for them.

    >>> import numpy as np
    >>> costs, usages = np.zeros(2), (np.array([4.0, 0.0]), np.array([0.0, 8.0]))
    >>> first, second = (Problem((Variable("a", costs, usage),)) for usage in usages)
    >>> mean_usage(first, second, 0.25).variables[0].usage
    array([3., 2.])
    """
    require_same_ways(first, second)
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

    # Tables are those of checked problems: no problem needs to be checked again.
    return first.with_tables(
        tuple(
            Variable(one.name, one.unary, mean(one.usage, two.usage), ways(one, two))
            for one, two in zip(first.variables, second.variables, strict=True)
        ),
        tuple(
            Factor(one.scope, one.table, mean(one.usage, two.usage), ways(one, two))
            for one, two in zip(first.factors, second.factors, strict=True)
        ),
    ).within(first.limit)


def require_same_ways(first: Problem, second: Problem) -> None:
    """Raise ValueError unless two problems have the same tables, in one order, and as many ways to
    pay for each: then the ways of a solution of one are those of the other.

    >>> one = Problem((Variable("a", np.zeros(2)),))
    >>> require_same_ways(one, Problem((Variable("b", np.zeros(2)),)))
    Traceback (most recent call last):
        ...
    ValueError: usages of different problems: table 0 is a of 2 in 1 ways, and b of 2 in 1 ways
    """
    pairs = zip_longest(_tables(first), _tables(second), fillvalue=_NO_TABLE)
    for place, (one, two) in enumerate(pairs):
        if one != two:
            raise ValueError(
                f"usages of different problems: table {place} is {_text(*one)}, and {_text(*two)}"
            )


_Told = tuple[tuple[str, ...], tuple[int, ...], int]
_NO_TABLE: _Told = ((), (), 0)


def _tables(problem: Problem) -> list[_Told]:
    """Return, per table of a problem, its variables, its shape and the number of its ways."""
    tables = [((v.name,), v.unary.shape, 1 + len(v.alternatives)) for v in problem.variables]
    return [*tables, *((f.scope, f.table.shape, 1 + len(f.alternatives)) for f in problem.factors)]


def _text(names: tuple[str, ...], shape: tuple[int, ...], ways: int) -> str:
    """Return the words by which an error tells what a table is."""
    return f"{', '.join(names)} of {'x'.join(map(str, shape))} in {ways} ways" if ways else "none"


def usage_of(problem: Problem, solution: Solution) -> float:
    """Return what a solution uses by the tables of a problem, paid in the ways of the solution.

    solution: of that problem, or of one that differs from it in its usages alone (see
    `require_same_ways`).

    >>> import numpy as np
    >>> problem = Problem((Variable("a", np.zeros(2), np.array([3.0, 5.0])),))
    >>> usage_of(problem, Solution({"a": 1}, 0.0, 0.0, ""))
    5.0
    """
    states = problem.states(solution.assignment)
    ways = (*solution.variable_alternatives, *solution.factor_alternatives)
    count = len(problem.variables) + len(problem.factors)
    chosen = np.array(ways or (0,) * count, dtype=np.intp)
    return math.fsum(paid(problem.alike(), states, chosen, count)[1].tolist())
