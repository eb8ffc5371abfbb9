"""Brute force over all assignments: the oracle that the other solvers are tested against."""

import math

import numpy as np

from planners.problem import Problem
from planners.solution import InfeasibleError, OverLimitError, Solution
from planners.tables import Table
from planners.variables import Factor, Variable

MAX_ASSIGNMENTS = 20_000_000


def solve(problem: Problem) -> Solution:
    """Price every assignment; of the cheapest within the limit, return the first.

    First means first in lexicographic order of states. With a limit, every choice of alternatives
    counts as an assignment of its own.
    Raises ValueError above MAX_ASSIGNMENTS assignments, InfeasibleError if all cost +inf,
    OverLimitError if those that do not are over the limit.

    >>> solve(Problem((Variable("a", np.array([2.0, 1.0])),))).assignment
    {'a': 1}
    """
    searched = problem if problem.limit is not None else problem.weighed(0.0)
    # Choices without alternatives get no axis: numpy arrays have at most 64 axes.
    axes = [v.size for v in searched.variables]
    items: list[Variable | Factor] = [*searched.variables, *searched.factors]
    axes += [1 + len(item.alternatives) for item in items]
    count = math.prod(axes)
    if count > MAX_ASSIGNMENTS:
        raise ValueError(f"{count} assignments are too many to try: at most {MAX_ASSIGNMENTS}")
    places = {choice: place for place, choice in enumerate(i for i, n in enumerate(axes) if n > 1)}
    shape = [axes[choice] for choice in places]
    costs, usages = np.zeros(shape), np.zeros(shape)
    scopes = [(place,) for place in range(len(searched.variables))] + searched.scopes()
    for number, (item, scope) in enumerate(zip(items, scopes, strict=True)):
        ways = item.prices.ways
        choices = (*scope, len(searched.variables) + number)
        costs += _aligned(np.stack([way.cost for way in ways], -1), choices, places)
        zeros = np.zeros(ways[0].cost.shape)
        usages_of_ways = [zeros if way.usage is None else way.usage for way in ways]
        usages += _aligned(np.stack(usages_of_ways, -1), choices, places)
    if not np.isfinite(costs).any():
        raise InfeasibleError()
    if searched.limit is not None:
        least = float(usages[np.isfinite(costs)].min())
        if not searched.fits(least):
            raise OverLimitError(least, least, searched.limit)
        costs[usages > searched.most] = np.inf
    best = np.unravel_index(int(np.argmin(costs)), costs.shape)
    states = [int(best[places[choice]]) if choice in places else 0 for choice in range(len(axes))]
    split = len(searched.variables)
    assignment = dict(zip(searched.names, states[:split], strict=True))
    if searched is not problem:
        return Solution.of(problem, assignment, "exhaustive search")
    cost = float(costs[best])
    variable_alternatives = tuple(states[split : 2 * split])
    return Solution(
        assignment,
        cost,
        cost,
        "exhaustive search",
        float(usages[best]),
        variable_alternatives,
        tuple(states[2 * split :]),
    )


def _aligned(table: Table, choices: tuple[int, ...], places: dict[int, int]) -> Table:
    """Return the table shaped to broadcast over all choices.

    choices: per axis of the table, the choice that it runs over. places: by choice, its axis in the
    joint table; choices between one state alone have none.
    """
    long_axes = [
        (places[c], size) for c, size in zip(choices, table.shape, strict=True) if size > 1
    ]
    squeezed = table.reshape([size for _, size in long_axes])
    order = sorted(range(len(long_axes)), key=lambda axis: long_axes[axis][0])
    shape = [1] * len(places)
    for place, size in long_axes:
        shape[place] = size
    return squeezed.transpose(order).reshape(shape)
