"""Spending what is left of a limit: single changes towards other solutions, best value first."""

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
    """A solution within the limit that costs no more than `start`, which is within it.

    What another solution does differently falls into groups that no table connects, so that each
    can be taken over by itself; so can each table's way to pay. multiplier: by which a table is
    paid where its entry is in neither solution.
    """
    filling = _Filling(problem, start, multiplier)
    for other in reversed(others):
        filling.adopt_changes(other)
    filling.switch_alternatives()
    return filling.solution(start)


def repair_to_limit(
    problem: Problem, start: Solution, others: Sequence[Solution], multiplier: float
) -> Solution | None:
    """A solution within the limit near one that is over it.

    None where changes as in `improve_within_limit` do not suffice.
    """
    filling = _Filling(problem, start, multiplier)
    filling.save(others)
    return filling.solution(start) if filling.left >= 0.0 else None


@dataclass(frozen=True, slots=True)
class _Change:
    """cost, usage: what it adds. states: by variable. ways: by table (variables' first)."""

    cost: float
    usage: float
    states: dict[int, int]
    ways: dict[int, int]


class _Filling:
    """states, ways, paid: of each variable, of each table, and (cost, usage) of each table.

    touched: the tables that changes were applied to. left: of the limit.
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
        """Cost and usage of a table's entry, paid in that way."""
        item = self.items[number]
        if way:
            taken = item.alternatives[way - 1]
            table, usage = taken.cost, taken.usage
        else:
            table, usage = item.unary if isinstance(item, Variable) else item.table, item.usage
        return float(table[entry]), 0.0 if usage is None else float(usage[entry])

    def entry(self, number: int, changed: dict[int, int]) -> tuple[int, ...]:
        return tuple([changed.get(place, self.states[place]) for place in self.scopes[number]])

    def adopt_changes(self, other: Solution) -> None:
        """Take over what is worth it and fits, most cost per usage first."""
        self.touched = {}
        worthwhile = [change for change in self.changes(other) if change.cost < 0.0]
        worthwhile.sort(key=lambda c: c.cost / c.usage if c.usage > 0 else -math.inf)
        self.apply(worthwhile)

    def save(self, others: Sequence[Solution]) -> None:
        """Take over what saves usage until enough is saved, least cost per usage first."""
        changes = [change for other in others for change in self.changes(other)]
        saving = [c for c in [*changes, *self.payments()] if c.usage < 0.0 and c.cost < math.inf]
        saving.sort(key=lambda change: -change.cost / change.usage)
        for change in saving:
            if self.left >= 0.0:
                return
            self.apply([change])

    def changes(self, other: Solution) -> list[_Change]:
        """All that another solution does differently, in groups."""
        wanted = [other.assignment[name] for name in self.problem.names]
        ways = [*other.variable_alternatives, *other.factor_alternatives]
        different = [
            p for p, (own, new) in enumerate(zip(self.states, wanted, strict=True)) if own != new
        ]
        return [self.change(group, wanted, ways) for group in self.groups(different)]

    def groups(self, places: list[int]) -> Iterable[list[int]]:
        """Those of the variables that tables connect with each other."""
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
        """What it means to give the group the wanted states."""
        states = {place: wanted[place] for place in group}
        numbers = dict.fromkeys(n for place in group for n in self.touching[place])
        costs, usages, chosen = [], [], {}
        for number in numbers:
            entry = self.entry(number, states)
            item = self.items[number]
            way = 0
            if item.alternatives:
                taken = all(
                    wanted[place] == s for place, s in zip(self.scopes[number], entry, strict=True)
                )
                way = ways[number] if taken else item.prices.pick(entry, self.multiplier)
            cost, usage = self.price(number, entry, way)
            chosen[number] = way
            costs += [cost, -self.paid[number][0]]
            usages += [usage, -self.paid[number][1]]
        if math.inf in costs:
            return _Change(math.inf, 0.0, {}, {})
        return _Change(math.fsum(costs), math.fsum(usages), states, chosen)

    def switch_alternatives(self) -> None:
        """Give single tables another way to pay, most cost per usage first."""
        worthwhile = [change for change in self.payments() if change.cost < 0.0]
        worthwhile.sort(key=lambda c: c.cost / c.usage if c.usage > 0 else -math.inf)
        self.touched = {}
        self.apply(worthwhile)

    def payments(self) -> list[_Change]:
        """All other ways to pay for what is chosen."""
        changes = []
        for number, item in enumerate(self.items):
            cost, usage = self.paid[number]
            for way in range(1 + len(item.alternatives) if item.alternatives else 0):
                new_cost, new_usage = self.price(number, self.entry(number, {}), way)
                changes.append(_Change(new_cost - cost, new_usage - usage, {}, {number: way}))
        return changes

    def apply(self, changes: list[_Change]) -> None:
        """One after the other, those that fit; at most one for each table."""
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
        count = len(self.states)
        return replace(
            start,
            assignment=dict(zip(self.problem.names, self.states, strict=True)),
            cost=math.fsum(cost for cost, _ in self.paid),
            usage=math.fsum(usage for _, usage in self.paid),
            variable_alternatives=tuple(self.ways[:count]),
            factor_alternatives=tuple(self.ways[count:]),
        )
