"""Tables of a problem that are the same arrays: entries of all of them are looked up at once.

A deep model has thousands of tables and a hundred different ones, as its layers share their arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planners.tables import Alternative, Table, read_only
from planners.variables import Factor, Variable

__all__ = [
    "Alike",
    "AlikeTables",
    "Multiplier",
    "Numbers",
    "alike_tables",
    "best_ways",
    "in_one_way",
    "paid",
]

# The cost of one unit of usage: the same for all tables, or one for each (variables come first).
Multiplier = float | Table
# States of variables by place, or numbers of ways by number of table.
Numbers = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Alike:
    """Tables that are paid in the same ways, by the same arrays.

    ways: the tables themselves first, then the alternatives. numbers: of the tables in the problem,
    ascending. scopes[axis, i]: the place of the variable along that axis of the i-th table.
    """

    ways: tuple[Alternative, ...]
    numbers: Numbers
    scopes: Numbers

    def entries(self, states: Numbers) -> tuple[Numbers, ...]:
        """Return the index by which an array of the tables gives an entry for each of them.

        states: of every variable of the problem, by place.
        """
        return tuple(states[self.scopes])

    def by_multiplier(self, multiplier: Multiplier) -> Iterator[tuple[float, Alike]]:
        """Yield each multiplier that some of the tables have, with these."""
        if isinstance(multiplier, float | int):
            yield multiplier, self
            return
        prices = multiplier[self.numbers]
        for price in dict.fromkeys(prices.tolist()):
            here = np.flatnonzero(prices == price)
            yield price, Alike(self.ways, self.numbers[here], self.scopes[:, here])


def alike_tables(
    items: Sequence[Variable | Factor], scopes: Sequence[tuple[int, ...]], first: int
) -> tuple[Alike, ...]:
    """Return the tables of variables, or of factors, in groups of the same arrays.

    scopes: parallel to the items, places of variables. first: the number of the first table.

    >>> vector = np.array([0.0, 1.0])
    >>> groups = alike_tables([Variable("a", vector), Variable("b", vector)], [(0,), (1,)], 0)
    >>> [group.numbers.tolist() for group in groups]
    [[0, 1]]
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for number, item in enumerate(items):
        cost = item.unary if isinstance(item, Variable) else item.table
        key: tuple[int, ...] = (id(cost), id(item.usage))
        if item.alternatives:
            key = item.prices.key
        members.setdefault(key, []).append(number)
    return tuple(
        Alike(
            items[numbers[0]].prices.ways,
            np.array(numbers, dtype=np.intp) + first,
            np.array([scopes[number] for number in numbers], dtype=np.intp).T,
        )
        for numbers in members.values()
    )


class AlikeTables:
    """The tables of a problem in groups of the same arrays, found when they are asked for.

    index: the place of every variable, by name.
    """

    def __init__(
        self, variables: Sequence[Variable], factors: Sequence[Factor], index: Mapping[str, int]
    ) -> None:
        self.variables, self.factors, self.index = variables, factors, index

    @cached_property
    def of_variables(self) -> tuple[Alike, ...]:
        """The unary tables."""
        scopes = [(place,) for place in range(len(self.variables))]
        return alike_tables(self.variables, scopes, 0)

    @cached_property
    def scopes(self) -> list[tuple[int, ...]]:
        """The scope of every factor, as places of variables."""
        return [tuple([self.index[name] for name in each.scope]) for each in self.factors]

    @cached_property
    def of_factors(self) -> tuple[Alike, ...]:
        """The tables over several variables, whose numbers come behind those of the unary ones."""
        return alike_tables(self.factors, self.scopes, len(self.variables))


def paid(
    groups: Sequence[Alike], states: Numbers, ways: Numbers, count: int
) -> tuple[Table, Table]:
    """Return the cost and the usage of every table's entry, paid in the given ways.

    states: of every variable. ways: by number of table; those left out of groups cost nothing.
    count: of tables.

    >>> variable = Variable("a", np.array([0.0, 1.0]), np.array([5.0, 0.0]))
    >>> groups = alike_tables([variable], [(0,)], 0)
    >>> paid(groups, np.array([1]), np.array([0]), 1)
    (array([1.]), array([0.]))
    """
    costs, usages = np.zeros(count), np.zeros(count)
    for group in groups:
        entries = group.entries(states)
        for way, table in enumerate(group.ways):
            if len(group.ways) == 1:
                numbers, chosen = group.numbers, entries
            else:
                here = np.flatnonzero(ways[group.numbers] == way)
                if not len(here):
                    continue
                numbers, chosen = group.numbers[here], tuple(axis[here] for axis in entries)
            costs[numbers] = table.cost[chosen]
            if table.usage is not None:
                usages[numbers] = table.usage[chosen]
    return costs, usages


def best_ways(
    groups: Sequence[Alike], states: Numbers, multiplier: Multiplier, count: int
) -> Numbers:
    """Return, by number of table, the way of least cost + multiplier * usage; of equals, of least
    usage.

    multiplier: at +inf usages are compared first and costs
    only between equal usages. Other arguments as of `paid`.

    >>> save = Variable("a", np.array([1.0]), np.array([8.0]), (Alternative(np.array([2.0])),))
    >>> groups = alike_tables([save], [(0,)], 0)
    >>> best_ways(groups, np.array([0]), 0.0, 1), best_ways(groups, np.array([0]), 1.0, 1)
    (array([0]), array([1]))
    """
    chosen = np.zeros(count, dtype=np.intp)
    for group in groups:
        if len(group.ways) == 1:
            continue
        entries = group.entries(states)
        each = multiplier if isinstance(multiplier, float | int) else multiplier[group.numbers]
        least = np.full(len(group.numbers), np.inf)
        tie, best = least.copy(), np.zeros(len(least), dtype=np.intp)
        for number, way in enumerate(group.ways):
            cost = way.cost[entries]
            usage = np.zeros(len(cost)) if way.usage is None else way.usage[entries]
            if isinstance(each, float | int) and each == np.inf:
                # inf * 0 is NaN, so this limit of a growing multiplier is written out.
                rank, second = np.where(np.isfinite(cost), usage, np.inf), cost
            else:
                rank, second = cost + each * usage, usage
            better = (rank < least) | ((rank == least) & (second < tie))
            least, tie = np.where(better, rank, least), np.where(better, second, tie)
            best[better] = number
        chosen[group.numbers] = best
    return chosen


def in_one_way(
    groups: Sequence[Alike],
    table_of: Callable[[Alike, float], Table | None],
    multiplier: Multiplier,
    count: int,
) -> tuple[list[Table | None], list[Alike]]:
    """Return another array for every table, None where it stays, and the groups of those.

    table_of: gives one for tables that are alike and have the same multiplier, so that layers which
    share their arrays share the new ones: that is how elimination recognizes equal layers without
    comparing entries.

    >>> groups = alike_tables([Variable("a", np.array([0.0, 1.0]))], [(0,)], 0)
    >>> in_one_way(groups, lambda alike, price: price + alike.ways[0].cost, 2.0, 1)[0]
    [array([2., 3.])]
    """
    tables: list[Table | None] = [None] * count
    parts: list[Alike] = []
    for group in groups:
        for price, part in group.by_multiplier(multiplier):
            table = table_of(part, price)
            if table is not None:
                table = read_only(table)
                part = Alike((Alternative(table),), part.numbers, part.scopes)
                for number in part.numbers.tolist():
                    tables[number] = table
            parts.append(part)
    return tables, parts
