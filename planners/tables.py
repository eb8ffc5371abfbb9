"""Cost tables, their usage of a limited resource, and other ways of paying for their entries."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

# One axis per variable of a scope; seconds (or any additive cost), with +inf for what is forbidden.
Table = NDArray[np.float64]


def same(first: Table | None, second: Table | None) -> bool:
    """Say whether two tables have the same content, or both are None."""
    if first is None or second is None:
        return first is second
    # Most tables are shared objects: identity spares the comparison of the entries.
    return first is second or np.array_equal(first, second)


def read_only(table: Table) -> Table:
    """Return the table, or a view of it that cannot be written: the caller's flags stay."""
    if not table.flags.writeable:
        return table
    table = table.view()
    table.flags.writeable = False
    return table


@dataclass(frozen=True, slots=True, eq=False)
class Alternative:
    """Another way to pay for every entry of a table, of the table's shape.

    cost: per entry; +inf where the entry cannot be paid in this way. usage: per entry, what it uses
    of the limited resource; None stands for 0 everywhere. Example: to recompute an activation is an
    alternative of higher cost and lower usage to saving it.
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
    """All ways to pay for the entries of one table; ways[0] is the table itself.

    >>> save = Alternative(np.array([1.0]), np.array([8.0]))
    >>> recompute = Alternative(np.array([2.0]), np.array([0.0]))
    >>> prices = Prices((save, recompute))
    >>> prices.pick((0,), multiplier=0.0), prices.pick((0,), multiplier=1.0)
    (0, 1)
    """

    ways: tuple[Alternative, ...]

    @property
    def key(self) -> tuple[int, ...]:
        """The identities of all arrays: equal keys mean equal prices, as long as the arrays are
        alive.
        """
        return tuple([part for way in self.ways for part in (id(way.cost), id(way.usage))])

    def weighed(self, multiplier: float) -> Table:
        """Return, for every entry, the least of cost + multiplier * usage over all ways.

        multiplier: cost of one unit of usage, finite and not negative. The result has the shape of
        the table, and is the cost table itself where there is nothing to add.
        """
        least: Table | None = None
        for way in self.ways:
            table = way.cost
            # A multiplier of 0 skips the sum, so that tables stay the same objects and are looked
            # up.
            if way.usage is not None and multiplier:
                table = table + multiplier * way.usage
            least = table if least is None else np.minimum(least, table)
        assert least is not None
        return least

    def usages(self) -> Table:
        """Return, for every entry, the least usage over all ways; +inf where no way is possible."""
        least: Table | None = None
        for way in self.ways:
            usage = np.zeros(way.cost.shape) if way.usage is None else way.usage
            usage = np.where(np.isinf(way.cost), np.inf, usage)
            least = usage if least is None else np.minimum(least, usage)
        assert least is not None
        return least

    def pick(self, entry: tuple[int, ...], multiplier: float) -> int:
        """Return the number of the way of least cost + multiplier * usage; of equals, of least
        usage.

        entry: one index per axis of the table. multiplier: cost of one unit of usage; +inf compares
        usages first and costs only between equal usages.
        """
        if len(self.ways) == 1:
            return 0
        best, chosen = (np.inf, np.inf), 0
        for number, way in enumerate(self.ways):
            cost = float(way.cost[entry])
            usage = 0.0 if way.usage is None else float(way.usage[entry])
            rank = (cost + multiplier * usage, usage)
            if multiplier == np.inf:
                # inf * 0 is NaN, so this limit of a growing multiplier is written out.
                rank = (usage if np.isfinite(cost) else np.inf, cost)
            if rank < best:
                best, chosen = rank, number
        return chosen

    def at(self, entry: tuple[int, ...]) -> Iterator[tuple[float, float]]:
        """Yield (cost, usage) of the entry for every way, in order."""
        for way in self.ways:
            yield float(way.cost[entry]), 0.0 if way.usage is None else float(way.usage[entry])


class Checker:
    """Turns arrays into read-only float64 views; each distinct array object is examined once.

    One checker serves all tables of a problem: repeated layers hand in the same arrays, so the
    examination does not grow with the depth of the model.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], Table] = {}
        self._alive: list[object] = []

    def cost(self, array: object, what: str) -> Table:
        """Return the array as a cost table (+inf is fine). Raises ValueError for NaN and -inf.

        what: the name of the table in error messages.
        """
        return self._checked(array, what, False)

    def usage(self, array: object, shape: tuple[int, ...], what: str) -> Table | None:
        """Return the array as a usage table, or None for None.

        Raises ValueError for an entry that is not finite and for a shape other than `shape`: usages
        are added up and multiplied, which +inf would turn into NaN.
        """
        if array is None:
            return None
        table = self._checked(array, what, True)
        if table.shape != shape:
            raise ValueError(f"{what} has shape {table.shape}, not {shape}")
        return table

    def alternatives(
        self, ways: tuple[Alternative, ...], shape: tuple[int, ...], what: str
    ) -> tuple[Alternative, ...]:
        """Return the alternatives with both tables of each checked; errors as of `cost` and
        `usage`.
        """
        checked = []
        for way in ways:
            cost = self.cost(way.cost, f"alternative {what}")
            if cost.shape != shape:
                raise ValueError(f"alternative {what} has shape {cost.shape}, not {shape}")
            usage = self.usage(way.usage, shape, f"usage of an alternative {what}")
            unchanged = cost is way.cost and usage is way.usage
            checked.append(way if unchanged else Alternative(cost, usage))
        return tuple(checked)

    def _checked(self, array: object, what: str, finite: bool) -> Table:
        """Return the read-only float64 view; an array object is examined once."""
        earlier = self._known.get((id(array), finite))
        if earlier is not None:
            return earlier
        table = cast(Table, np.asarray(array, dtype=np.float64))
        if np.isnan(table).any():
            raise ValueError(f"{what} holds NaN")
        if (table == -np.inf).any():
            raise ValueError(f"{what} holds -inf")
        if finite and np.isinf(table).any():
            raise ValueError(f"{what} holds inf: forbid entries in the cost table")
        table = read_only(table)
        self._known[id(array), finite] = table
        # The array is kept alive, so that its id is not given to another array.
        self._alive.append(array)
        return table
