"""Single changes of an assignment under a limit: to get within it, then to spend what is left.

A change is a group of variables that take another solution's states, or one table that is paid in
another way. Changes are applied greedily, the best ratio of cost to usage first, as for a knapsack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from planners.alike_tables import Numbers, paid
from planners.problem import Problem
from planners.solution import Solution
from planners.tables import Table

__all__ = ["KnownEntries", "improve_within_limit", "repair_to_limit"]


def improve_within_limit(
    problem: Problem,
    start: Solution,
    others: Sequence[Solution],
    known: KnownEntries | None = None,
) -> Solution:
    """Return a solution within the limit that costs no more than `start`, which is within it.

    The differences to another solution fall into groups that no table connects, so that each group
    can be adopted by itself; so can each table's way to pay. others: the solutions to adopt from,
    the best first. known: of the problem, where more solutions of it are changed.
    """
    editor = _Filling(known or KnownEntries(problem), start)
    for other in reversed(others):
        editor.adopt_changes(other)
    editor.switch_alternatives()
    return editor.solution(start)


def repair_to_limit(
    problem: Problem,
    start: Solution,
    others: Sequence[Solution],
    known: KnownEntries | None = None,
) -> Solution | None:
    """Return a solution within the limit near one that is over it.

    others: solutions that use less. known: as of `improve_within_limit`. Returns None where changes
    as there do not suffice.
    """
    editor = _Filling(known or KnownEntries(problem), start)
    editor.save(others)
    return editor.solution(start) if editor.left >= 0.0 else None


@dataclass(slots=True)
class _Entries:
    """The states of all variables, the ways in which all tables are paid, and what these take."""

    states: Numbers
    ways: Numbers
    costs: Table
    usages: Table

    @staticmethod
    def of(problem: Problem, states: Numbers, ways: Numbers) -> _Entries:
        """Return the entries with what they take."""
        return _Entries(states, ways, *paid(problem.alike(), states, ways, len(ways)))

    @staticmethod
    def of_solution(problem: Problem, solution: Solution) -> _Entries:
        """Return the entries of a solution."""
        ways = (*solution.variable_alternatives, *solution.factor_alternatives)
        states = problem.states(solution.assignment)
        return _Entries.of(problem, states, np.array(ways, dtype=np.intp))

    def copied(self) -> _Entries:
        """Return entries of their own that are equal."""
        return _Entries(self.states.copy(), self.ways.copy(), self.costs.copy(), self.usages.copy())

    def adopt(self, after: _Entries, places: Numbers, numbers: Numbers) -> None:
        """Take the states of some variables, and what some tables take, from other entries."""
        self.states[places] = after.states[places]
        self.ways[numbers] = after.ways[numbers]
        self.costs[numbers] = after.costs[numbers]
        self.usages[numbers] = after.usages[numbers]


class KnownEntries:
    """The scopes of a problem's tables, and what its solutions take by table, each found once.

    Example: `improve_within_limit(problem, start, others, KnownEntries(problem))`
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.scopes = problem, _Scopes(problem)
        # The solutions are kept alive, so that no other one gets the id.
        self._of: dict[int, tuple[Solution, _Entries]] = {}

    def of(self, solution: Solution) -> _Entries:
        """Return the entries of a solution, which are not to be changed."""
        if id(solution) not in self._of:
            entries = _Entries.of_solution(self.problem, solution)
            self._of[id(solution)] = solution, entries
        return self._of[id(solution)][1]


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of an assignment: the cost and the usage that it adds, and what becomes as `after`.

    places: of the variables that take other states. numbers: of the tables that are paid otherwise.
    """

    cost: float
    usage: float
    places: Numbers
    numbers: Numbers
    after: _Entries

    @property
    def price(self) -> float:
        """The cost of a unit of usage; what saves both comes before all that must be bought."""
        return self.cost / self.usage if self.usage > 0 else -math.inf


class _Filling:
    """An assignment under change.

    now: what it is. touched: tables that the changes of this round were applied to: what a change
    costs was computed before them. left: the part of the limit that is not used, negative when over
    it.
    """

    def __init__(self, known: KnownEntries, start: Solution) -> None:
        self.known, self.problem, self.scopes = known, known.problem, known.scopes
        self.now = known.of(start).copied()
        self.touched = np.zeros(len(self.now.ways), np.bool_)
        self.left = self.problem.most - math.fsum(self.now.usages.tolist())

    def adopt_changes(self, other: Solution) -> None:
        """Adopt what saves cost and fits, most cost per usage first."""
        self.touched[:] = False
        worthwhile = [change for change in self.changes(other) if change.cost < 0.0]
        self.apply(sorted(worthwhile, key=lambda change: change.price))

    def save(self, others: Sequence[Solution]) -> None:
        """Adopt what saves usage until enough is saved, least cost per usage first."""
        saving = [change for other in others for change in self.changes(other) if change.usage < 0]
        saving += self.payments(lambda costs, usages: (usages < 0.0) & (costs < np.inf))
        saving.sort(key=lambda change: -change.cost / change.usage)
        for change in saving:
            if self.left >= 0.0:
                return
            self.apply([change])

    def changes(self, other: Solution) -> Iterator[_Change]:
        """Yield the possible differences to another solution, in groups that no table connects.

        All that differs in the scope of a table is in one group, so that the table's whole entry
        becomes the other's, and is paid as there.
        """
        after, now = self.known.of(other), self.now
        costs, usages = (
            [before.tolist(), then.tolist()]
            for before, then in ((-now.costs, after.costs), (-now.usages, after.usages))
        )
        for places, numbers in self.scopes.groups(after.states != now.states):
            each = numbers.tolist()
            cost, usage = (
                math.fsum([table[number] for table in tables for number in each])
                for tables in (costs, usages)
            )
            if cost < math.inf:
                yield _Change(cost, usage, places, numbers, after)

    def switch_alternatives(self) -> None:
        """Pay single tables in another way, most cost per usage first."""
        self.touched[:] = False
        worthwhile = self.payments(lambda costs, _: costs < 0.0)
        self.apply(sorted(worthwhile, key=lambda change: change.price))

    def payments(self, chosen: Callable[[Table, Table], NDArray[np.bool_]]) -> list[_Change]:
        """Return changes of one table's way to pay, states as they are, by number of table and way.

        chosen: says by the costs and the usages that tables add which of them are returned.
        """
        now, nowhere = self.now, np.zeros(0, dtype=np.intp)
        counts = np.ones(len(now.ways), dtype=np.intp)
        for group in self.problem.alike():
            counts[group.numbers] = len(group.ways)
        changes: list[tuple[int, int, _Change]] = []
        for way in range(counts.max(initial=1)) if counts.max(initial=1) > 1 else ():
            ways = np.where(counts > way, way, now.ways)
            after = _Entries.of(self.problem, now.states, ways)
            costs, usages = after.costs - now.costs, after.usages - now.usages
            for number in np.flatnonzero(chosen(costs, usages)).tolist():
                numbers = np.array([number], dtype=np.intp)
                change = _Change(
                    float(costs[number]), float(usages[number]), nowhere, numbers, after
                )
                changes.append((number, way, change))
        return [change for _, _, change in sorted(changes, key=lambda each: each[:2])]

    def apply(self, changes: Sequence[_Change]) -> None:
        """Apply, one after the other, the changes that fit; at most one for each table."""
        for change in changes:
            if change.usage > max(self.left, 0.0) or self.touched[change.numbers].any():
                continue
            self.touched[change.numbers] = True
            self.left -= change.usage
            self.now.adopt(change.after, change.places, change.numbers)

    def solution(self, start: Solution) -> Solution:
        """Return the changed assignment; bound, method and multiplier are those of `start`."""
        now, ways = self.now, tuple(self.now.ways.tolist())
        count = len(now.states)
        return replace(
            start,
            assignment=dict(zip(self.problem.names, now.states.tolist(), strict=True)),
            cost=math.fsum(now.costs.tolist()),
            usage=math.fsum(now.usages.tolist()),
            variable_alternatives=ways[:count],
            factor_alternatives=ways[count:],
        )


class _Scopes:
    """The scopes of all tables of a problem.

    tables, places: parallel, a table's number with each of its variables. ends: the variables of
    every pair that some table connects.
    """

    def __init__(self, problem: Problem) -> None:
        groups = problem.alike()
        self.tables = np.concatenate([np.tile(g.numbers, len(g.scopes)) for g in groups])
        self.places = np.concatenate([group.scopes.ravel() for group in groups])
        pairs = [pair for group in groups for pair in combinations(group.scopes, 2)]
        none = np.zeros(0, dtype=np.intp)
        self.ends = tuple(np.concatenate([none, *(pair[end] for pair in pairs)]) for end in (0, 1))

    def groups(self, differs: NDArray[np.bool_]) -> Iterator[tuple[Numbers, Numbers]]:
        """Yield variables that differ, in groups that no table connects, with the tables of each.

        differs: by place of the variable. The group of the first variable comes first.
        """
        labels = np.arange(len(differs))
        inside = differs[self.ends[0]] & differs[self.ends[1]]
        one, two = (end[inside] for end in self.ends)
        # Each takes the least label around it, and then the label of that, until all agree.
        while (labels[one] != labels[two]).any():
            least = np.minimum(labels[one], labels[two])
            for end in (one, two):
                np.minimum.at(labels, labels[end], least)
                np.minimum.at(labels, end, least)
            labels = labels[labels]
        here = differs[self.places]
        of_table = np.full(len(self.tables), -1)
        of_table[self.tables[here]] = labels[self.places[here]]
        return zip(_by_label(np.where(differs, labels, -1)), _by_label(of_table), strict=True)


def _by_label(labels: Numbers) -> list[Numbers]:
    """Return the places of equal labels, by label; those of negative ones are left out.

    >>> [places.tolist() for places in _by_label(np.array([5, -1, 2, 5]))]
    [[2], [0, 3]]
    """
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    ends = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, ends) if len(order) else []
