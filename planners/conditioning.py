"""Planning of problems too wide to eliminate: a few variables are fixed, the rest is exact.

With the variables of a cutset fixed, the rest of the problem is narrow (cutset conditioning,
Dechter 1990). With each of them split into copies, one per factor, the problem is narrow too, and
no more expensive than the original: a lower bound, which multipliers on the copies' costs tighten
(Lagrangian decomposition, Guignard & Kim 1987). The copies' states suggest the states to fix the
cutset to. Min-marginals, with the rest of the cutset fixed, then improve one variable at a time
until nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planners import exact, ilp
from planners.interaction_graph import components, interaction_graph
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
    fixed_variables: Sequence[str] | None = None,
    max_table_entries: int = MAX_TABLE_ENTRIES,
    memo: Memo | None = None,
) -> Solution:
    """Return the best assignment that was found, whatever it uses, and a proven lower bound.

    fixed_variables: the cutset, if it is known from a problem with the same factors; by default it
    is found by `cutset`. max_table_entries: the largest table to hold, in float64 entries; fewer
    make a larger cutset. memo: shared with other solves, for its tables and orders. Deterministic.
    Raises InfeasibleError if there is no assignment of finite cost.

    >>> table = np.array([[0.0, 2.0], [2.0, 0.0]])
    >>> pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    >>> variables = tuple(Variable(name, np.array([1.0, 0.5])) for name in "abc")
    >>> triangle = Problem(variables, tuple(Factor(pair, table) for pair in pairs))
    >>> solve(triangle, max_table_entries=3).cost
    1.5
    """
    memo = Memo() if memo is None else memo
    names = cutset(problem, max_table_entries) if fixed_variables is None else fixed_variables
    if not names:
        return exact.solve(problem, max_table_entries=max_table_entries, memo=memo)
    limit = _LEEWAY * max_table_entries
    parts = _apart(problem, names)
    if len(parts) == 1:
        # Weighed at 0, every table is the least cost of its entries' alternatives: usage is
        # ignored.
        plain = _Conditioning(problem.weighed(0.0), list(names), limit, memo).run()
        return Solution.of(problem, plain.assignment, plain.method, plain.lower_bound)
    solutions = [
        _Conditioning(part.weighed(0.0), share, limit, memo).run()
        if share
        else exact.solve(part, max_table_entries=limit, memo=memo)
        for part, share in parts
    ]
    assignment = {name: state for each in solutions for name, state in each.assignment.items()}
    bound = math.fsum(each.lower_bound for each in solutions)
    method = f"variable elimination given {len(names)} variables"
    return Solution.of(problem, {name: assignment[name] for name in problem.names}, method, bound)


def cutset(problem: Problem, max_table_entries: int = MAX_TABLE_ENTRIES) -> tuple[str, ...]:
    """Return variables without which the problem is narrow, and few of them.

    Variables with the most neighbours are taken first, twice as many each time; then the number is
    bisected, and those that can be spared are put back. Parts that no factor connects have a cutset
    each: one that is narrow by itself needs none. Returns names; empty if the problem is narrow as
    it is.
    """
    names: list[str] = []
    for part in _components(problem.weighed(0.0)):
        names += _cutset(part, max_table_entries)
    return tuple(names)


def _components(problem: Problem) -> list[Problem]:
    """The parts of the problem that no factor connects.

    Variables that share no factor stay with the first part: they are decided by themselves
    wherever they are.
    """
    parts = components(interaction_graph(problem))
    connected = [part for part in parts if len(part) > 1]
    if len(connected) < 2:
        return [problem]
    connected[0] = sorted([*connected[0], *(part[0] for part in parts if len(part) == 1)])
    home = {variable: index for index, part in enumerate(connected) for variable in part}
    factors: list[list[Factor]] = [[] for _ in connected]
    for factor, scope in zip(problem.factors, problem.scopes(), strict=True):
        factors[home[scope[0]]].append(factor)
    return [
        Problem(tuple(problem.variables[v] for v in part), tuple(own))
        for part, own in zip(connected, factors, strict=True)
    ]


def _apart(problem: Problem, names: Sequence[str]) -> list[tuple[Problem, list[str]]]:
    """The parts that no factor connects, each with its share of the cutset."""
    parts = _components(problem.weighed(0.0))
    shares = [set(part.names) for part in parts]
    return [
        (part, [name for name in names if name in share])
        for part, share in zip(parts, shares, strict=True)
    ]


def _cutset(problem: Problem, max_table_entries: int) -> tuple[str, ...]:
    """The cutset of a problem that is one part."""
    limit = max_table_entries
    names, graph = problem.names, interaction_graph(problem)
    neighbors = {name: [names[other] for other in graph[i]] for i, name in enumerate(names)}
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
    chosen = ranked[:high]
    for name in chosen[:_MOST_SPARED][::-1]:
        fewer = [other for other in chosen if other != name]
        if _is_narrow(_without(problem, fewer), limit):
            chosen = fewer
    return tuple(chosen)


def _without(problem: Problem, names: list[str]) -> Problem:
    """Return the problem of the other variables, with all their states possible."""
    removed = set(names)
    return Problem(
        tuple(variable for variable in problem.variables if variable.name not in removed),
        tuple(f for f in problem.factors if removed.isdisjoint(f.scope)),
    )


def _is_narrow(problem: Problem, limit: int) -> bool:
    """Say whether elimination keeps every table within the limit."""
    try:
        schedule(reduce(problem, Memo()), limit)
    except TooWideError:
        return False
    except ContradictionError:
        return True
    return True


@dataclass
class _Conditioning:
    """The search over one cutset.

    cutset: names of variables. limit: entries of the largest table. best: the cheapest assignment
    so far. bound: no assignment costs less, as far as is proven.
    """

    problem: Problem
    cutset: list[str]
    limit: int
    memo: Memo
    best: Solution | None = None
    bound: float = -np.inf

    def run(self) -> Solution:
        """Return the best assignment after some rounds of relaxation and local improvement."""
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
        """Make the relaxed problem: one copy of each variable of the cutset per factor."""
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
                # The copies' costs add up to the variable's where they agree, whatever the shares.
                share = variable.unary / max(len(copies), 1)
                variables += [Variable(copy, share) for copy in copies]
        self.relaxed = Problem(tuple(variables), tuple(factors))

    def size(self, copy: str) -> int:
        """Return the number of states of a copy's variable."""
        return self.problem.variable(self.copies_of[copy]).size

    def relax(self, multipliers: dict[str, Table]) -> Mapping[str, int]:
        """Solve the relaxed problem with the copies charged by the multipliers; raise the bound."""
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
        """Return the state that most copies of a variable take, the lowest of several."""
        copy_states = [states[copy] for copy in self.copies[name]] or [
            int(np.argmin(self.problem.variable(name).unary))
        ]
        counts = np.bincount(copy_states)
        return int(np.argmax(counts))

    def attempt(self, fixed: dict[str, int]) -> bool:
        """Solve with the cutset fixed and adopt the result if it is the best so far.

        Returns whether it is.
        """
        try:
            solution = exact.solve(
                self.problem.pinned(fixed), max_table_entries=self.limit, memo=self.memo
            )
        except InfeasibleError:
            return False
        if self.best is not None and solution.cost >= self.best.cost:
            return False
        self.best = solution
        return True

    def update(
        self, multipliers: dict[str, Table], states: Mapping[str, int], round_number: int
    ) -> bool:
        """Charge copies that differ from the others for it; say whether any does.

        A step of the subgradient method on the dual, with Polyak's length: the gap over the squared
        norm, shrinking by the round.
        """
        steps: dict[str, Table] = {}
        norm = 0.0
        for copies in self.copies.values():
            if len({states[copy] for copy in copies}) <= 1:
                continue
            indicators = {copy: np.eye(self.size(copy))[states[copy]] for copy in copies}
            # The charges of one variable's copies add up to zero, so that they cancel where the
            # copies agree and the bound stays valid.
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
        """Fix the cutset one by one, to states that the relaxed problem still allows.

        Returns the states; fewer than the cutset has where none of a variable's states is possible.
        """
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
        """Give each variable of the cutset its best state in turn, until nothing changes."""
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
