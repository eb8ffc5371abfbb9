"""Dropping states that another state of the same variable beats, whatever the others do.

A state is dominated where another one costs no more for each state of each neighbour, table by
table: replacing it never makes an assignment dearer, so that some optimum does without it (dead-end
elimination; Desmet et al., Nature 356, 1992, in the form of Goldstein, Biophysical Journal 66,
1994). Optima stay; marginals of the states that are dropped are lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
# So many columns of a table rule out most pairs of states; the others are compared in full.
_SAMPLE = 16
# More than any difference. It is finite: an infinite one and -inf would add up to NaN.
_ANYTHING = 1e300
# Entries of the differences that are held at once.
_CHUNK_ENTRIES = 2**20


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
    # Variables with the same tables around them, as in equal layers, are compared once.
    known = memo.undominated
    for _ in range(_MOST_ROUNDS):
        touching: list[list[tuple[int, int]]] = [[] for _ in network.states]
        for scope, number in network.terms:
            for axis, variable in enumerate(scope):
                touching[variable].append((number, axis))
        domains, fewer = [], False
        for variable, states in enumerate(network.states):
            left = states
            if len(states) > 1:
                around = tuple(sorted(touching[variable]))
                own = asked[variable][states] if variable in asked else None
                look = len(states), around, b"" if own is None else own.tobytes()
                if look not in known:
                    known[look] = _undominated(len(states), around, memo, own)
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
    asked: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Return, per state of a variable, whether no other state that stays dominates it.

    count: of its states. around: the tables that it is in, by number, and its axis in each. asked:
    states that only others of them dominate.
    """
    rows: dict[tuple[int, int], _Rows | None] = memo.compared
    tables: list[_Rows] = []
    for key in around:
        if key not in rows:
            rows[key] = _Rows.of(memo.tables[key[0]], key[1])
        table = rows[key]
        if table is None:
            return np.ones(count, dtype=np.bool_)
        tables.append(table)
    # most[a, b]: at most so much dearer is state a than state b, when the neighbours choose.
    # Rounding is monotone, so that a sum of larger numbers in the same order is no smaller.
    most = np.zeros((count, count))
    for table in tables:
        most += table.most
    dominates = most >= 0.0
    if asked is not None:
        dominates &= ~asked[:, None] | asked[None, :]
    np.fill_diagonal(dominates, False)
    pairs = np.nonzero(dominates)
    total = np.zeros(len(pairs[0]))
    for table in tables:
        total += table.least(*pairs)
    dominates[pairs] = total >= 0.0
    stays = np.ones(count, dtype=np.bool_)
    # From the last state on, so that of states that dominate each other the first one stays.
    for state in reversed(range(count)):
        stays[state] = not (dominates[state] & stays).any()
    return stays


@dataclass(frozen=True, slots=True)
class _Rows:
    """A table as one row per state of a variable, to tell by how much its states differ.

    rows: with +inf where the state is forbidden; finite: with 0 there. most[a, b]: at least the
    least of rows[a] - rows[b]; it is -inf where b alone is forbidden somewhere. is_exact: whether
    it is the least.
    """

    rows: Table
    finite: Table
    most: Table
    is_exact: bool

    @staticmethod
    def of(table: Table, axis: int) -> _Rows | None:
        """Return the rows of the states of one axis; None where comparing them takes too long."""
        rows = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
        count, width = rows.shape
        if count * count * width > _MOST_COMPARISONS:
            return None
        possible = np.isfinite(rows)
        whole = bool(possible.all())
        finite = rows if whole else np.where(possible, rows, 0.0)
        # Where all finite entries are zero, only what is forbidden matters.
        varies = bool(finite.any())
        columns = range(0, width if varies else 0, max(width // _SAMPLE, 1))
        most = np.full((count, count), np.inf) if varies else np.zeros((count, count))
        for column in columns:
            np.minimum(most, rows[:, column, None] - finite[None, :, column], out=most)
        is_exact = not varies or len(columns) == width
        if not whole:
            # Counts of the columns where a is possible and b is not, by a product of matrices.
            missing = possible.astype(np.float32) @ (~possible).astype(np.float32).T
            most[missing > 0] = -np.inf
            # All that was compared is forbidden for a: the rest may be so, too, or be anything.
            most[most == np.inf] = 0.0 if is_exact else _ANYTHING
        return _Rows(rows, finite, most, is_exact)

    def least(self, one: NDArray[np.intp], two: NDArray[np.intp]) -> Table:
        """Return the least of rows[a] - rows[b] for pairs of states, where b is not forbidden
        alone.

        Where a is forbidden, b need not be better. The result is never +inf, which another table's
        -inf would turn into NaN.

        >>> rows = _Rows.of(np.array([[1.0, 4.0], [0.0, np.inf]]), 0)
        >>> rows.least(np.array([0, 1]), np.array([0, 0])) if rows else None
        array([ 0., -1.])
        """
        if self.is_exact:
            exact: Table = self.most[one, two]
            return exact
        result = np.empty(len(one))
        step = max(_CHUNK_ENTRIES // self.rows.shape[1], 1)
        for start in range(0, len(one), step):
            part = slice(start, start + step)
            difference = self.rows[one[part]]
            difference -= self.finite[two[part]]
            result[part] = difference.min(axis=1)
        result[result == np.inf] = 0.0
        return result
