"""Planning of problems too wide to eliminate: a few variables are given, the rest is exact.

With the variables of a cutset fixed, what is left is narrow. With each of them split into copies,
one per factor, the problem is narrow too, and no more expensive than the original: a lower bound,
which multipliers on the copies' costs tighten (Lagrangian relaxation). The copies' states say what
to fix the variable to; what it really costs in each of its states, all else but the cutset
re-optimized, then improves it until nothing does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planners import exact, ilp
from planners.ordering import TooWideError, schedule
from planners.problem import Problem
from planners.reduction import ContradictionError, reduce
from planners.solution import InfeasibleError, Solution
from planners.table_memo import Memo
from planners.tables import Table
from planners.variables import Factor, Variable

__all__ = ["cutset", "solve"]

MAX_TABLE_ENTRIES = 2**18
_ROUNDS = 12
# Greedy orders differ a little between the problems that are solved; they may need larger tables.
_LEEWAY = 64
_MOST_SPARED = 32


def solve(
    problem: Problem,
    *,
    given: Sequence[str] | None = None,
    max_table_entries: int = MAX_TABLE_ENTRIES,
    memo: Memo | None = None,
) -> Solution:
    """The best assignment found, whatever it uses, and a proven lower bound.

    given: the cutset, if it is known from a problem with the same factors. max_table_entries: the
    largest table to hold, in float64 entries; fewer make a larger cutset. Deterministic.
    Raises InfeasibleError if there is no assignment of finite cost.
    """
    memo = Memo() if memo is None else memo
    names = cutset(problem, max_table_entries) if given is None else given
    if not names:
        return exact.solve(problem, max_table_entries=max_table_entries, memo=memo)
    limit = _LEEWAY * max_table_entries
    found = _Conditioning(problem.weighed(0.0), list(names), limit, memo).run()
    return Solution.of(problem, found.assignment, found.method, found.lower_bound)


def cutset(problem: Problem, max_table_entries: int = MAX_TABLE_ENTRIES) -> tuple[str, ...]:
    """Variables without which the problem is narrow: those with the most neighbours, and few."""
    limit = max_table_entries
    problem = problem.weighed(0.0)
    neighbors: dict[str, dict[str, None]] = {name: {} for name in problem.names}
    for factor in problem.factors:
        for name in factor.scope:
            neighbors[name].update(dict.fromkeys(o for o in factor.scope if o != name))
    sizes = {variable.name: variable.size for variable in problem.variables}
    ranked: list[str] = []
    while not _is_narrow(_without(problem, ranked), limit):
        degrees = {
            name: sum(sizes[other] > 1 for other in around if other not in ranked)
            for name, around in neighbors.items()
            if name not in ranked and sizes[name] > 1
        }
        if not degrees:
            break
        order = sorted(degrees, key=lambda name: (-degrees[name], -sizes[name]))
        ranked += order[: max(1, len(ranked))]
    low, high = len(ranked) // 2, len(ranked)
    while low + 1 < high:
        middle = (low + high) // 2
        if _is_narrow(_without(problem, ranked[:middle]), limit):
            high = middle
        else:
            low = middle
    kept = ranked[:high]
    for name in kept[:_MOST_SPARED][::-1]:
        fewer = [other for other in kept if other != name]
        if _is_narrow(_without(problem, fewer), limit):
            kept = fewer
    return tuple(kept)


def _without(problem: Problem, names: list[str]) -> Problem:
    """The problem of the other variables, with all states possible."""
    removed = set(names)
    return Problem(
        tuple(variable for variable in problem.variables if variable.name not in removed),
        tuple(f for f in problem.factors if removed.isdisjoint(f.scope)),
    )


def _is_narrow(problem: Problem, limit: int) -> bool:
    try:
        schedule(reduce(problem, Memo()), limit)
    except TooWideError:
        return False
    except ContradictionError:
        return True
    return True


@dataclass
class _Conditioning:
    """The search over one cutset. best: the cheapest assignment so far; bound: what is proven."""

    problem: Problem
    cutset: list[str]
    limit: int
    memo: Memo
    best: Solution | None = None
    bound: float = -np.inf

    def run(self) -> Solution:
        self.split()
        multipliers = {copy: np.zeros(self.size(copy)) for copy in self.copies_of}
        for round_number in range(_ROUNDS):
            states = self.relax(multipliers)
            votes = {name: self.vote(name, states) for name in self.cutset}
            self.attempt(votes)
            if not self.update(multipliers, states, round_number):
                break
        if self.best is None:
            self.attempt(self.dive(multipliers))
        if self.best is None:
            return ilp.solve(self.problem)
        self.improve()
        best = self.best
        method = f"variable elimination given {len(self.cutset)} variables"
        return Solution(best.assignment, best.cost, min(self.bound, best.cost), method)

    def split(self) -> None:
        """The relaxed problem: a copy of each variable of the cutset for each of its factors."""
        self.copies: dict[str, list[str]] = {name: [] for name in self.cutset}
        self.copies_of: dict[str, str] = {}
        factors = []
        for factor in self.problem.factors:
            ends = []
            for name in factor.scope:
                if name in self.copies:
                    copy = f"{name} ({len(self.copies[name])})"
                    self.copies[name].append(copy)
                    self.copies_of[copy] = name
                    name = copy
                ends.append(name)
            factors.append(Factor(tuple(ends), factor.table))
        variables = []
        for variable in self.problem.variables:
            copies = self.copies.get(variable.name)
            if copies is None:
                variables.append(variable)
            else:
                share = variable.unary / max(len(copies), 1)
                variables += [Variable(copy, share) for copy in copies]
        self.relaxed = Problem(tuple(variables), tuple(factors))

    def size(self, copy: str) -> int:
        return self.problem.variable(self.copies_of[copy]).size

    def relax(self, multipliers: dict[str, Table]) -> Mapping[str, int]:
        """Solve the relaxed problem with what the copies are charged. Raises the bound."""
        charged = {
            copy: self.relaxed.variable(copy).unary + multipliers[copy] for copy in multipliers
        }
        solution = exact.solve(
            self.relaxed.with_unary(charged), max_table_entries=self.limit, memo=self.memo
        )
        self.relaxed_cost = solution.cost
        self.bound = max(self.bound, solution.cost)
        return solution.assignment

    def vote(self, name: str, states: Mapping[str, int]) -> int:
        """The state that most copies of a variable take, the lowest of several."""
        taken = [states[copy] for copy in self.copies[name]] or [
            int(np.argmin(self.problem.variable(name).unary))
        ]
        counts = np.bincount(taken)
        return int(np.argmax(counts))

    def attempt(self, fixed: dict[str, int]) -> bool:
        """Solve with the cutset fixed; whether that is the best so far."""
        try:
            found = exact.solve(
                self.problem.pinned(fixed), max_table_entries=self.limit, memo=self.memo
            )
        except InfeasibleError:
            return False
        if self.best is not None and found.cost >= self.best.cost:
            return False
        self.best = found
        return True

    def update(
        self, multipliers: dict[str, Table], states: Mapping[str, int], round_number: int
    ) -> bool:
        """Charge copies that differ from the others for it; whether any does (subgradient)."""
        steps: dict[str, Table] = {}
        norm = 0.0
        for copies in self.copies.values():
            if len({states[copy] for copy in copies}) <= 1:
                continue
            indicators = {copy: np.eye(self.size(copy))[states[copy]] for copy in copies}
            mean = sum(indicators.values()) / len(copies)
            for copy, indicator in indicators.items():
                steps[copy] = indicator - mean
                norm += float((steps[copy] ** 2).sum())
        if not steps:
            return False
        known = self.best.cost if self.best is not None else abs(self.relaxed_cost) * 1.1
        gap = max(known - self.relaxed_cost, 1e-6 * abs(known))
        length = gap / norm / (1 + round_number / 4)
        for copy, step in steps.items():
            multipliers[copy] = multipliers[copy] + length * step
        return True

    def dive(self, multipliers: dict[str, Table]) -> dict[str, int]:
        """Fix the cutset one by one, to states that the relaxed problem still allows."""
        fixed: dict[str, int] = {}
        charges = {copy: self.relaxed.variable(copy).unary for copy in multipliers}
        relaxed = self.relaxed.with_unary(charges)
        for name in self.cutset:
            marginals = exact.min_marginals(
                relaxed, self.copies[name], max_table_entries=self.limit, memo=self.memo
            )
            total = sum(marginals.values(), np.zeros(self.problem.variable(name).size))
            for state in np.argsort(total, kind="stable"):
                pinned = relaxed.pinned(dict.fromkeys(self.copies[name], int(state)))
                try:
                    exact.solve(pinned, max_table_entries=self.limit, memo=self.memo)
                except InfeasibleError:
                    continue
                relaxed, fixed[name] = pinned, int(state)
                break
            else:
                break
        return fixed

    def improve(self) -> None:
        """Each variable of the cutset, given the others, its best state, until nothing changes."""
        changed = True
        while changed:
            changed = False
            for name in self.cutset:
                assert self.best is not None
                others = {other: self.best.assignment[other] for other in self.cutset}
                del others[name]
                try:
                    marginals = exact.min_marginals(
                        self.problem.pinned(others),
                        [name],
                        max_table_entries=self.limit,
                        memo=self.memo,
                    )[name]
                except TooWideError:
                    continue
                state = int(np.argmin(marginals))
                if marginals[state] < self.best.cost - 1e-12 * abs(self.best.cost):
                    changed = self.attempt({**others, name: state}) or changed
