"""The search for the plan of the shortest step, beside the one whose seconds add up to least.

Sums are what a solver can prove; a step overlaps, and only a simulated timeline tells how long it
is. So plans are proposed by sums of several kinds, and compared by their timelines:

1. the optimum of the plain sum;
2. the optima of the sums that bound every step from below (`strategy/step_parts.py`), at the
   weights that bound it best;
3. the optima of sums in which what is sent counts as far as the best plan so far waits for it,
   which is an *estimate* of the step;
4. the best plans of the families that practitioners use (`strategy/layout_families.py`), by the sum
   and by the estimate; but for families of which a bound says that no plan of theirs is shorter;
5. those that differ from the best one so far in a single choice (`step_exchanges.py`).

The shortest is taken. The bound says by how much another plan could be shorter at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.streams import GATHERED, MOVED, PIECES, REDUCED
from autoparallel.analysis.timeline import step_and_waits
from autoparallel.graph.captured import Captured
from autoparallel.plan import Plan
from autoparallel.planning.least_bytes import LeastBytes
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.planning.step_exchanges import answered, exchanged
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.layout_families import Family, LayoutFamilies
from autoparallel.strategy.step_parts import Kind, Means, StepParts, least_step
from planners import InfeasibleError, Problem, Solution, TooWideError, exact
from planners.effort import current

__all__ = ["StepSearch", "Timed", "step_weights"]

# So many weights are tried for the bound, and so many sums after the waits of the best plan: where
# a solution takes long, on more than two axes or of a wide network, only one weight, and no reply.
_MOST_BOUNDS, _MOST_REPLIES = 3, 2
# So many single choices are exchanged, as long as the best plan is so near to what it must beat.
# For each, so many are tried, the most promising ones; in small graphs more: they are soon timed.
_MOST_EXCHANGES, _NEAR = 4, 1.15
_MOST_TRIED, _MOST_NODES = 6, 4000
# What it takes to make a plan and simulate its step, by the nodes of the graph.
_SECONDS_PER_NODE = 3e-5
# What is waited for, by the kind of seconds that it is a part of.
_WAITS = {
    Kind.PIECES: PIECES,
    Kind.MOVED: MOVED,
    Kind.REDUCED: REDUCED,
    Kind.GATHERED: GATHERED,
}
# A bound that rises by less than this share is left.
_RISES = 1e-3
# Steps that differ by less than this share are equal: the first one found is taken.
_EQUAL = 1e-9
_GRID = tuple(
    Means(computing / 4, hidden / 8, exposed / 8, gathering / 2)
    for gathering in range(3)
    for computing in range(5)
    for hidden in range(9)
    for exposed in range(9 - hidden)
)
_GRID_WEIGHTS = np.array([means.weights for means in _GRID])


def _highest(lines: Sequence[NDArray[np.float64]]) -> tuple[int, float]:
    """Return the weights in the grid at which the least of these lines is highest, and how high.

    lines: the seconds by kind of plans.
    """
    least = np.min([_GRID_WEIGHTS @ line for line in lines], axis=0)
    place = int(np.argmax(least))
    return place, float(least[place])


def step_weights() -> NDArray[np.float64]:
    """Return the weights that bounds on steps are looked for with, one row each."""
    return _GRID_WEIGHTS


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

    captured, model, beat: as of `search`. problem, solution: the sum and its optimum. accepts:
    whether a plan may be returned. least_bytes, most_bytes: the least that plans take on a rank,
    and the most that they may, by which plans are ruled out before they are timed. best: the
    shortest step so far. bound: no plan has a shorter one.
    looked_at: how many plans were compared. bounds: on the steps of families.
    too_wide: families that could not be solved. is_slow: whether a solution takes long. first: the
    number of the weights that bound all steps best.
    """

    def __init__(
        self,
        captured: Captured,
        model: str,
        network: CostNetwork,
        solve: NetworkSolver,
        problem: Problem,
        solution: Solution,
        accepts: Callable[[Timed], bool] = lambda timed: True,
        beat: float = np.inf,
        least_bytes: LeastBytes | None = None,
        most_bytes: float = np.inf,
    ) -> None:
        self.captured, self.model, self.network = captured, model, network
        self.solve, self.problem, self.sum = solve, problem, solution
        self.accepts, self.beat = accepts, beat
        self.looked_at = 0
        self.too_wide: list[Family] = []
        self.bounds: dict[Family, float] = {}
        self._relaxed: dict[int, Problem] = {}
        self._estimate: tuple[Timed, Problem] | None = None
        self.is_slow = solve.is_wide or solve.many
        self.seen: list[Mapping[str, int]] = [solution.assignment]
        self.least_bytes, self.most_bytes = least_bytes, most_bytes
        self.best = self.timed("", solution)
        self.bound = 0.0
        # Where nothing does, the sum is the step.
        self.overlaps = network.options.overlap and network.world_size > 1

    def begin_with(self, timed: Timed) -> None:
        """Take a plan for the best if its step is shorter, before more are looked for."""
        if timed.step < self.best.step:
            self.best = timed

    def run(self) -> tuple[Plan, Solution]:
        """Return the plan of the shortest step that was found, with the bound on all steps, and its
        solution.
        """
        effort = current()
        try:
            self.look()
        except KeyboardInterrupt:
            # The best so far, with what is proven of it, is worth more than nothing.
            effort.stop()
        best = self.best
        compared = f"; the shortest step of {self.looked_at} plans" if self.looked_at > 1 else ""
        compared += f": {best.name}" if best.name else ""
        if self.too_wide:
            compared += f"; too wide to be tried: {'; '.join(map(str, self.too_wide))}"
        compared += f"; {effort.end}" if effort.is_over else ""
        plan = replace(
            best.plan,
            method=best.plan.method + compared,
            step_seconds=best.step,
            step_bound=min(self.bound, best.step),
        )
        return plan, best.solution

    def look(self) -> None:
        """Look for the shortest step."""
        if not self.overlaps:
            # Where activations count as whole, the sum is none of seconds, and bounds no step.
            options = self.network.options
            if options.sequence_parallel or options.data_parallel:
                self.bound = self.sum.lower_bound
            return
        self.prove()
        if not self.is_done:
            self.reply_to_waits()
            self.try_families()
            self.exchange()

    @property
    def is_done(self) -> bool:
        """Whether the search ends, because no plan is of use or there is no time for more."""
        return self.is_proven or current().is_over

    @property
    def is_proven(self) -> bool:
        """Whether no plan can have a shorter step that is of use."""
        return self.bound >= self.enough * (1 - _EQUAL)

    @property
    def enough(self) -> float:
        """The seconds of a step below which another one is of use."""
        return min(self.best.step, self.beat)

    def timed(self, name: str, solution: Solution) -> Timed:
        """Return a solution as a plan with its step."""
        self.looked_at += 1
        current().spend(len(self.captured.graph.nodes) * _SECONDS_PER_NODE)
        network = self.network
        plan = plan_of_solution(self.captured, self.model, network.mesh, network, solution, 1.0)
        step, waits = step_and_waits(plan, network.hardware, network.shares.once)
        return Timed(name, plan, solution, step, waits)

    def consider(self, name: str, assignment: Mapping[str, int]) -> None:
        """Compare the plan of an assignment with the best one, unless it cannot be shorter."""
        if any(assignment == seen for seen in self.seen):
            return
        self.seen.append(assignment)
        if least_step(self.parts.seconds(assignment)) >= self.enough:
            return
        if not self.may_fit(assignment):
            return
        solution = Solution.of(self.problem, assignment, self.sum.method, self.sum.lower_bound)
        self.replace_best(self.timed(name, solution))

    def replace_best(self, timed: Timed) -> None:
        """Take a plan for the best, if its step is shorter and it may be returned."""
        if timed.step < self.best.step * (1 - _EQUAL) and self.accepts(timed):
            self.best = timed

    def may_fit(self, assignment: Mapping[str, int]) -> bool:
        """Return whether the least that an assignment takes is within the limit."""
        return self.least_bytes is None or self.least_bytes.of(assignment) <= self.most_bytes

    def prove(self) -> None:
        """Look for the best bound on all steps, and consider the plans that it comes from, once."""
        if self.bound or not self.overlaps:
            return
        self.parts = StepParts(self.network)
        self.families = LayoutFamilies(self.network)
        # A plan's seconds by kind are a line over the weights; no bound is above any plan's line.
        lines = [self.parts.seconds(self.sum.assignment)]
        for _ in range(1 if self.is_slow else _MOST_BOUNDS):
            place, above = _highest(lines)
            if above <= self.bound * (1 + _RISES):
                break
            solution = self.solve(self.relaxed(place))
            self.bound = max(self.bound, solution.lower_bound)
            lines.append(self.parts.seconds(solution.assignment))
            self.consider("", solution.assignment)
            if self.is_done:
                break
        self.first, _ = _highest(lines)

    def relaxed(self, place: int) -> Problem:
        """Return the sum that bounds steps, by the number of its weights in the grid."""
        if place not in self._relaxed:
            self._relaxed[place] = self.parts.problem(self.problem, _GRID_WEIGHTS[place])
        return self._relaxed[place]

    def reply_to_waits(self) -> None:
        """Plan again with what is sent counted as far as the best plan waits for it."""
        for _ in range(0 if self.is_slow else _MOST_REPLIES):
            best = self.best
            self.consider("", self.solve(self.estimate).assignment)
            if self.best is best or current().is_over:
                break

    @property
    def estimate(self) -> Problem:
        """The sum in which what is sent counts as far as the best plan waits for it."""
        best = self.best
        if self._estimate is None or self._estimate[0] is not best:
            # A plan of another network has other states.
            own = best.solution.assignment.keys() == self.sum.assignment.keys()
            assignment = best.solution.assignment if own else self.sum.assignment
            seconds = self.parts.seconds(assignment)
            weights = np.ones(len(Kind))
            for kind, what in _WAITS.items():
                if seconds[kind]:
                    weights[kind] = min(best.waits.get(what, 0.0) / seconds[kind], 1.0)
            self._estimate = best, self.parts.problem(self.problem, weights)
        return self._estimate[1]

    def try_families(self, members: Sequence[Family] | None = None, level: int = 0) -> None:
        """Consider the plans of the families, if they may be shorter.

        members: of one outline, all families by default. level: of the outlines to look at.
        """
        members = self.families.families() if members is None else members
        groups: dict[Family, list[Family]] = {}
        for family in members:
            groups.setdefault(family.outlines[level], []).append(family)
        # The most promising come first: what they give rules out others.
        for number, outline in enumerate(sorted(groups, key=self.bound_of)):
            if not level:
                share = (1 + number) / (1 + len(groups))
                current().tell(share, f"{self.network.mesh}, {outline}: {self.best.step:.4g} s")
            if self.bound_of(outline) >= self.enough or current().is_over:
                continue
            if outline == groups[outline][0] or (self.is_slow and level):
                for problem in (self.problem, *[self.estimate] * (not self.is_slow)):
                    found = self.within(problem, outline)
                    if found is not None:
                        self.consider(str(outline), found[0])
            # Where a solution takes long, the narrowest families are left to the wider ones.
            if level + 1 < len(outline.outlines) - self.is_slow:
                self.try_families(groups[outline], level + 1)

    def exchange(self) -> None:
        """Consider the plans that differ from the best one in a single choice, and in what answers
        it, as long as one of them is shorter.

        With stages, what is timed here is a micro-batch on all of them: a plan that is shorter by a
        little of this may be cut into stages that are longer.
        """
        if self.network.shares.ranks > 1:
            return
        for _ in range(_MOST_EXCHANGES):
            best = self.best
            assignment = best.solution.assignment
            # A plan of another network has other states. One that is far from what it must beat is
            # not brought there by a single choice.
            if assignment.keys() != self.sum.assignment.keys() or best.step > _NEAR * self.enough:
                return
            most = max(_MOST_TRIED, _MOST_NODES // len(self.captured.graph.nodes))
            for other in chain(
                exchanged(self.problem, assignment, self.estimate, most),
                answered(assignment, self.estimate, most),
            ):
                self.consider(best.name, other)
                if self.best is not best or self.is_done:
                    break
            if self.best is best or self.is_done:
                return

    def bound_of(self, family: Family) -> float:
        """Return a bound on the steps of a family's plans, and consider the plans that it comes
        from.
        """
        if family in self.bounds:
            return self.bounds[family]
        if current().is_over:
            return 0.0
        bound, place = 0.0, self.first
        lines: list[NDArray[np.float64]] = []
        for _ in range(1 if self.is_slow else _MOST_BOUNDS):
            found = self.within(self.relaxed(place), family)
            if found is None:
                bound = np.inf
                break
            assignment, least = found
            bound = max(bound, least)
            self.consider(str(family), assignment)
            lines.append(self.parts.seconds(assignment))
            place, above = _highest(lines)
            # Other weights help only where they may rule the family out.
            if bound >= self.enough or above < self.enough:
                break
        self.bounds[family] = bound
        return bound

    def within(self, problem: Problem, family: Family) -> tuple[Mapping[str, int], float] | None:
        """Return the optimum of a problem within a family, and its cost; None where there is
        none.
        """
        states = self.families.states(family)
        if self.least_bytes is not None and self.least_bytes.among(states) > self.most_bytes:
            return None
        try:
            solution = exact.solve(problem.among(states), memo=self.solve.memo)
        except TooWideError:
            self.too_wide.append(family)
            return None
        except InfeasibleError:
            return None
        return solution.assignment, solution.cost
