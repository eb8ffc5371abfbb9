"""Dropping states that another state of the same variable beats, whatever the others do.

A state is dominated where another one costs no more for each state of each neighbour, table by
table: replacing it never makes an assignment dearer, so that some optimum does without it (dead-end
elimination; Desmet et al., Nature 356, 1992, in the form of Goldstein, Biophysical Journal 66,
1994). Optima stay; marginals of the states that are dropped are lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from planners.problem import Problem
from planners.reduction import Network, reduce
from planners.table_memo import Memo
from planners.tables import Table

__all__ = ["Asked", "without_dominated"]

# What is dropped lets more be dropped, but most of it goes in two rounds.
_MOST_ROUNDS = 2
# Tables that take more comparisons are left alone: elimination would hardly take longer.
_MOST_COMPARISONS = 2**27


# Per variable, by index, which of its states a least cost is asked for.
Asked = Mapping[int, NDArray[np.bool_]]
_NOTHING: Asked = {}


def without_dominated(
    problem: Problem, network: Network, memo: Memo, asked: Asked = _NOTHING
) -> Network:
    """Return the network without dominated states; of states that are equal, the first one stays.

    problem: the plain problem that the network was reduced from. Its least cost stays the same, and
    so does the least cost with one of its variables in one of the states that are asked for: those
    are dropped only where another one of them is no dearer.

    >>> from planners import Factor, Variable
    >>> cheap = Variable("a", np.array([5.0, 0.0])), Variable("b", np.array([1.0, 0.0]))
    >>> problem = Problem(cheap, (Factor(("a", "b"), np.array([[0.0, 2.0], [2.0, 0.0]])),))
    >>> memo = Memo()
    >>> [len(states) for states in without_dominated(problem, reduce(problem, memo), memo).states]
    [1, 1]
    """
    sizes = [variable.size for variable in problem.variables]
    differences: dict[tuple[int, int], Table | None] = {}
    for _ in range(_MOST_ROUNDS):
        touching: list[list[tuple[int, int]]] = [[] for _ in network.states]
        for scope, number in network.terms:
            for axis, variable in enumerate(scope):
                touching[variable].append((number, axis))
        # Variables with the same tables around them, as in equal layers, are compared once.
        known: dict[tuple[int, tuple[tuple[int, int], ...], bytes], NDArray[np.bool_]] = {}
        domains, fewer = [], False
        for variable, states in enumerate(network.states):
            left = states
            if len(states) > 1:
                around = tuple(sorted(touching[variable]))
                own = asked[variable][states] if variable in asked else None
                look = len(states), around, b"" if own is None else own.tobytes()
                if look not in known:
                    known[look] = _undominated(len(states), around, memo, differences, own)
                left = states[known[look]]
                fewer = fewer or len(left) < len(states)
            allowed = np.zeros(sizes[variable], dtype=np.bool_)
            allowed[left] = True
            domains.append(memo.domain(allowed))
        if not fewer:
            break
        network = reduce(problem, memo, domains)
    return network


def _undominated(
    count: int,
    around: tuple[tuple[int, int], ...],
    memo: Memo,
    differences: dict[tuple[int, int], Table | None],
    asked: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Return, per state of a variable, whether no other state that stays dominates it.

    count: of its states. around: the tables that it is in, by number, and its axis in each.
    differences: see `_least_differences`, by table and axis. asked: states that only others of
    them dominate.
    """
    # total[a, b]: at least so much dearer is state a than state b, whatever the neighbours' states.
    total = np.zeros((count, count))
    for key in around:
        if key not in differences:
            differences[key] = _least_differences(memo.tables[key[0]], key[1])
        table = differences[key]
        if table is None:
            return np.ones(count, dtype=np.bool_)
        total += table
    dominates = total >= 0.0
    if asked is not None:
        dominates &= ~asked[:, None] | asked[None, :]
    np.fill_diagonal(dominates, False)
    stays = np.ones(count, dtype=np.bool_)
    # From the last state on, so that of states that dominate each other the first one stays.
    for state in reversed(range(count)):
        stays[state] = not (dominates[state] & stays).any()
    return stays


def _least_differences(table: Table, axis: int) -> Table | None:
    """Return result[a, b]: the least of table[a] - table[b] over the states of the other axes.

    axis: the one of a and b. Where a is forbidden, b need not be better; where b alone is
    forbidden, the result is -inf. It is never +inf, which another table's -inf would turn into NaN.
    Return None where this would take too long.

    >>> _least_differences(np.array([[1.0, 4.0], [0.0, np.inf]]), 0)
    array([[  0., -inf],
           [ -1.,   0.]])
    """
    rows = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
    count, width = rows.shape
    if count * count * width > _MOST_COMPARISONS:
        return None
    possible = np.isfinite(rows)
    whole = bool(possible.all())
    finite = rows if whole else np.where(possible, rows, 0.0)
    least = np.zeros((count, count)) if not finite.any() else np.full((count, count), np.inf)
    # Where all finite entries are zero, only what is forbidden matters.
    for column in range(width if finite.any() else 0):
        np.minimum(least, rows[:, column, None] - finite[None, :, column], out=least)
    if not whole:
        # Counts of the columns where a is possible and b is not, by a product of matrices.
        missing = possible.astype(np.float32) @ (~possible).astype(np.float32).T
        least[missing > 0] = -np.inf
        least[least == np.inf] = 0.0
    return least
