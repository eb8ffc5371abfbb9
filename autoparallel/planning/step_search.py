"""The search for the plan of the shortest step, beside the one whose seconds add up to least.

Sums are what a solver can prove; a step overlaps, and only a simulated timeline tells how long it
is. So plans are proposed by sums of several kinds, and compared by their timelines:

1. the optimum of the plain sum;
2. the optima of the sums that bound every step from below (`strategy/step_parts.py`), at the
   weights that bound it best;
3. the optima of sums in which what is sent counts as far as the best plan so far waits for it;
4. the best plans of the families that practitioners use (`strategy/layout_families.py`), but for
   families of which a bound of that kind says that none of their plans is shorter.

The shortest is taken. The bound says by how much another plan could be shorter at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.timeline import MOVED, PIECES, REDUCED, step_and_waits
from autoparallel.graph.captured import Captured
from autoparallel.plan import Plan
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.layout_families import Family, families, states_of_family
from autoparallel.strategy.step_parts import Kind, Means, StepParts, least_step
from planners import InfeasibleError, Problem, Solution, TooWideError, exact

__all__ = ["StepSearch", "Timed"]

# So many weights are tried for the bound, and so many sums after the waits of the best plan.
_MOST_BOUNDS, _MOST_REPLIES = 3, 2
# A bound that rises by less than this share is left.
_RISES = 1e-3
# Steps that differ by less than this share are equal: the first one found is taken.
_EQUAL = 1e-9
_GRID = tuple(
    Means(computing / 4, hidden / 8, exposed / 8)
    for computing in range(5)
    for hidden in range(9)
    for exposed in range(9 - hidden)
)
_GRID_WEIGHTS = np.array([means.weights for means in _GRID])


@dataclass(frozen=True, slots=True)
class Timed:
    """A plan that was compared. name: where it comes from. step: its seconds. waits: see
    `step_and_waits`.
    """

    name: str
    plan: Plan
    solution: Solution
    step: float
    waits: Mapping[str, float]


class StepSearch:
    """The search on one network, whose plain sum is solved.

    captured, model: as of `search`. problem, solution: the sum and its optimum. accepts: whether an
    assignment may be returned. best: the shortest step so far. bound: no plan has a shorter one.
    looked_at: how many plans were compared. too_wide: families that could not be solved.
    """

    def __init__(
        self,
        captured: Captured,
        model: str,
        network: CostNetwork,
        solve: NetworkSolver,
        problem: Problem,
        solution: Solution,
        accepts: Callable[[Solution], bool] = lambda solution: True,
    ) -> None:
        self.captured, self.model, self.network = captured, model, network
        self.solve, self.problem, self.sum = solve, problem, solution
        self.accepts = accepts
        self.looked_at = 0
        self.too_wide: list[Family] = []
        self.seen: list[Mapping[str, int]] = [solution.assignment]
        self.best = self.timed("", solution)
        self.bound = 0.0

    def run(self) -> tuple[Plan, Solution]:
        """Return the plan of the shortest step that was found, with the bound on all steps, and its
        solution.
        """
        if self.network.options.overlap and self.network.world_size > 1:
            self.parts = StepParts(self.network)
            self.prove()
            if not self.is_proven:
                self.reply_to_waits()
                self.try_families()
        else:
            # Nothing overlaps: the sum is the step.
            self.bound = self.sum.lower_bound
        best = self.best
        compared = f"; the shortest step of {self.looked_at} plans" if self.looked_at > 1 else ""
        compared += f": {best.name}" if best.name else ""
        if self.too_wide:
            compared += f"; too wide to be tried: {'; '.join(map(str, self.too_wide))}"
        plan = replace(
            best.plan,
            method=best.plan.method + compared,
            step_seconds=best.step,
            step_bound=min(self.bound, best.step),
        )
        return plan, best.solution

    @property
    def is_proven(self) -> bool:
        """Whether no plan can have a shorter step than the best one."""
        return self.bound >= self.best.step * (1 - _EQUAL)

    def timed(self, name: str, solution: Solution) -> Timed:
        """Return a solution as a plan with its step."""
        self.looked_at += 1
        network = self.network
        plan = plan_of_solution(self.captured, self.model, network.mesh, network, solution, 1.0)
        step, waits = step_and_waits(plan, network.hardware)
        return Timed(name, plan, solution, step, waits)

    def consider(self, name: str, assignment: Mapping[str, int]) -> None:
        """Compare the plan of an assignment with the best one, unless it cannot be shorter."""
        if any(assignment == seen for seen in self.seen):
            return
        self.seen.append(assignment)
        if least_step(self.parts.seconds(assignment)) >= self.best.step:
            return
        solution = Solution.of(
            self.problem, assignment, self.sum.method, self.sum.lower_bound
        )
        if not self.accepts(solution):
            return
        timed = self.timed(name, solution)
        if timed.step < self.best.step * (1 - _EQUAL):
            self.best = timed

    def prove(self) -> None:
        """Look for the weights of the best bound on all steps, and consider their optima."""
        # A plan's seconds by kind are a line over the weights; no bound is above any plan's line.
        lines = [self.parts.seconds(self.sum.assignment)]
        for _ in range(1 if self.solve.is_wide else _MOST_BOUNDS):
            above = np.min([_GRID_WEIGHTS @ line for line in lines], axis=0)
            place = int(np.argmax(above))
            if above[place] <= self.bound * (1 + _RISES):
                break
            problem = self.parts.problem(self.problem, _GRID[place].weights)
            solution = self.solve(problem)
            if solution.lower_bound > self.bound:
                self.bound, self.relaxed = solution.lower_bound, problem
            lines.append(self.parts.seconds(solution.assignment))
            self.consider("", solution.assignment)
            if self.is_proven:
                break

    def reply_to_waits(self) -> None:
        """Plan again with what is sent counted as far as the best plan waits for it."""
        for _ in range(0 if self.solve.is_wide else _MOST_REPLIES):
            best = self.best
            seconds = self.parts.seconds(best.solution.assignment)
            weights = np.ones(len(Kind))
            for kind, what in ((Kind.PIECES, PIECES), (Kind.MOVED, MOVED), (Kind.REDUCED, REDUCED)):
                if seconds[kind]:
                    weights[kind] = min(best.waits.get(what, 0.0) / seconds[kind], 1.0)
            problem = self.parts.problem(self.problem, weights)
            self.consider("", self.solve(problem).assignment)
            if self.best is best:
                break

    def try_families(self) -> None:
        """Consider the plans of the families, if their own bounds say that they may be shorter."""
        every = families(self.network)
        for outline in dict.fromkeys(family.outline for family in every):
            # However the parameters are stored.
            if self.bound_of(outline) >= self.best.step:
                continue
            for family in every:
                if family.outline == outline:
                    self.try_family(family)

    def try_family(self, family: Family) -> None:
        """Consider the plans of one family."""
        if self.bound_of(family) >= self.best.step:
            return
        assignment = self.within(self.problem, family)
        if assignment is not None:
            self.consider(str(family), assignment)

    def bound_of(self, family: Family) -> float:
        """Return a bound on the steps of a family's plans, and consider the plan that has it."""
        assignment = self.within(self.relaxed, family)
        if assignment is None:
            return np.inf
        self.consider(str(family), assignment)
        return self.relaxed.cost(assignment)

    def within(self, problem: Problem, family: Family) -> dict[str, int] | None:
        """Return the optimum of a problem within a family; None where there is none."""
        states: Mapping[str, NDArray[np.intp]] = states_of_family(self.network, family)
        try:
            solution = exact.solve(problem.restricted(states), memo=self.solve.memo)
        except TooWideError:
            self.too_wide.append(family)
            return None
        except InfeasibleError:
            return None
        return {
            name: int(states[name][state]) if name in states else state
            for name, state in solution.assignment.items()
        }
