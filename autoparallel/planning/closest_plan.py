"""The plan that fits into a limit on memory, or the one that needs least, of one network.

The tables count bytes at one moment. Where a plan takes more at another, the limit on what is
counted is lowered by the difference, and it is planned again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoparallel.analysis.memory_account import Account
from autoparallel.errors import MemoryLimitError
from autoparallel.graph.captured import Captured
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.planning.counted_bytes import Moments
from autoparallel.planning.eased_plans import solved_or_refused
from autoparallel.planning.gathers_ahead import without_gathers_ahead
from autoparallel.planning.memory_advice import does_not_fit
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.strategy.cost_network import CostNetwork
from planners import OverLimitError, Problem, Solution
from planners.effort import current

__all__ = ["MOST_ATTEMPTS", "Candidate", "allowed_nbytes", "closest"]

Judge = Callable[..., Account]

# Each attempt plans with a limit that is lowered by the excess of the plan before; the last one
# takes the plan that keeps least.
MOST_ATTEMPTS = 8
# So many limits between one that fits and one that does not are tried, and so many solutions of
# each search are counted.
_MOST_RAISES, _MOST_LOOKS = 3, 4
# Limits that differ by less than this share are one.
_EQUAL_LIMITS = 1e-2
# What it takes to count a plan's memory, by the nodes of the graph.
_SECONDS_PER_NODE = 1e-4


@dataclass(frozen=True)
class Candidate:
    """A plan and its memory on the rank that needs most.

    account: all of the memory, by category. counted: those bytes of it that the planner's tables
    count, which are there at one moment of the backward pass.
    """

    plan: Plan
    account: Account
    counted: float

    def error(self, captured: Captured, network: CostNetwork) -> MemoryLimitError:
        """Return the error that says what this plan takes, where none takes less."""
        return does_not_fit(captured, network, self.plan, self.account, self.counted)


def closest(
    captured: Captured,
    model: str,
    network: CostNetwork,
    solve: NetworkSolver,
    pins: Mapping[str, Layout],
    judge: Judge,
    beat: float = math.inf,
) -> tuple[Candidate, float]:
    """Return a plan that fits or, where no attempt gives one, the plan that takes least.

    Return also a lower bound on the cost of every plan whose saved bytes are within the limit: +inf
    where it is proven that there is none. beat: a plan that costs as much is of no use: the search
    ends where the bound is no less.

    Where a solution takes too much at a moment that is not counted, that one is counted, too, and
    the solution was of no use. So solutions are rough until all moments are counted that matter.
    """
    # Bytes that every plan needs are no matter of choice, and are not in the tables. The tables of
    # a pipeline count all stages, for one micro-batch of those in flight.
    scale = network.shares.ranks / network.shares.in_flight
    limit = given = (allowed_nbytes(network) - network.fixed_nbytes) * scale
    counted = Moments(network, pins, given)
    # Of the plans that were made, the one that takes least, and the cheapest that fits.
    least: Candidate | None = None
    fitting: Candidate | None = None
    bound, price, above = -math.inf, 0.0, limit
    attempt, rough = 0, True
    while attempt < MOST_ATTEMPTS:
        problem = counted.problem(limit)
        last = attempt == MOST_ATTEMPTS - 1
        try:
            if last:
                solutions = counted.least(limit, solve)
            else:
                searched = solved_or_refused(
                    lambda problem=problem, rough=rough: solve.within(problem, rough)  # type: ignore[misc]
                )
                solutions = [_better(problem, searched, solve.start)]
                price = searched.multiplier
                if limit == given:
                    bound = max(bound, solutions[0].lower_bound)
                    # A moment that is counted is told by the tables alone.
                    if bound < beat and counted.turn(solutions[0], "", solve.known):
                        rough = True
                        continue
        except OverLimitError as error:
            # The plan that keeps least may still fit: the limit was lowered by guess.
            if limit == given and not problem.fits(error.least):
                bound = math.inf
            last = True
            solutions = counted.least(limit, solve)
        tried = [(*_read(captured, model, network, one, judge), one) for one in solutions]
        read, account, solution = min(tried, key=lambda one: one[1].total)
        candidate = Candidate(replace(read, memory_price=price), account, solution.usage / scale)
        if least is None or candidate.account.total < least.account.total:
            least = candidate
        over = candidate.account.total - allowed_nbytes(network)
        if over <= 0 and (fitting is None or candidate.plan.cost < fitting.plan.cost):
            fitting = candidate
        if bound >= beat:
            break
        if limit == given and not last:
            if over > 0 and counted.turn(solution, account.worst, solve.known):
                rough = True
                continue
            if rough and searched.gap > network.options.gap * abs(searched.cost):
                rough = False
                continue
        if fitting is not None and over <= 0 and attempt and not last:
            raised = _Raised(captured, model, network, solve, judge, fitting, above, bound)
            return raised.run(counted.problem, scale), bound
        if last or over <= 0:
            break
        above = limit
        # The solution may use less than the limit: from there the excess is taken off.
        limit = min(limit, solution.usage) - over * scale
        attempt += 1
    assert least is not None
    if bound == math.inf and least.account.total <= allowed_nbytes(network):
        # The tables counted bytes that this plan does not take: nothing is proven by them.
        bound = -math.inf
    return fitting or least, bound


@dataclass
class _Raised:
    """The search for a cheaper plan than one that fits, where the limit was lowered by guess.

    What keeps less than a tighter limit fits a looser one all the same, and by how much a limit has
    to be lowered differs from plan to plan.
    best: the cheapest plan that fits. above: a limit on what is counted by which no plan fitted.
    bound: on the cost of all. Other fields: the arguments of `closest`.
    """

    captured: Captured
    model: str
    network: CostNetwork
    solve: NetworkSolver
    judge: Judge
    best: Candidate
    above: float
    bound: float
    seen: list[Solution] = field(default_factory=list)
    scale: float = 1.0

    def run(self, problem_of: Callable[[float], Problem], scale: float) -> Candidate:
        """Return the cheapest plan that fits: of those that were looked at, and within limits
        between the one that fitted and the one that did not.
        """
        self.scale = scale
        self.look(self.solve.known)
        below = self.best.counted * scale
        for _ in range(_MOST_RAISES):
            if self.is_enough or self.above - below <= _EQUAL_LIMITS * self.above:
                break
            limit = (below + self.above) / 2
            try:
                found = self.solve.within(problem_of(limit))
            except OverLimitError:
                break
            if found.cost >= self.best.plan.cost or self.look([found]):
                below = limit
            else:
                self.above = found.usage
            self.look(self.solve.known)
        return self.best

    @property
    def is_enough(self) -> bool:
        """True where the best plan is near enough to the bound, or no time is left to look on."""
        cost = self.best.plan.cost
        return cost - self.bound <= self.network.options.gap * abs(cost) or current().is_over

    def look(self, solutions: Sequence[Solution]) -> bool:
        """Take the cheapest of these solutions that fits, if it is cheaper than the best; return
        whether one is.
        """
        cheaper = sorted(
            (
                one
                for one in solutions
                if one.cost < self.best.plan.cost and one.usage <= self.above
                if not any(one is seen for seen in self.seen)
            ),
            key=lambda one: one.cost,
        )
        # The dearer ones need less; the cheapest that fits is found by halving.
        first, last, fits = 0, len(cheaper), False
        for _ in range(_MOST_LOOKS):
            if first == last or self.is_enough:
                break
            middle = (first + last) // 2
            solution = cheaper[middle]
            self.seen.append(solution)
            read, account = _read(self.captured, self.model, self.network, solution, self.judge)
            if account.total <= allowed_nbytes(self.network):
                plan = replace(read, memory_price=self.best.plan.memory_price)
                self.best = Candidate(plan, account, solution.usage / self.scale)
                last, fits = middle, True
            else:
                first = middle + 1
        return fits


def allowed_nbytes(network: CostNetwork) -> int:
    """Return the memory limit of one rank, in bytes."""
    assert network.options.memory_limit is not None
    return network.options.memory_limit


def _better(problem: Problem, solution: Solution, start: Mapping[str, int] | None) -> Solution:
    """Return the solution, or the assignment to begin with, if that fits and costs less."""
    if start is None or problem.limit is None:
        return solution
    begun = Solution.of(problem, start, "as given", solution.lower_bound)
    return begun if begun.usage <= problem.limit and begun.cost < solution.cost else solution


def _read(
    captured: Captured, model: str, network: CostNetwork, solution: Solution, judge: Judge
) -> tuple[Plan, Account]:
    """Return the plan of a solution, and all of its memory on the rank that needs most.

    What takes memory to hide collectives gives way to the limit: gathers that begin ahead of their
    use, and gradients of weights that wait for collectives of other layers, which there are where
    there is room for them.
    """
    plan = plan_of_solution(captured, model, network.mesh, network, solution, 1.0)
    current().spend(len(network.graph.nodes) * _SECONDS_PER_NODE)
    plan, allowed = replace(plan, fills_gaps=False), allowed_nbytes(network)
    account = judge(plan)
    if account.total > allowed and any(row.begins for row in plan.conversions):
        waiting = without_gathers_ahead(plan)
        less = judge(waiting)
        if less.total < account.total:
            plan, account = waiting, less
    if account.total <= allowed:
        fuller = replace(plan, fills_gaps=True)
        more = judge(fuller)
        if more.total <= allowed:
            plan, account = fuller, more
    return replace(plan, memory=account.rows), account
