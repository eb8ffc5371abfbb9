"""Single changes of an assignment under a limit: to get within it, then to spend what is left.

A change is a group of variables that take another solution's states, or one table that is paid in
another way. Changes are applied greedily, the best ratio of cost to usage first, as for a knapsack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from planners.problem import Problem
from planners.solution import Solution
from planners.variables import Factor, Variable

__all__ = ["improve_within_limit", "repair_to_limit"]


def improve_within_limit(
    problem: Problem, start: Solution, others: Sequence[Solution], multiplier: float
) -> Solution:
    """Return a solution within the limit that costs no more than `start`, which is within it.

    The differences to another solution fall into groups that no table connects, so that each group
    can be adopted by itself; so can each table's way to pay. others: the solutions to adopt from,
    the best first. multiplier: decides the way in which a table is paid where its entry is in
    neither solution.
    """
    editor = _Filling(problem, start, multiplier)
    for other in reversed(others):
        editor.adopt_changes(other)
    editor.switch_alternatives()
    return editor.solution(start)


def repair_to_limit(
    problem: Problem, start: Solution, others: Sequence[Solution], multiplier: float
) -> Solution | None:
    """Return a solution within the limit near one that is over it.

    others: solutions that use less. Returns None where changes as in `improve_within_limit` do not
    suffice.
    """
    editor = _Filling(problem, start, multiplier)
    editor.save(others)
    return editor.solution(start) if editor.left >= 0.0 else None


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of an assignment: cost and usage that it adds, new states, new ways to pay.

    states: by index of the variable. ways: by number of the table (variables' tables first).
    """

    cost: float
    usage: float
    states: dict[int, int]
    ways: dict[int, int]


