"""Planning within a limit: a price on usage, chosen so that the cheapest assignment just fits.

With usage charged at some multiplier the problem is a plain one, and its optimum less multiplier *
limit is a lower bound on every assignment within the limit; the best multiplier gives the best
bound (Lagrangian relaxation; Everett 1963, Fisher 1981). Layers repeat, so at that multiplier all
of them change their mind at once, and the optimum is either far over the limit or far below it. So
usage is charged a little more up to some place in the order of the variables, and a little less
behind it: the place is moved until the limit is just kept. The rest of the limit then buys single
changes. Where one variable decides for all layers together, there is a search for each of its
states (branch and bound).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from planners.branch import Branch
from planners.charged_solutions import (
    Charge,
    ChargedSolutions,
    Told,
    charged_solution,
    last_places,
)
from planners.dual_function import RELATIVE_ROUNDING, charged_cost, highest_meeting
from planners.effort import current
from planners.exact_or_conditioned import ExactOrConditioned
from planners.fixing import forbid, is_allowed, possible_states
from planners.greedy_orders import TooWideError
from planners.integer_refinement import refine_by_integer_program
from planners.local_improvement import KnownEntries, improve_within_limit, repair_to_limit
from planners.problem import Problem
from planners.solution import InfeasibleError, OverLimitError, Solution

__all__ = ["solve"]

Solver = Callable[[Problem], Solution]

MOST_SOLVES = 40
# A gap of a tenth of a percent is far below the error of any cost model.
ENOUGH = 1e-3
# Solves by conditioning, which take many eliminations, and solves of much work: fewer of them.
_MOST_WIDE_SOLVES = 15
_MOST_PLACES = 8
# How far both charges are below and above the best multiplier, as shares of it. What lies between
# them is decided a little wrong; but where the change from one to the other costs something by
# itself, they must be far enough apart to pay for it.
_SPREADS = ((0.01, 0.01), (0.1, 0.1), (0.5, 0.5), (0.5, 4.0), (1.0, 1.0))
# After so many places without a new usage, the change from one charge to the other is one jump.
_MOST_JUMPS = 3
_MOST_BRANCHES = 8
# The numbers of solutions near the bound that are brought within the limit, and that others may
# adopt changes from.
_MOST_REPAIRED = 3
_MOST_OTHERS = 8


def solve(
    problem: Problem,
    *,
    solver: Solver | None = None,
    prover: Solver | None = None,
    most_solves: int = MOST_SOLVES,
    enough: float = ENOUGH,
    known: list[Solution] | None = None,
    charged: ChargedSolutions | None = None,
    charge_alone: bool = False,
) -> Solution:
    """Return the best assignment that was found within the limit, and a proven lower bound.

    Variables should come in the order of the computation, so that what is near in the model is near
    in the order.
    solver: of plain problems; by default the exact one, or conditioning where that is too wide.
    prover: where the solver's bounds are rough, a slower one that proves better ones; asked once
    for a multiplier. most_solves: of plain problems, about; a fifth of them to find a multiplier.
    enough: the search ends at this gap, as a share of the cost. known: solutions of the same
    problem within other limits, or with other states forbidden, to begin with; those that are found
    are added. charged: what the same solver has found with usage charged, of any problems.
    charge_alone: the search ends at the multiplier whose bound is best, whatever the gap.
    Deterministic, but for an interrupt (Ctrl-C): that returns the best so far, if there
    is one with a bound. So does the end of the effort that is allowed.
    Raises InfeasibleError if no assignment has a finite cost, OverLimitError if none was found
    within the limit.

    >>> import numpy as np
    >>> from planners.variables import Variable
    >>> save_or_recompute = [
    ...     Variable(f"layer {i}", np.array([1.0, 1.3]), np.array([8.0, 0.0])) for i in range(4)
    ... ]
    >>> solution = solve(Problem(tuple(save_or_recompute), limit=20.0))
    >>> round(solution.cost, 6), solution.usage
    (4.6, 16.0)
    """
    search = _Search(problem, solver or ExactOrConditioned(), prover, enough, most_solves)
    if charged is not None:
        search.charged = charged.of(problem)
    for solution in known or ():
        # Bounds are of the limit that they were found within, and of the states allowed then.
        if is_allowed(problem, solution.assignment):
            search.consider(replace(solution, lower_bound=-math.inf))
    try:
        return search.run(charge_alone)
    finally:
        if known is not None:
            known[:] = search.solutions


class _Search:
    """The search within a limit.

    best: the cheapest solution within the limit so far. solutions: all distinct ones, whatever they
    use; seen: their keys. solves: how many plain problems were solved. effort: see `effort`.
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        prover: Solver | None,
        enough: float,
        most_solves: int,
    ) -> None:
        self.problem = problem
        self.solver = solver
        self.prover = prover
        self.enough = enough
        self.most_solves = most_solves
        self.effort = current()
        self.best: Solution | None = None
        self.method = ""
        self.solves = 0
        self.limit = math.inf if problem.limit is None else problem.limit
        self.solutions: list[Solution] = []
        self.seen: dict[tuple[tuple[int, ...], ...], None] = {}
        self.charged: dict[Told, Solution] = {}
        self.entries = KnownEntries(problem)
        # What there was when changes were last adopted.
        self.filled: tuple[int, Solution | None, float] = (0, None, 0.0)

    def run(self, charge_alone: bool) -> Solution:
        """Explore branches, the one of the lowest bound first; return the best with the bound.

        charge_alone: look for the best multiplier of all, and no further.
        """
        root = Branch(self.problem, {}, -math.inf, charged=self.charged)
        nodes, leaves = [root], list[Branch]()
        for _ in range(_MOST_BRANCHES):
            node = min(nodes, key=lambda node: node.bound)
            nodes.remove(node)
            leaves.append(node)
            try:
                self.explore(node, charge_alone)
            except KeyboardInterrupt:
                # The best so far, with what is proven of it, is worth more than nothing.
                if self.best is None or node.bound == -math.inf:
                    raise
                self.effort.stop()
                break
            if charge_alone:
                break
            if not self.is_done(node):
                children = node.children(self.problem)
                if children:
                    leaves.pop()
                    nodes += children
            leaves += [child for child in nodes if self.is_done(child)]
            nodes = [child for child in nodes if not self.is_done(child)]
            if not nodes or self.solves >= self.most_solves:
                break
        best = self.best
        assert best is not None
        # The branches partition the assignments, so that the least of their bounds bounds all.
        bound = min(best.cost, *(node.bound for node in leaves + nodes))
        method = f"{self.method}, usage charged" if root.multiplier else self.method
        method += f", {self.effort.end}" if self.effort.is_over else ""
        solution = Solution(
            best.assignment,
            best.cost,
            bound,
            method,
            best.usage,
            best.variable_alternatives,
            best.factor_alternatives,
            root.multiplier,
        )
        if (
            solution.gap > self.enough * abs(solution.cost)
            and isinstance(self.solver, ExactOrConditioned)
            and not self.effort.is_over
            and not charge_alone
        ):
            return refine_by_integer_program(self.problem, solution, self.enough)
        return solution

    def explore(self, node: Branch, charge_alone: bool) -> None:
        """Raise the bound of a branch at its best multiplier; collect good assignments there.

        charge_alone: as of `run`.
        """
        try:
            self.search(node)
        except InfeasibleError:
            if not node.pins:
                raise
            # No assignment of the branch is within the limit; at the root that is the answer.
            node.raise_bound(math.inf)
            return
        if charge_alone:
            self.fill(node)
            return
        if self.prover is not None and self.is_rough and not self.is_done(node):
            self.at(node, node.multiplier, self.prover)
        self.fill(node)
        if not self.is_done(node):
            try:
                self.narrow(node)
                self.split(node)
            except InfeasibleError:
                node.raise_bound(math.inf)

    def narrow(self, node: Branch) -> None:
        """Forbid what no solution has that is better by half the gap; the rest is solved sooner."""
        if node.possible is not None or self.best is None:
            return
        if not isinstance(self.solver, ExactOrConditioned) or self.solver.cutset is not None:
            return
        most = self.best.cost - self.enough / 2 * abs(self.best.cost)
        try:
            node.possible = possible_states(node.problem, most, node.multiplier)
        except TooWideError:
            return
        node.most = min(node.most, most)
        node.problem, node.charged = forbid(node.problem, node.possible), {}
        # Fewer states take another multiplier, and prove more at it.
        self.search(node)
        self.fill(node)

    @property
    def is_rough(self) -> bool:
        """True if the solver's bounds are, so that a prover may have better ones."""
        return not isinstance(self.solver, ExactOrConditioned) or self.solver.is_rough

    def is_enough(self, node: Branch) -> bool:
        """Say whether a branch cannot hold an assignment that is better by more than the gap."""
        best = self.best
        return best is not None and best.cost - node.bound <= self.enough * abs(best.cost)

    def is_done(self, node: Branch) -> bool:
        """Say whether a branch is left as it is: near enough, or there is no time for more."""
        over = self.effort.is_over and self.best is not None and node.bound > -math.inf
        return over or self.is_enough(node)

    def solved(
        self,
        node: Branch,
        charge: Charge,
        solver: Solver | None = None,
    ) -> Solution:
        """Return the solution with usage charged; lower_bound is of cost and charge together.

        solver: another than the search's own.
        """
        self.solves += 1
        # Where two lines meet may be told with another rounding, and is the same multiplier.
        told = charge if isinstance(charge, tuple) else float(f"{charge:.12e}")
        key = told, solver is not None
        if key not in node.charged:
            node.charged[key] = charged_solution(node.problem, charge, solver or self.solver)
        solution = node.charged[key]
        if isinstance(self.solver, ExactOrConditioned) and not self.solver.is_quick:
            self.most_solves = min(self.most_solves, _MOST_WIDE_SOLVES)
        self.method = solution.method
        return self.consider(solution)

    def consider(self, solution: Solution) -> Solution:
        """Remember the solution, and adopt it as the best if it is; return it."""
        fits = self.problem.fits(solution.usage)
        if fits and (self.best is None or solution.cost < self.best.cost):
            self.best = solution
        key = (
            tuple(solution.assignment.values()),
            solution.variable_alternatives,
            solution.factor_alternatives,
        )
        if key not in self.seen:
            self.seen[key] = None
            self.solutions.append(solution)
        return solution

    def at(self, node: Branch, multiplier: float, solver: Solver | None = None) -> Solution:
        """Return the solution at one multiplier, and raise the bound of the branch by it."""
        if isinstance(self.solver, ExactOrConditioned):
            self.solver.forget()
        solution = self.solved(node, multiplier, solver)
        charge = multiplier * self.limit if multiplier else 0.0
        node.raise_bound(solution.lower_bound - charge)
        return solution

    def least(self, node: Branch) -> Solution:
        """Return the solution of least usage. Raises OverLimitError if that is over the limit."""
        plain = self.solver(node.problem.usage_alone())
        if self.prover is not None and self.is_rough and not self.problem.fits(plain.cost):
            plain = self.prover(node.problem.usage_alone())
        # As if usage were so dear that nothing else counts.
        # At an infinite multiplier every table is paid in its way of least usage.
        solution = Solution.of(node.problem, plain.assignment, plain.method, None, math.inf)
        if not self.problem.fits(solution.usage):
            raise OverLimitError(plain.cost, plain.lower_bound, self.limit)
        return self.consider(solution)

    def search(self, node: Branch) -> None:
        """Find the multiplier at which the branch's bound is best.

        Every assignment is a line over the multiplier (`dual_function`): where the least rising and
        the least falling line meet, a solve either shows that there are no lower ones, or gives
        one.
        """
        members = [solution for solution in self.solutions if node.holds(solution)]
        over = [s for s in members if not self.problem.fits(s.usage)]
        within = [s for s in members if self.problem.fits(s.usage)]
        if not within:
            # First, as it is quick, and all that is needed where nothing fits.
            least = self.least(node)
            within.append(least)
        if not over:
            solution = self.at(node, 0.0)
            if self.problem.fits(solution.usage):
                return
            over.append(solution)
        low, high, run_length = 0.0, math.inf, 0
        for _ in range(max(4, self.most_solves // 5)):
            meet, promised, node.ends = highest_meeting(self.problem, over, within, self.limit)
            node.multiplier = meet
            if promised - node.bound <= RELATIVE_ROUNDING * abs(promised) or self.is_done(node):
                break
            multiplier = meet
            # Lines from one side only: the meeting creeps towards the maximum. The geometric mean
            # of the multipliers that are known to be too low and too high halves their ratio
            # instead.
            if abs(run_length) >= 2 and low and math.isfinite(high):
                multiplier = math.sqrt(low * high)
            solution = self.at(node, multiplier)
            height = charged_cost(solution, multiplier, self.limit)
            if multiplier == meet and promised - height <= RELATIVE_ROUNDING * abs(promised):
                break
            if self.problem.fits(solution.usage):
                within.append(solution)
                high, run_length = min(high, multiplier), max(run_length, 0) + 1
            else:
                over.append(solution)
                low, run_length = max(low, multiplier), min(run_length, 0) - 1

    def split(self, node: Branch) -> None:
        """Charge more up to some place and less behind it, and the other way round.

        At the best multiplier many layers are indifferent between two states. Two charges around it
        make the layers before the place take one state and those behind it the other.
        """
        for below, above in _SPREADS:
            if self.solves >= self.most_solves or self.is_done(node):
                return
            less, more = node.multiplier * (1 - below), node.multiplier * (1 + above)
            if isinstance(self.solver, ExactOrConditioned):
                self.solver.forget()
            before = self.best
            for first, second in ((less, more), (more, less)):
                moved = self.move(node, first, second)
                if self.best is not before:
                    self.fill(node)
                if self.is_done(node):
                    return
                if not moved:
                    break
            else:
                if self.best is before:
                    # The place is known, and charges further apart would find no better one.
                    return

    def move(self, node: Branch, first: float, second: float) -> bool:
        """Charge `first` up to a place and `second` behind it; find the place that just fits.

        Gives up, and returns False, where one end's solution just takes the place of the other's.
        """
        end = int(last_places(self.problem).max(initial=0)) + 1

        def usage_at(place: int) -> float:
            ends = {0: second, end: first}
            return self.solved(node, ends.get(place, (first, second, place))).usage

        usages = {0: usage_at(0), end: usage_at(end)}
        over = 0 if first > second else end
        within = end - over
        if self.problem.fits(usages[over]) or not self.problem.fits(usages[within]):
            return False
        nothing_new = 0
        for _ in range(_MOST_PLACES):
            if abs(over - within) <= 1 or nothing_new >= _MOST_JUMPS or self.is_done(node):
                break
            # Interpolation in the usages (regula falsi), bounded away from the ends; bisection once
            # that gave nothing new.
            share = (usages[over] - self.limit) / (usages[over] - usages[within])
            share = 0.5 if nothing_new else min(max(share, 0.1), 0.9)
            place = over + round(share * (within - over))
            place = min(max(place, min(over, within) + 1), max(over, within) - 1)
            usage = usage_at(place)
            nothing_new = nothing_new + 1 if usage in usages.values() else 0
            usages[place] = usage
            if self.problem.fits(usage):
                within = place
            else:
                over = place
        return len(dict.fromkeys(usages.values())) > 2

    def fill(self, node: Branch) -> None:
        """Adopt changes from other solutions: first to keep the limit, then to use it up."""
        # Of the same solutions come the same ones.
        before = len(self.solutions), self.best, node.multiplier
        if before[1] is self.filled[1] and before == self.filled:
            return
        self.filled = before
        near = sorted(
            self.solutions, key=lambda s: (charged_cost(s, node.multiplier, self.limit), s.usage)
        )
        within = [s for s in near if self.problem.fits(s.usage)][:_MOST_OTHERS]
        over = [s for s in near if not self.problem.fits(s.usage)][:_MOST_OTHERS]
        for solution in over[:_MOST_REPAIRED]:
            if self.best is not None and solution.cost >= self.best.cost:
                continue
            repaired = repair_to_limit(self.problem, solution, within, self.entries)
            if repaired is not None:
                self.consider(repaired)
        if self.best is not None:
            others = within + over
            improved = improve_within_limit(self.problem, self.best, others, self.entries)
            self.consider(improved)
