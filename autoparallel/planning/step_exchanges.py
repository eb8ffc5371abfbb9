"""Single choices exchanged: assignments that differ from one in what one op or parameter does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from planners.problem import Problem

__all__ = ["exchanged"]


def exchanged(
    problem: Problem, assignment: Mapping[str, int], estimate: Problem, most: int
) -> list[dict[str, int]]:
    """Return assignments in which one variable has another state, in all equal layers alike.

    No sum, and no family of layouts, proposes that one parameter alone is stored in parts and
    gathered behind a product that hides it. problem: what is possible. estimate: the same with
    costs that say which exchanges are promising. most: how many are returned, the most promising
    first.

    >>> import numpy as np
    >>> from planners.variables import Variable
    >>> two = Problem((Variable("a", np.zeros(2)), Variable("b", np.array([0.0, 1.0, np.inf]))))
    >>> exchanged(two, {"a": 0, "b": 0}, two, most=8)
    [{'a': 1, 'b': 0}, {'a': 0, 'b': 1}]
    """
    found: list[tuple[float, int, dict[str, int]]] = []
    for names, states in _alike(problem, assignment):
        for state in states:
            other = {**assignment, **dict.fromkeys(names, state)}
            if math.isfinite(problem.cost(other)):
                found.append((estimate.cost(other), len(found), other))
    return [other for _, _, other in sorted(found, key=lambda row: row[:2])[:most]]


def _alike(
    problem: Problem, assignment: Mapping[str, int]
) -> Iterator[tuple[list[str], list[int]]]:
    """Yield the variables that are alike, with the states that they may have instead of theirs.

    Alike are those of equal layers: they have the same tables, and the same state.
    """
    tables: dict[str, list[Any]] = {variable.name: [] for variable in problem.variables}
    for factor in problem.factors:
        for axis, name in enumerate(factor.scope):
            tables[name].append((id(factor.table), axis))
    groups: dict[Any, list[str]] = {}
    for variable in problem.variables:
        own = (id(variable.unary), *sorted(tables[variable.name]), assignment[variable.name])
        groups.setdefault(own, []).append(variable.name)
    costs = {variable.name: variable.unary for variable in problem.variables}
    for names in groups.values():
        possible = costs[names[0]] < math.inf
        yield names, [int(s) for s in possible.nonzero()[0] if s != assignment[names[0]]]
