"""Brute force: the oracle that the other solvers are tested against."""

import math

import numpy as np

from planners.problem import InfeasibleError, Problem, Solution, Table

MAX_ASSIGNMENTS = 20_000_000


def solve(problem: Problem) -> Solution:
    """Price every assignment; of the cheapest, the first in lexicographic order.

    Raises ValueError above MAX_ASSIGNMENTS assignments, InfeasibleError if all cost +inf.
    """
    count = math.prod(variable.size for variable in problem.variables)
    if count > MAX_ASSIGNMENTS:
        raise ValueError(f"{count} assignments are too many to try: at most {MAX_ASSIGNMENTS}")
    # Variables of one state get no axis: numpy arrays have at most 64.
    free = [variable for variable in problem.variables if variable.size > 1]
    axis = {variable.name: position for position, variable in enumerate(free)}
    costs = np.zeros([variable.size for variable in free])
    for variable in problem.variables:
        costs += _aligned(variable.unary, (variable.name,), axis)
    for factor in problem.factors:
        if problem.index(factor.first) < problem.index(factor.second):
            costs += _aligned(factor.table, (factor.first, factor.second), axis)
        else:
            costs += _aligned(factor.table.T, (factor.second, factor.first), axis)
    best = int(np.argmin(costs))
    if not np.isfinite(costs.flat[best]):
        raise InfeasibleError()
    states = np.unravel_index(best, costs.shape)
    assignment = {
        variable.name: int(states[axis[variable.name]]) if variable.size > 1 else 0
        for variable in problem.variables
    }
    cost = problem.cost(assignment)
    return Solution(assignment, cost, cost, "exhaustive search")


def _aligned(table: Table, names: tuple[str, ...], axis: dict[str, int]) -> Table:
    """The table shaped to broadcast over all variables; names in the problem's order."""
    shape = [1] * len(axis)
    for name, size in zip(names, table.shape, strict=True):
        if size > 1:
            shape[axis[name]] = size
    return table.reshape(shape)
