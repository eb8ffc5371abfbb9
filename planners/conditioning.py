"""Planning of problems too wide to eliminate: a few variables are fixed, the rest is exact.

With the variables of a cutset fixed, the rest of the problem is narrow (cutset conditioning,
Dechter 1990). With each of them split into copies, one per factor, the problem is narrow too, and
no more expensive than the original: a lower bound, which multipliers on the copies' costs tighten
(Lagrangian decomposition, Guignard & Kim 1987). The copies' states suggest the states to fix the
cutset to. Min-marginals of the relaxed problem rule out what no better assignment can have
(reduced-cost fixing). Mostly what is left is narrow, and its optimum is that of the whole; where it
is not, min-marginals with the rest of the cutset fixed improve one variable at a time, and the rest
is relaxed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from planners import exact, ilp
from planners.cutsets import MAX_TABLE_ENTRIES, apart, cutset
from planners.effort import current
from planners.greedy_orders import TooWideError
from planners.problem import Problem
from planners.solution import InfeasibleError, Solution
from planners.table_memo import Memo
from planners.tables import Table
from planners.variables import Factor, Variable

__all__ = ["LEEWAY", "cutset", "solve", "state_bounds"]

# Rounds of relaxation before states are ruled out, and how often that is done.
_ROUNDS = 6
_ATTEMPTS = 4
# A bound so near to the cost, as a share of it, is the cost but for rounding.
_ROUNDING = 1e-9
# How far copies of a variable are brought to each other in a round.
_SHARE = 0.6
# Greedy orders differ a little between the problems that are solved; they may need larger tables.
LEEWAY = 64
_LESS = 4


def solve(
    problem: Problem,
    *,
    fixed_variables: Sequence[str] | None = None,
    start: Mapping[str, int] | None = None,
    max_table_entries: int = MAX_TABLE_ENTRIES,
    memo: Memo | None = None,
) -> Solution:
    """Return the best assignment that was found, whatever it uses, and a proven lower bound.

    fixed_variables: the cutset, if it is known from a problem with the same factors; by default it
    is found by `cutset`. start: a good assignment, if one is known: states that none better can
    have are ruled out the sooner. max_table_entries: the largest table to hold, in float64 entries;
    fewer make a larger cutset. memo: shared with other solves, for its tables and orders.
    Deterministic.
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
    parts = apart(problem, names)
    if len(parts) == 1:
        # Weighed at 0, every table is the least cost of its entries' alternatives: usage is
        # ignored.
        plain = _searched(problem.weighed(0.0), names, max_table_entries, memo, start)
        return Solution.of(problem, plain.assignment, plain.method, plain.lower_bound)
    solutions = [
        _searched(part.weighed(0.0), share, max_table_entries, memo, start)
        if share
        else exact.solve(part, max_table_entries=LEEWAY * max_table_entries, memo=memo)
        for part, share in parts
    ]
    assignment = {name: state for each in solutions for name, state in each.assignment.items()}
    bound = math.fsum(each.lower_bound for each in solutions)
    method = f"variable elimination given {len(names)} variables"
    return Solution.of(problem, {name: assignment[name] for name in problem.names}, method, bound)


