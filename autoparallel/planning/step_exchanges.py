"""Single choices exchanged: assignments that differ from one in what one op or parameter does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from planners import InfeasibleError, exact
from planners.problem import Problem

__all__ = ["answered", "exchanged"]


def exchanged(
    problem: Problem, assignment: Mapping[str, int], estimate: Problem, most: int
) -> Iterator[dict[str, int]]:
    """Yield assignments in which one variable has another state, in all equal layers alike.

    No sum, and no family of layouts, proposes that one parameter alone is stored in parts and
    gathered behind a product that hides it. problem: what is possible. estimate: the same with
    costs that say which exchanges are promising: these come first. most: how many there are.

    >>> from planners.variables import Variable
    >>> two = Problem((Variable("a", np.zeros(2)), Variable("b", np.array([0.0, 1.0, np.inf]))))
    >>> [*exchanged(two, {"a": 0, "b": 0}, two, most=8)]
    [{'a': 1, 'b': 0}, {'a': 0, 'b': 1}]
    """
    changes = _changes(estimate, assignment)
    promising: list[tuple[float, int, int]] = []
    groups = _alike(problem, assignment)
    for number, names in enumerate(groups):
        total = np.sum([changes[name] for name in names], axis=0)
        total[assignment[names[0]]] = np.inf
        promising += [
            (total[state], number, int(state)) for state in np.flatnonzero(total < np.inf)
        ]
    for _, number, state in sorted(promising):
        other = {**assignment, **dict.fromkeys(groups[number], state)}
        if math.isfinite(problem.cost(other)):
            yield other
            most -= 1
            if not most:
                return


def answered(
    assignment: Mapping[str, int], estimate: Problem, most: int
) -> Iterator[dict[str, int]]:
    """Yield assignments in which one variable has another state, in all equal layers alike, and
    those that share a table with it have the states that go best with that.

    Two choices may be shorter together where neither is by itself. estimate: costs that say what
    goes best, and which of them come first. most: how many are solved for; of a problem that has
    more of them there are none.

    >>> from planners.variables import Factor, Variable
    >>> apart = Factor(("a", "b"), np.array([[0.0, 9.0], [9.0, 0.0]]))
    >>> two = Problem((Variable("a", np.zeros(2)), Variable("b", np.zeros(2))), (apart,))
    >>> [*answered({"a": 0, "b": 0}, two, most=8)]
    [{'a': 1, 'b': 1}]
    """
    sizes = {variable.name: variable.size for variable in estimate.variables}
    groups = _alike(estimate, assignment)
    if sum(sizes[names[0]] - 1 for names in groups) > most:
        return
    near: dict[str, set[str]] = {name: set() for name in sizes}
    for factor in estimate.factors:
        for name in factor.scope:
            near[name].update(factor.scope)
    found: dict[tuple[int, ...], tuple[float, dict[str, int]]] = {}
    for names in groups:
        free = set().union(*(near[name] for name in names))
        for state in range(sizes[names[0]]):
            if state == assignment[names[0]]:
                continue
            fixed = {**assignment, **dict.fromkeys(names, state)}
            kept = {
                name: np.arange(size) == fixed[name]
                for name, size in sizes.items()
                if name in names or name not in free
            }
            try:
                solution = exact.solve(estimate.among(kept))
            except InfeasibleError:
                continue
            found[tuple(solution.assignment.values())] = solution.cost, dict(solution.assignment)
    for _, other in sorted(found.values(), key=lambda one: one[0]):
        yield other


def _tables(problem: Problem) -> dict[str, list[tuple[int, int]]]:
    """Return of each variable the tables over it and others, each with the variable's axis."""
    tables: dict[str, list[tuple[int, int]]] = {variable.name: [] for variable in problem.variables}
    for number, factor in enumerate(problem.factors):
        for axis, name in enumerate(factor.scope):
            tables[name].append((number, axis))
    return tables


def _changes(problem: Problem, assignment: Mapping[str, int]) -> dict[str, Any]:
    """Return of each variable the cost of what it takes part in, by the state that it had then."""
    tables = _tables(problem)
    changes: dict[str, Any] = {}
    places = [[assignment[name] for name in factor.scope] for factor in problem.factors]
    for variable in problem.variables:
        costs = np.array(variable.unary)
        for number, axis in tables[variable.name]:
            place: list[Any] = [*places[number]]
            place[axis] = slice(None)
            costs += problem.factors[number].table[tuple(place)]
        changes[variable.name] = costs - costs[assignment[variable.name]]
    return changes


def _alike(problem: Problem, assignment: Mapping[str, int]) -> list[list[str]]:
    """Return the variables in groups of equal layers: they have the same tables and state."""
    tables = _tables(problem)
    groups: dict[Any, list[str]] = {}
    for variable in problem.variables:
        own = sorted((id(problem.factors[at].table), axis) for at, axis in tables[variable.name])
        key = (id(variable.unary), assignment[variable.name], *own)
        groups.setdefault(key, []).append(variable.name)
    return list(groups.values())
