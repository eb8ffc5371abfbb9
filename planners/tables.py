"""Cost tables, what they use of a limited resource, and other ways of paying for their entries."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]


def same(first: Table | None, second: Table | None) -> bool:
    """Whether two tables have the same content, or both are none."""
    if first is None or second is None:
        return first is second
    return first is second or np.array_equal(first, second)


@dataclass(frozen=True, slots=True, eq=False)
class Alternative:
    """Another way to pay for every entry of a table: cost and usage, of the table's shape.

    A cost of +inf: not to be had for that entry. usage: None is 0 everywhere.
    """

    cost: Table
    usage: Table | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Alternative):
            return NotImplemented
        return same(self.cost, other.cost) and same(self.usage, other.usage)

    def __hash__(self) -> int:
        return hash(self.cost.shape)


@dataclass(frozen=True, slots=True)
class Prices:
    """All ways to pay for the entries of one table; the first is the table itself."""

    ways: tuple[Alternative, ...]

    @property
    def key(self) -> tuple[int, ...]:
        """The arrays' identities: equal keys, equal prices (as long as the arrays live)."""
        return tuple([part for way in self.ways for part in (id(way.cost), id(way.usage))])

    def weighed(self, multiplier: float) -> Table:
        """For every entry the least of cost + multiplier * usage."""
        least: Table | None = None
        for way in self.ways:
            table = way.cost
            if way.usage is not None and multiplier:
                table = table + multiplier * way.usage
            least = table if least is None else np.minimum(least, table)
        assert least is not None
        return least

    def usages(self) -> Table:
        """For every entry the least usage, +inf where no way is to be had."""
        least: Table | None = None
        for way in self.ways:
            usage = np.zeros(way.cost.shape) if way.usage is None else way.usage
            usage = np.where(np.isinf(way.cost), np.inf, usage)
            least = usage if least is None else np.minimum(least, usage)
        assert least is not None
        return least

    def pick(self, entry: tuple[int, ...], multiplier: float) -> int:
        """The way of least cost + multiplier * usage; of several, of least usage.

        multiplier: +inf looks at usage first.
        """
        if len(self.ways) == 1:
            return 0
        best, chosen = (np.inf, np.inf), 0
        for number, way in enumerate(self.ways):
            cost = float(way.cost[entry])
            usage = 0.0 if way.usage is None else float(way.usage[entry])
            rank = (cost + multiplier * usage, usage)
            if multiplier == np.inf:
                rank = (usage if np.isfinite(cost) else np.inf, cost)
            if rank < best:
                best, chosen = rank, number
        return chosen

    def at(self, entry: tuple[int, ...]) -> Iterator[tuple[float, float]]:
        """Cost and usage of the entry, by every way."""
        for way in self.ways:
            yield float(way.cost[entry]), 0.0 if way.usage is None else float(way.usage[entry])


class Checker:
    """Gives read-only float64 views of arrays; each distinct array object is looked at once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], Table] = {}
        self._alive: list[object] = []

    def cost(self, array: object, what: str) -> Table:
        """May hold +inf; raises ValueError for NaN and -inf."""
        return self._checked(array, what, False)

    def usage(self, array: object, shape: tuple[int, ...], what: str) -> Table | None:
        """All finite and of that shape, or None; raises ValueError if not."""
        if array is None:
            return None
        table = self._checked(array, what, True)
        if table.shape != shape:
            raise ValueError(f"{what} has shape {table.shape}, not {shape}")
        return table

    def alternatives(
        self, ways: tuple[Alternative, ...], shape: tuple[int, ...], what: str
    ) -> tuple[Alternative, ...]:
        """Both tables of every alternative checked."""
        checked = []
        for way in ways:
            cost = self.cost(way.cost, f"alternative {what}")
            if cost.shape != shape:
                raise ValueError(f"alternative {what} has shape {cost.shape}, not {shape}")
            usage = self.usage(way.usage, shape, f"usage of an alternative {what}")
            known = cost is way.cost and usage is way.usage
            checked.append(way if known else Alternative(cost, usage))
        return tuple(checked)

    def _checked(self, array: object, what: str, finite: bool) -> Table:
        known = self._known.get((id(array), finite))
        if known is not None:
            return known
        table = cast(Table, np.asarray(array, dtype=np.float64))
        if np.isnan(table).any():
            raise ValueError(f"{what} holds NaN")
        if (table == -np.inf).any():
            raise ValueError(f"{what} holds -inf")
        if finite and np.isinf(table).any():
            raise ValueError(f"{what} holds inf: forbid entries in the cost table")
        if table.flags.writeable:
            table = table.view()
            table.flags.writeable = False
        self._known[id(array), finite] = table
        self._alive.append(array)  # so that its id is not given to another array
        return table
