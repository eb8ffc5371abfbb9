"""Brute force: the oracle that the other solvers are tested against."""

import math

import numpy as np

from planners.problem import Problem
from planners.solution import InfeasibleError, OverLimitError, Solution
from planners.tables import Table
from planners.variables import Factor, Variable

MAX_ASSIGNMENTS = 20_000_000


def solve(problem: Problem) -> Solution:
    """Price every assignment; of the cheapest within the limit, the first in lexicographic order.

    With a limit, every choice of alternatives counts as an assignment of its own.
    Raises ValueError above MAX_ASSIGNMENTS assignments, InfeasibleError if all cost +inf,
    OverLimitError if those that do not are over the limit.
    """
    asked = problem if problem.limit is not None else problem.weighed(0.0)
    # What has one choice gets no axis: numpy arrays have at most 64.
    axes = [v.size for v in asked.variables]
    items: list[Variable | Factor] = [*asked.variables, *asked.factors]
    axes += [1 + len(item.alternatives) for item in items]
    count = math.prod(axes)
    if count > MAX_ASSIGNMENTS:
        raise ValueError(f"{count} assignments are too many to try: at most {MAX_ASSIGNMENTS}")
    places = {choice: place for place, choice in enumerate(i for i, n in enumerate(axes) if n > 1)}
    shape = [axes[choice] for choice in places]
    costs, usages = np.zeros(shape), np.zeros(shape)
    scopes = [(place,) for place in range(len(asked.variables))] + asked.scopes()
    for number, (item, scope) in enumerate(zip(items, scopes, strict=True)):
        ways = item.prices.ways
        choices = (*scope, len(asked.variables) + number)
        costs += _aligned(np.stack([way.cost for way in ways], -1), choices, places)
        zeros = np.zeros(ways[0].cost.shape)
        used = [zeros if way.usage is None else way.usage for way in ways]
        usages += _aligned(np.stack(used, -1), choices, places)
    if not np.isfinite(costs).any():
        raise InfeasibleError()
    if asked.limit is not None:
        least = float(usages[np.isfinite(costs)].min())
        if not asked.fits(least):
            raise OverLimitError(least, least, asked.limit)
        costs[usages > asked.most] = np.inf
    best = np.unravel_index(int(np.argmin(costs)), costs.shape)
    states = [int(best[places[choice]]) if choice in places else 0 for choice in range(len(axes))]
    split = len(asked.variables)
    assignment = dict(zip(asked.names, states[:split], strict=True))
    if asked is not problem:
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
    """The table, whose axes are these choices, shaped to broadcast over all choices' places."""
    kept = [(places[c], size) for c, size in zip(choices, table.shape, strict=True) if size > 1]
    squeezed = table.reshape([size for _, size in kept])
    order = sorted(range(len(kept)), key=lambda axis: kept[axis][0])
    shape = [1] * len(places)
    for place, size in kept:
        shape[place] = size
    return squeezed.transpose(order).reshape(shape)