def _searched(
    problem: Problem,
    names: Sequence[str],
    max_table_entries: int,
    memo: Memo,
    start: Mapping[str, int] | None,
) -> Solution:
    """Return the solution of a plain problem that is one part.

    names: the cutset to begin with. start: an assignment of these and other variables. States that
    no better assignment can have are ruled out until what is left is narrow, or that was tried
    often enough.
    """
    method = f"variable elimination given {len(names)} variables"
    limit = LEEWAY * max_table_entries
    best = None if start is None else _restricted(problem, start, method)
    # Beside a good assignment even a rough bound rules out most states, and what is left is small.
    rounds = _ROUNDS if best is None else 1
    bound = -math.inf
    multipliers: Mapping[str, Table] = {}
    for left in reversed(range(_ATTEMPTS)):
        search = _Conditioning(problem, list(names), limit, memo, multipliers, best, bound)
        search.run(rounds)
        rounds = _ROUNDS
        best, multipliers = search.best, search.multipliers
        if best is None:
            return ilp.solve(problem)
        # What was ruled out before costs more than the best.
        bound = max(bound, min(search.bound, best.cost))
        if best.cost - bound <= _ROUNDING * abs(best.cost) or current().is_over:
            break
        # Large tables are worth their time only where nothing else is left to try.
        narrow = search.finished(limit // _LESS if left else limit)
        if narrow is None and not left:
            search.improve()
            narrow = search.finished(limit)
        best = search.best
        if narrow is not None:
            bound = narrow.cost
            break
        problem = search.left()
        names = cutset(problem, max_table_entries) or names
    assert best is not None
    return Solution(best.assignment, best.cost, min(bound, best.cost), method)


def state_bounds(
    problem: Problem,
    fixed_variables: Sequence[str],
    start: Mapping[str, int],
    *,
    max_table_entries: int = MAX_TABLE_ENTRIES,
    memo: Memo | None = None,
) -> tuple[float, dict[str, Table]]:
    """Return a bound on the cost of all assignments, and on that with each state of each variable.

    fixed_variables: the cutset, which is split into copies. start: a good assignment. Other options
    as in `solve`.

    >>> table = np.array([[0.0, 2.0], [2.0, 0.0]])
    >>> pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    >>> variables = tuple(Variable(name, np.array([1.0, 0.5])) for name in "abc")
    >>> triangle = Problem(variables, tuple(Factor(pair, table) for pair in pairs))
    >>> bound, states = state_bounds(triangle, ["a"], {"a": 1, "b": 1, "c": 1})
    >>> bound, states["b"]
    (1.5, array([3. , 1.5]))
    """
    memo = Memo() if memo is None else memo
    best = _restricted(problem, start, "as given")
    search = _Conditioning(
        problem, list(fixed_variables), LEEWAY * max_table_entries, memo, {}, best
    )
    search.run(_ROUNDS)
    if not search.least:
        search.bound_states()
    return search.bound, search.least


def _restricted(problem: Problem, assignment: Mapping[str, int], method: str) -> Solution | None:
    """Return a problem's part of an assignment; None where it has no finite cost."""
    states = {name: assignment[name] for name in problem.names}
    solution = Solution.of(problem, states, method, -math.inf)
    return solution if solution.cost < math.inf else None


@dataclass
class _Conditioning:
    """The search over one cutset.

    cutset: names of variables. limit: entries of the largest table. multipliers: of an earlier
    search, to begin with; afterwards those of the best bound. known: the bound of that search.
    best: the cheapest assignment so far. bound: no assignment costs less, as far as is proven.
    least: bounds on the cost with each state of each variable, once they are known. marginals: of
    the copies, at the multipliers. tried: the states that the cutset was fixed to.
    """

    problem: Problem
    cutset: list[str]
    limit: int
    memo: Memo
    multipliers: Mapping[str, Table]
    best: Solution | None = None
    known: float = -np.inf
    bound: float = -np.inf
    least: dict[str, Table] = field(default_factory=dict)
    marginals: dict[str, Table] = field(default_factory=dict)
    tried: dict[tuple[tuple[str, int], ...], None] = field(default_factory=dict)

    def run(self, rounds: int) -> None:
        """Relax and fix in so many rounds; then find the marginals that rule out states."""
        self.split()
        multipliers: dict[str, Table] = {}
        for copies in self.copies.values():
            # A variable's copies have multipliers that add up to zero: all of them, or none.
            known = all(copy in self.multipliers for copy in copies)
            for copy in copies:
                zeros = np.zeros(self.size(copy))
                multipliers[copy] = self.multipliers[copy] if known else zeros
        gap = np.inf if self.best is None or not self.multipliers else self.best.cost - self.known
        self.multipliers = multipliers
        share = _SHARE
        for _ in range(rounds):
            before = self.bound
            marginals = self.relax(multipliers)
            if self.bound > before:
                self.multipliers, self.marginals = multipliers, marginals
            else:
                share /= 2  # too far: from the best multipliers, a shorter way
            for vote in (self.cheapest, self.most_frequent):
                self.attempt({name: vote(name, marginals) for name in self.cutset})
            multipliers = self.averaged(share)
            if self.is_proven or not multipliers:
                break
            if current().is_over and self.best is not None:
                return
            if gap < np.inf and self.best is not None and self.best.cost - self.bound <= gap / 2:
                break  # enough to rule out more than the last time
        if self.best is None:
            self.attempt(self.dive(self.multipliers))
        if self.best is not None and not self.is_proven:
            self.bound_states()

    @property
    def is_proven(self) -> bool:
        """True if no assignment costs less than the best, but for rounding."""
        best = self.best
        return best is not None and best.cost - self.bound <= _ROUNDING * abs(best.cost)

    def bound_states(self) -> None:
        """Bound the cost with each state of each variable, at the multipliers of the best bound."""
        marginals = exact.min_marginals(
            self.charged(self.multipliers),
            self.relaxed.names,
            max_table_entries=self.limit,
            memo=self.memo,
        )
        for name in self.problem.names:
            # Each copy by itself bounds the cost of its variable's states.
            copies = self.copies.get(name, [name]) or []
            bounds = [marginals[copy] for copy in copies]
            self.least[name] = np.max(bounds, axis=0) if bounds else np.array(-np.inf)

    def left(self) -> Problem:
        """Return the problem without the states that no better assignment can have."""
        assert self.best is not None
        most = self.best.cost + _ROUNDING * abs(self.best.cost)
        return self.problem.with_unary(
            {
                variable.name: np.where(self.least[variable.name] > most, np.inf, variable.unary)
                for variable in self.problem.variables
                if (self.least[variable.name] > most).any()
            }
        )

    def finished(self, limit: int) -> Solution | None:
        """Return the optimum, which becomes the best; None where what is left is too wide.

        limit: entries of the largest table.
        """
        assert self.best is not None
        try:
            solution = exact.solve(self.left(), max_table_entries=limit, memo=self.memo)
        except InfeasibleError:  # but for rounding, the best is possible itself
            return self.best
        except TooWideError:
            return None
        if solution.cost < self.best.cost:
            self.best = solution
        return self.best

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

    def relax(self, multipliers: Mapping[str, Table]) -> dict[str, Table]:
        """Return the least cost of the relaxed problem with each state of each copy, charged by the
        multipliers; raise the bound.
        """
        copies = [copy for copies in self.copies.values() for copy in copies]
        marginals = exact.min_marginals(
            self.charged(multipliers), copies, max_table_entries=self.limit, memo=self.memo
        )
        self.bound = max(self.bound, float(next(iter(marginals.values())).min()))
        return marginals

    def charged(self, multipliers: Mapping[str, Table]) -> Problem:
        """Return the relaxed problem with the copies charged by the multipliers."""
        return self.relaxed.with_unary(
            {copy: self.relaxed.variable(copy).unary + multipliers[copy] for copy in multipliers}
        )

    def cheapest(self, name: str, marginals: Mapping[str, Table]) -> int:
        """Return the state of a variable that its copies take at the least cost together."""
        tables = [marginals[copy] for copy in self.copies[name]]
        return int(np.argmin(sum(tables) if tables else self.problem.variable(name).unary))

    def most_frequent(self, name: str, marginals: Mapping[str, Table]) -> int:
        """Return the state that is the best one for most copies, the lowest of several."""
        best = [int(np.argmin(marginals[copy])) for copy in self.copies[name]]
        return int(np.argmax(np.bincount(best))) if best else self.cheapest(name, marginals)

    def attempt(self, fixed: dict[str, int]) -> bool:
        """Solve with the cutset fixed, once, and adopt the result if it is the best so far.

        Returns whether it is.
        """
        states = tuple(fixed.items())
        if states in self.tried:
            return False
        self.tried[states] = None
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

    def averaged(self, share: float) -> dict[str, Table]:
        """Return multipliers that bring the copies of each variable nearer to each other; none
        where all copies are alike.

        Each state of a copy is charged by what it costs less than on average over the copies, times
        the share. The charges of one variable's copies add up to zero, so that they cancel where
        the copies agree and the bound stays valid. Done for one variable at a time and in full,
        this never lowers the bound (Globerson & Jaakkola 2007); a share of it mostly raises it far
        sooner than steps along a subgradient.
        """
        multipliers = dict(self.multipliers)
        apart = False
        for copies in self.copies.values():
            tables = np.array([self.marginals[copy] for copy in copies])
            # What one copy cannot be, none can.
            possible = np.isfinite(tables).all(axis=0)
            charges = np.zeros(tables.shape)
            left = tables[:, possible]
            charges[:, possible] = left.mean(axis=0) - left
            apart = apart or bool((np.abs(charges) > _ROUNDING * abs(self.bound)).any())
            for copy, charge in zip(copies, charges, strict=True):
                multipliers[copy] = multipliers[copy] + share * charge
        return multipliers if apart else {}

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
