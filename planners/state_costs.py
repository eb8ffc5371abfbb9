"""The cost of each state of a variable, with all other variables chosen anew: at least, at most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planners import conditioning, exact
from planners.cutsets import MAX_TABLE_ENTRIES, apart, cutset
from planners.greedy_orders import TooWideError
from planners.problem import Problem
from planners.solution import InfeasibleError
from planners.table_memo import Memo
from planners.tables import Table

__all__ = ["Range", "StateCosts"]


@dataclass(frozen=True, slots=True)
class Range:
    """A Range holds, per state of a variable, between what the best assignment with it costs.

    least: no assignment with the state costs less. most: there is one that costs no more; +inf
    where none is known.
    """

    least: Table
    most: Table


class StateCosts:
    """The costs of states around an assignment, told for many variables by few eliminations.

    A narrow problem is eliminated once, upwards and downwards, and both ends of each range are the
    cost itself. Of a wide one, some variables are held as they are assigned, which gives an
    assignment for each state; and with each of them split into copies, the problem is narrow and no
    dearer, which gives the bound (see `conditioning`).

    problem: a limit is ignored; usage is charged before, by `weighed`. assignment: a good one.
    memo: shared with other solves. max_table_entries: the largest table to hold; a problem that
    takes more is wide, as is one of more than most_work table entries read. Raises TooWideError
    where no few variables make it narrow.

    >>> from planners import Factor, Variable
    >>> cheap_apart = Variable("a", np.array([0.0, 0.5])), Variable("b", np.array([1.0, 0.0]))
    >>> moving = Factor(("a", "b"), np.array([[0.0, 9.0], [9.0, 0.0]]))
    >>> StateCosts(Problem(cheap_apart, (moving,)), {"a": 1, "b": 1}).of(["a"])["a"].most
    array([1. , 0.5])
    """

    def __init__(
        self,
        problem: Problem,
        assignment: Mapping[str, int],
        *,
        memo: Memo | None = None,
        max_table_entries: int = exact.MAX_TABLE_ENTRIES,
        most_work: float = math.inf,
    ) -> None:
        self.problem, self.assignment = problem.weighed(0.0), assignment
        self.memo = Memo() if memo is None else memo
        self.entries, self.most_work = max_table_entries, most_work
        # What is left of a wide problem is to be quick, as it is eliminated for many variables.
        self.fewer = min(max_table_entries, MAX_TABLE_ENTRIES)
        self.is_wide = False
        self.held: tuple[str, ...] = ()
        self.bounds: dict[str, Table] = {}

    def of(self, names: Iterable[str]) -> dict[str, Range]:
        """Return the range of each state of the named variables."""
        wanted = list(dict.fromkeys(names))
        if not self.is_wide:
            try:
                marginals = exact.min_marginals(
                    self.problem,
                    wanted,
                    max_table_entries=self.entries,
                    memo=self.memo,
                    most_work=self.most_work,
                )
                return {name: Range(table, table) for name, table in marginals.items()}
            except TooWideError:
                self.hold()
        most = self.attained(wanted)
        return {name: Range(np.minimum(self.bounds[name], most[name]), most[name])
                for name in wanted}  # fmt: skip

    def hold(self) -> None:
        """Choose the variables to hold, and bound the costs of all states by their copies."""
        held = cutset(self.problem, self.fewer)
        parts = apart(self.problem, held)
        relaxed = [self.relaxed(part, share) for part, share in parts]
        # What one part costs at least is added to the states of all others.
        total = math.fsum(bound for bound, _ in relaxed)
        for bound, tables in relaxed:
            self.bounds |= {name: table + (total - bound) for name, table in tables.items()}
        self.is_wide, self.held = True, held

    def relaxed(self, part: Problem, share: Sequence[str]) -> tuple[float, dict[str, Table]]:
        """Return what a part costs at least, in all and with each state of each of its variables.

        share: its variables that are held.
        """
        if not share:
            marginals = exact.min_marginals(part, part.names, memo=self.memo)
            return min(float(table.min()) for table in marginals.values()), marginals
        return conditioning.state_bounds(
            part, share, self.assignment, max_table_entries=self.fewer, memo=self.memo
        )

    def attained(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the costs of the best assignments with the held variables as they are assigned.

        Of a held variable itself, the others are held.
        """
        states = {name: self.assignment[name] for name in self.held}
        free = [name for name in names if name not in states]
        tables = self.beside(states, free)
        for name in names:
            if name in states:
                others = {other: state for other, state in states.items() if other != name}
                tables |= self.beside(others, [name])
        return tables

    def beside(self, held: Mapping[str, int], names: Sequence[str]) -> dict[str, Table]:
        """Return the least costs of the states of some variables, with others held."""
        if not names:
            return {}
        try:
            return exact.min_marginals(
                self.problem.pinned(held),
                names,
                max_table_entries=conditioning.LEEWAY * self.fewer,
                memo=self.memo,
            )
        except (TooWideError, InfeasibleError):
            # Nothing is known but the assignment itself.
            cost = self.problem.cost(self.assignment)
            return {name: self.only(name, cost) for name in names}

    def only(self, name: str, cost: float) -> Table:
        """Return the costs of a variable of which only the assigned state is known."""
        table = np.full(self.problem.variable(name).size, np.inf)
        table[self.assignment[name]] = cost
        return table
