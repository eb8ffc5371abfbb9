"""Planning with very many states per variable: groups of states first, then their members.

A grouping merges states of each variable into groups, such as all that differ on one mesh axis
alone. With the least of all merged entries in every table, the problem of the groups is small, and
its optimum is no more expensive than the original's: a lower bound. Its solution says in which
groups to look: there the problem is solved with the members of these groups alone. The assignment
is then improved by letting all variables move at once to any state that shares a group with their
own, until none does. Where the groups are too wide themselves, some of their variables are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from planners import conditioning, cutsets, exact
from planners.effort import current
from planners.greedy_orders import TooWideError
from planners.problem import Problem
from planners.solution import InfeasibleError, Solution
from planners.table_memo import Memo
from planners.tables import Table
from planners.variables import Factor, Variable

__all__ = ["Grouping", "solve"]

# The group (a number from 0 on) of every state, by variable; those left out are not grouped.
Grouping = Mapping[str, NDArray[np.intp]]

MAX_TABLE_ENTRIES = 2**22
_MOST_ROUNDS = 10
# An improvement must exceed rounding, or two equal assignments would follow each other forever.
_LESS = 1e-12


def solve(
    problem: Problem,
    groupings: Sequence[Grouping],
    *,
    start: Mapping[str, int] | None = None,
    max_table_entries: int = MAX_TABLE_ENTRIES,
) -> Solution:
    """Return the best assignment that was found, whatever it uses, and a proven lower bound.

    groupings: each is tried by itself. start: an assignment to improve, beside those that the
    groupings lead to. max_table_entries: the largest table to hold, in float64 entries; groupings
    that need larger ones are passed over. Deterministic.
    Raises InfeasibleError if there is no assignment of finite cost, ValueError for a grouping that
    does not fit the problem.

    >>> a = Variable("a", np.array([3.0, 1.0, 2.0, 4.0]))
    >>> solve(Problem((a,)), [{"a": np.array([0, 0, 1, 1])}]).text()
    'cost 1, bound 1, gap 0 (1 groupings of states, 1 variables)'
    """
    plain = problem.weighed(0.0)
    for grouping in groupings:
        _check(plain, grouping)
    search = _Search(plain, groupings, max_table_entries)
    if start is not None:
        search.consider(dict(start))
    bound = search.coarse()
    search.improve()
    if search.best is None:
        # Every grouping was too wide, or led to no finite assignment.
        bound = max(bound, search.conditioned())
    if search.best is None:
        fallback = conditioning.solve(plain, max_table_entries=max_table_entries)
        return Solution.of(problem, fallback.assignment, fallback.method, fallback.lower_bound)
    method = f"{len(groupings)} groupings of states"
    return Solution.of(problem, search.best, method, bound)


def _check(problem: Problem, grouping: Grouping) -> None:
    """Raise ValueError unless groups are numbered 0, 1, ... for every state of a variable."""
    for name, groups in grouping.items():
        size = problem.variable(name).size
        if groups.shape != (size,):
            raise ValueError(f"groups of {name!r} have shape {groups.shape}, not {(size,)}")
        if not np.array_equal(np.unique(groups), np.arange(groups.max() + 1)):
            raise ValueError(f"groups of {name!r} must be numbered from 0 on, without gaps")


class _Search:
    """The search by groups. best, cost: the cheapest assignment so far, or None and +inf."""

    def __init__(
        self, problem: Problem, groupings: Sequence[Grouping], max_table_entries: int
    ) -> None:
        self.problem = problem
        self.groupings = groupings
        self.max_table_entries = max_table_entries
        self.memo = Memo()
        self.best: dict[str, int] | None = None
        self.cost = np.inf

    def consider(self, assignment: dict[str, int]) -> bool:
        """Adopt the assignment if it is cheaper than the best so far; say whether it was."""
        cost = self.problem.cost(assignment)
        if cost >= self.cost - _LESS * abs(cost):
            return False
        self.best, self.cost = assignment, cost
        return True

    def coarse(self) -> float:
        """Solve the problem of each grouping, then that of the members of the groups chosen.

        Returns the largest of the lower bounds.
        """
        # The sum of all least entries is a bound too, if every grouping is too wide.
        tables = [v.unary for v in self.problem.variables] + [f.table for f in self.problem.factors]
        bound = float(sum(table.min() for table in tables))
        for grouping in self.groupings:
            try:
                group_solution = exact.solve(
                    merged(self.problem, grouping),
                    max_table_entries=self.max_table_entries,
                    memo=self.memo,
                )
            except TooWideError:
                continue
            bound = max(bound, group_solution.cost)
            self.within(_members(grouping, group_solution))
        return bound

    def conditioned(self) -> float:
        """Solve as `coarse` does, where that is too wide, by fixing some variables.

        Groups and their members are far fewer than the states, so that this takes a small part of
        what the problem itself takes.
        """
        bound = -np.inf
        entries = min(self.max_table_entries, cutsets.MAX_TABLE_ENTRIES)
        solve = partial(conditioning.solve, max_table_entries=entries)
        for grouping in self.groupings:
            if self.best is not None and current().is_over:
                break
            try:
                group_solution = solve(merged(self.problem, grouping))
                bound = max(bound, group_solution.lower_bound)
                self.within(_members(grouping, group_solution), solve)
            except TooWideError:
                continue
        return bound

    def improve(self) -> None:
        """Let variables move to states that share a group with their own, until none does."""
        for _ in range(_MOST_ROUNDS):
            if self.best is None or current().is_over:
                return
            near = [self.near([grouping]) for grouping in self.groupings]
            moved = self.within(self.near(self.groupings))
            if moved is None:
                # All groupings at once are too wide: each by itself.
                moved = True in [self.within(states) for states in near]
            if not moved:
                return

    def near(self, groupings: Sequence[Grouping]) -> dict[str, NDArray[np.intp]]:
        """Return, per variable, the states that share a group with its present one.

        Sharing one group, in any of the groupings, is enough. Variables that no grouping names are
        left out, and so keep all states.
        """
        assert self.best is not None
        states = {}
        for variable in self.problem.variables:
            present = self.best[variable.name]
            group_numbers = [g[variable.name] for g in groupings if variable.name in g]
            if group_numbers:
                shared = np.logical_or.reduce(
                    [groups == groups[present] for groups in group_numbers]
                )
                states[variable.name] = np.flatnonzero(shared)
        return states

    def within(
        self,
        states: Mapping[str, NDArray[np.intp]],
        solve: Callable[[Problem], Solution] | None = None,
    ) -> bool | None:
        """Solve with these states alone and adopt the result if it is cheaper.

        states: per variable the states to keep; others keep all. solve: exactly by default. Returns
        whether it was cheaper, None where the problem is too wide even so.
        """
        solve = solve or partial(
            exact.solve, max_table_entries=self.max_table_entries, memo=self.memo
        )
        try:
            solution = solve(self.problem.restricted(states))
        except TooWideError:
            return None
        except InfeasibleError:
            return False
        return self.consider(
            {
                name: int(states[name][state]) if name in states else state
                for name, state in solution.assignment.items()
            }
        )


def _members(grouping: Grouping, chosen: Solution) -> dict[str, NDArray[np.intp]]:
    """Return, per variable, the states in the group that is chosen for it.

    chosen: a solution of the problem of the groups.
    """
    return {
        name: np.flatnonzero(groups == chosen.assignment[name]) for name, groups in grouping.items()
    }


def merged(problem: Problem, grouping: Grouping) -> Problem:
    """Return the plain problem of the groups: every entry is the least of those merged into it.

    No assignment of the original costs less than that of its groups, so the optimum of the result
    is a lower bound. grouping: variables that it leaves out keep their states.
    """
    parts = {name: (np.argsort(groups, kind="stable"), groups) for name, groups in grouping.items()}
    merged_tables: dict[tuple[int, tuple[bytes, ...]], Table] = {}

    def least(table: Table, scope: tuple[str, ...]) -> Table:
        key = (id(table), tuple(grouping[n].tobytes() if n in grouping else b"" for n in scope))
        if key not in merged_tables:
            part = table
            for axis, name in enumerate(scope):
                if name in parts:
                    order, groups = parts[name]
                    # With the states sorted by group, each group is one run, which reduceat
                    # reduces.
                    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
                    part = np.minimum.reduceat(part.take(order, axis), starts, axis)
            merged_tables[key] = part
        return merged_tables[key]

    return Problem(
        tuple(Variable(v.name, least(v.unary, (v.name,))) for v in problem.variables),
        tuple(Factor(f.scope, least(f.table, f.scope)) for f in problem.factors),
    )
