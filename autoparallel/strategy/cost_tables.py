"""Tables of seconds and bytes, as the strategies fill them and the planner takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoparallel.placement import Layout
from planners import Alternative

__all__ = ["Table", "first_row", "stacked", "sum_of_columns", "with_usage"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """A cost table with its bytes, as the planner takes it.

    cost: seconds. usage: bytes per rank, None for 0. alternatives: other ways to pay for an entry,
    such as to redistribute again in the backward pass instead of saving.
    """

    cost: Array
    usage: Array | None = None
    alternatives: tuple[Alternative, ...] = ()

    @property
    def matters(self) -> bool:
        """True if any cost or usage is not zero; otherwise a factor of it would change nothing."""
        return bool(self.cost.any() or (self.usage is not None and self.usage.any()))


def sum_of_columns(
    columns: Array, targets: tuple[Layout, ...], groups: tuple[tuple[Layout, ...], ...]
) -> Array:
    """Return, per group, the sum of its targets' columns.

    columns: table[state, target], one column per target. groups: sets of targets, of any size;
    shorter ones are padded with a column of zeros.

    >>> seconds = np.array([[1.0, 2.0]])
    >>> sum_of_columns(seconds, ("a", "b"), (("a",), ("a", "b")))
    array([[1., 3.]])
    """
    place = {target: index for index, target in enumerate(targets)}
    if all(len(group) == 1 for group in groups):
        return columns[:, [place[group[0]] for group in groups]]
    most = max(map(len, groups))
    padded = np.concatenate([columns, np.zeros((len(columns), 1))], axis=1)
    total = np.zeros((len(columns), len(groups)))
    for at in range(most):
        column_numbers = [place[group[at]] if len(group) > at else len(targets) for group in groups]
        total = total + padded[:, column_numbers]
    return total


def stacked(tables: list[Table]) -> Table:
    """Return tables of two variables as one of three, whose last axis says which of them counts.

    tables: of equal shape, one per recompute mode; a single one is returned as it is.
    """
    if len(tables) == 1:
        return tables[0]
    cost = np.stack([table.cost for table in tables], axis=-1)
    usage = None
    if any(table.usage is not None for table in tables):
        usage = np.stack([_usage(table) for table in tables], axis=-1)
    if not any(table.alternatives for table in tables):
        return Table(cost, usage)
    # A mode without an alternative gets one that is impossible.
    others = [
        table.alternatives[0]
        if table.alternatives
        else Alternative(np.full(table.cost.shape, np.inf), np.zeros(table.cost.shape))
        for table in tables
    ]
    alternative = Alternative(
        np.stack([other.cost for other in others], axis=-1),
        np.stack([other.usage for other in others if other.usage is not None], axis=-1),
    )
    return Table(cost, usage, (alternative,))


def _usage(table: Table) -> Array:
    """Return the usage of a table, zeros where it has none."""
    return np.zeros(table.cost.shape) if table.usage is None else table.usage


def first_row(table: Table) -> Table:
    """Return the first row of a table, as a table of one variable.

    For values whose producer has a single state, and so no variable.
    """
    usage = None if table.usage is None else table.usage[0]
    alternatives = tuple(
        Alternative(one.cost[0], None if one.usage is None else one.usage[0])
        for one in table.alternatives
    )
    return Table(table.cost[0], usage, alternatives)


def with_usage(table: Table, least: Array, more: Array) -> Table:
    """Return a table whose alternatives use at least so much, and all of its ways so much more.

    >>> with_usage(Table(np.zeros(1)), np.array([2.0]), np.array([1.0])).usage
    array([1.])
    """
    others = tuple(
        Alternative(one.cost, np.maximum(0.0 if one.usage is None else one.usage, least) + more)
        for one in table.alternatives
    )
    return Table(table.cost, _usage(table) + more, others)