class _Filling:
    """An assignment under change.

    states: of each variable. ways: by which each table is paid. paid: (cost, usage) of each table.
    touched: tables that the changes of this round were applied to: what a change costs was computed
    before them. left: the part of the limit that is not used, negative when over it.
    """

    def __init__(self, problem: Problem, start: Solution, multiplier: float) -> None:
        self.problem, self.multiplier = problem, multiplier
        self.states = [start.assignment[name] for name in problem.names]
        self.ways = [*start.variable_alternatives, *start.factor_alternatives]
        self.items: list[Variable | Factor] = [*problem.variables, *problem.factors]
        self.scopes = [(place,) for place in range(len(self.states))] + problem.scopes()
        self.touching: list[list[int]] = [[] for _ in self.states]
        for number, scope in enumerate(self.scopes):
            for place in scope:
                self.touching[place].append(number)
        self.paid = [
            self.price(number, self.entry(number, {}), way) for number, way in enumerate(self.ways)
        ]
        self.touched: dict[int, None] = {}
        self.left = problem.most - math.fsum(usage for _, usage in self.paid)

    def price(self, number: int, entry: tuple[int, ...], way: int) -> tuple[float, float]:
        """Return cost and usage of a table's entry, paid in that way."""
        item = self.items[number]
        if way:
            alternative = item.alternatives[way - 1]
            table, usage = alternative.cost, alternative.usage
        else:
            table, usage = item.unary if isinstance(item, Variable) else item.table, item.usage
        return float(table[entry]), 0.0 if usage is None else float(usage[entry])

    def entry(self, number: int, changed: dict[int, int]) -> tuple[int, ...]:
        """Return the entry of a table under the present states, but for the changed ones."""
        return tuple([changed.get(place, self.states[place]) for place in self.scopes[number]])

    def adopt_changes(self, other: Solution) -> None:
        """Adopt what saves cost and fits, most cost per usage first."""
        self.touched = {}
        worthwhile = [change for change in self.changes(other) if change.cost < 0.0]
        # Changes that save both cost and usage come before all that must be bought.
        worthwhile.sort(key=lambda c: c.cost / c.usage if c.usage > 0 else -math.inf)
        self.apply(worthwhile)

    def save(self, others: Sequence[Solution]) -> None:
        """Adopt what saves usage until enough is saved, least cost per usage first."""
        changes = [change for other in others for change in self.changes(other)]
        saving = [c for c in [*changes, *self.payments()] if c.usage < 0.0 and c.cost < math.inf]
        saving.sort(key=lambda change: -change.cost / change.usage)
        for change in saving:
            if self.left >= 0.0:
                return
            self.apply([change])

    def changes(self, other: Solution) -> list[_Change]:
        """Return all differences to another solution, in groups that no table connects."""
        wanted = [other.assignment[name] for name in self.problem.names]
        ways = [*other.variable_alternatives, *other.factor_alternatives]
        different = [
            p
            for p, (present, new) in enumerate(zip(self.states, wanted, strict=True))
            if present != new
        ]
        return [self.change(group, wanted, ways) for group in self.groups(different)]

    def groups(self, places: list[int]) -> Iterable[list[int]]:
        """Yield the variables in groups that tables connect with each other."""
        pending = dict.fromkeys(places)
        while pending:
            group = [next(iter(pending))]
            del pending[group[0]]
            for place in group:
                for number in self.touching[place]:
                    for other in self.scopes[number]:
                        if other in pending:
                            del pending[other]
                            group.append(other)
            yield group

    def change(self, group: list[int], wanted: list[int], ways: list[int]) -> _Change:
        """Return the change that gives a group of variables the wanted states.

        ways: of the other solution; a table whose whole entry is the other's is paid as there.
        """
        states = {place: wanted[place] for place in group}
        numbers = dict.fromkeys(n for place in group for n in self.touching[place])
        costs, usages, chosen = [], [], {}
        for number in numbers:
            entry = self.entry(number, states)
            item = self.items[number]
            way = 0
            if item.alternatives:
                entry_is_wanted = all(
                    wanted[place] == s for place, s in zip(self.scopes[number], entry, strict=True)
                )
                way = ways[number] if entry_is_wanted else item.prices.pick(entry, self.multiplier)
            cost, usage = self.price(number, entry, way)
            chosen[number] = way
            costs += [cost, -self.paid[number][0]]
            usages += [usage, -self.paid[number][1]]
        if math.inf in costs:
            return _Change(math.inf, 0.0, {}, {})
        return _Change(math.fsum(costs), math.fsum(usages), states, chosen)

    def switch_alternatives(self) -> None:
        """Pay single tables in another way, most cost per usage first."""
        worthwhile = [change for change in self.payments() if change.cost < 0.0]
        worthwhile.sort(key=lambda c: c.cost / c.usage if c.usage > 0 else -math.inf)
        self.touched = {}
        self.apply(worthwhile)

    def payments(self) -> list[_Change]:
        """Return all changes of one table's way to pay, states as they are."""
        changes = []
        for number, item in enumerate(self.items):
            cost, usage = self.paid[number]
            for way in range(1 + len(item.alternatives) if item.alternatives else 0):
                new_cost, new_usage = self.price(number, self.entry(number, {}), way)
                changes.append(_Change(new_cost - cost, new_usage - usage, {}, {number: way}))
        return changes

    def apply(self, changes: list[_Change]) -> None:
        """Apply, one after the other, the changes that fit; at most one for each table."""
        for change in changes:
            if change.usage > max(self.left, 0.0):
                continue
            if any(number in self.touched for number in change.ways):
                continue
            self.touched.update(dict.fromkeys(change.ways))
            self.left -= change.usage
            for place, state in change.states.items():
                self.states[place] = state
            for number, way in change.ways.items():
                self.ways[number] = way
                self.paid[number] = self.price(number, self.entry(number, {}), way)

    def solution(self, start: Solution) -> Solution:
        """Return the changed assignment; bound, method and multiplier are those of `start`."""
        count = len(self.states)
        return replace(
            start,
            assignment=dict(zip(self.problem.names, self.states, strict=True)),
            cost=math.fsum(cost for cost, _ in self.paid),
            usage=math.fsum(usage for _, usage in self.paid),
            variable_alternatives=tuple(self.ways[:count]),
            factor_alternatives=tuple(self.ways[count:]),
        )
