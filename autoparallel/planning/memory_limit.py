"""Planning under a memory limit: the fastest plan that fits, or by how much none does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from autoparallel.analysis.abstract_execution import Seen
from autoparallel.analysis.memory import memory_of
from autoparallel.analysis.memory_account import Account
from autoparallel.analysis.timeline import step_and_waits
from autoparallel.errors import MemoryLimitError
from autoparallel.graph.captured import Captured
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.planning.eased_plans import Eased, EasedPlans, solved_or_refused
from autoparallel.planning.gathers_ahead import without_gathers_ahead
from autoparallel.planning.least_bytes import LeastBytes
from autoparallel.planning.memory_advice import does_not_fit
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution, solution_of_plan
from autoparallel.planning.step_search import StepSearch, Timed
from autoparallel.strategy.build_network import rebuilt
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from planners import OverLimitError, Problem, Solution
from planners.effort import current

__all__ = ["MOST_ATTEMPTS", "plan_within", "unlimited"]

Judge = Callable[..., Account]

# Each attempt plans with a limit that is lowered by the excess of the plan before; the last one
# takes the plan that keeps least.
MOST_ATTEMPTS = 8
# The price of a byte where the plan that keeps least is looked for: so high that bytes decide, and
# so low that seconds, which break ties, are not lost in rounding.
_SECONDS_PER_BYTE = 1e-3
# So many limits between one that fits and one that does not are tried, and so many solutions of
# each search are counted.
_MOST_RAISES, _MOST_LOOKS = 3, 4
# Limits that differ by less than this share are one.
_EQUAL_LIMITS = 1e-2
# A gap of so many times the one that is asked for is wide: plans that recompute less may be better.
_WIDE = 3
# A plan that takes no longer than so many times its estimate is as it was meant to be.
_AS_ESTIMATED = 1.05
# What it takes to count a plan's memory, by the nodes of the graph.
_SECONDS_PER_NODE = 1e-4


@dataclass(frozen=True)
class _Candidate:
    """A plan and its memory on the rank that needs most.

    account: all of the memory, by category. counted: those bytes of it that the planner's tables
    count, which are there when the backward pass begins.
    """

    plan: Plan
    account: Account
    counted: float

    def error(self, captured: Captured, network: CostNetwork) -> MemoryLimitError:
        """Return the error that says what this plan takes, where none takes less."""
        return does_not_fit(captured, network, self.plan, self.account, self.counted)


def plan_within(
    captured: Captured,
    model: str,
    free: CostNetwork,
    options: Options,
    pins: Mapping[str, Layout] = {},
    start: Plan | None = None,
    beat: float = math.inf,
    judge: Judge | None = None,
    eased: Sequence[Eased] = (),
    step: Callable[[Plan], float] | None = None,
) -> Plan:
    """Return the plan of the shortest step that was found within the memory limit of the options.

    captured: the traced program. model: the name that the plan gives it. free: its cost network by
    `unlimited` options. pins: layouts of parameters, by node name. start, beat: as of `search`.
    judge: how the memory of a plan is counted; by default as that of the whole model on each rank.
    eased: ways in which a plan is said to fit, the quickest first. On meshes of three axes, where
    searches within the limit are by groups of states and take long, the first that does in about
    the time that it is said to take is taken; where none does, the quickest of them.
    step: what tells the seconds of a step; by default they are the plan's.

    Nothing within a limit costs less than the best without one, where no copy is gathered again and
    no block recomputed. Where that fits, the limit is none. Else plans without a limit compete with
    the best one within it, if they fit; the better of both bounds is the plan's, and no step is
    shorter than the bound on all steps without a limit.
    Raises MemoryLimitError where nothing fits, and PlanError where the pins rule out all plans.
    """
    # All plans run the same calls on the same parts, whatever their modes and limits.
    seen: Seen = {}
    of_stages = judge is not None
    judge = judge or partial(memory_of, graph=free.graph, seen=seen)
    allowed = options.memory_limit
    assert allowed is not None
    solve = NetworkSolver(free)
    problem = free.problem(1.0, pins)
    best = solved_or_refused(lambda: solve(problem))
    eased_plans = EasedPlans(captured, model, free, pins)
    quickest: tuple[float, Plan] | None = None
    for way in eased if solve.many and start is None else ():
        if not way.keeps_less:
            continue
        plan = replace(eased_plans.plan(way), options=options)
        account = judge(plan, way.starts) if way.starts else judge(plan)
        if account.total > allowed:
            continue
        bound = min(best.lower_bound, plan.cost)
        rest = f"; {way}"
        rest += f"; bound without the limit by {best.method}"
        plan = replace(plan, lower_bound=bound, method=plan.method + rest, memory=account.rows)
        seconds = plan.step if step is None else step(plan)
        if quickest is None or seconds < quickest[0]:
            quickest = seconds, plan
        if seconds <= way.seconds * _AS_ESTIMATED:
            break
    if quickest is not None:
        return quickest[1]

    def fits(plan: Plan) -> bool:
        """Say whether a plan without a limit is within it."""
        current().spend(len(free.graph.nodes) * _SECONDS_PER_NODE)
        return judge(replace(plan, options=options)).total <= allowed

    def told(plan: Plan) -> Plan:
        """Return a plan without a limit as one within it."""
        plan = replace(plan, options=options)
        return replace(plan, memory=judge(plan).rows)

    search = StepSearch(
        captured,
        model,
        free,
        solve,
        problem,
        best,
        accepts=lambda timed: fits(timed.plan),
        beat=beat,
        # What stages have of the model is not told by its sums.
        least_bytes=None if of_stages else LeastBytes(free),
        most_bytes=allowed,
    )
    if start is None and search.may_fit(best.assignment) and fits(search.best.plan):
        return told(search.run()[0])
    # What does not fit is no plan, but its sum is a bound.
    search.best = replace(search.best, step=math.inf)
    if beat < math.inf:
        search.prove()
        if search.bound >= beat:
            # Nothing here is of use: another mesh has a shorter step.
            return told(replace(search.best.plan, step_seconds=search.bound))
    network = rebuilt(free, options)
    constrain(network, captured)
    if not of_stages:
        search.least_bytes = LeastBytes(free, network)
    # The plan to begin with is told as states of this network, or refused.
    begin = solution_of_plan(network, start) if start is not None else None
    plan = _within(captured, model, network, NetworkSolver(network, begin), pins, judge)
    if best.lower_bound > plan.lower_bound and plan.lower_bound < plan.cost:
        rest = f"; bound without the limit by {best.method}"
        bound = min(best.lower_bound, plan.cost)
        plan = replace(plan, lower_bound=bound, method=plan.method + rest)
    timed, waits = step_and_waits(plan, network.hardware, network.shares.once)
    solution = Solution({}, plan.cost, plan.lower_bound, plan.method)
    search.begin_with(Timed("", plan, solution, timed, waits))
    found, _ = search.run()
    return found if found.memory else replace(told(found), memory_price=plan.memory_price)


def unlimited(options: Options) -> Options:
    """Return the options without a memory limit: then nothing is recomputed but on demand.

    >>> unlimited(Options(memory_limit=2**30, recompute="auto")).recompute
    'none'
    """
    recompute = "none" if options.recompute == "auto" else options.recompute
    return replace(options, memory_limit=None, recompute=recompute)


def _within(
    captured: Captured,
    model: str,
    network: CostNetwork,
    solve: NetworkSolver,
    pins: Mapping[str, Layout],
    judge: Judge,
) -> Plan:
    """Return the plan of least cost among those that fit into the memory limit.

    network: with the limit. solve: a solver of its problems. judge: as of `plan_within`.

    The planner limits the sum of saved bytes. The rest of a plan's memory (buffers, inputs,
    temporaries) is known when it is made: then the limit is lowered by the excess and it is planned
    again. A block that is recomputed has all its activations at once: where that is too much, or
    the limit had to be lowered so far for it that the gap is wide, less is recomputed. The lower
    bound is that of the limit as it was given, over all modes of recomputation, so that the plan's
    gap also counts what lowering the limit may have cost.
    """
    options = network.options
    # A mode that the user has asked for by name is not given up.
    fewer = {"auto": ("selective", "none")}
    closest: _Candidate | None = None
    best: Plan | None = None
    bound = -math.inf
    for mode in (options.recompute, *fewer.get(options.recompute, ())):
        # The constraints belong to a network's states, and must be laid on each network anew.
        if mode != options.recompute:
            network = rebuilt(network, options=replace(options, recompute=mode))
            constrain(network, captured)
            solve = NetworkSolver(network)
        nearest, mode_bound = _closest(captured, model, network, solve, pins, judge)
        if mode == options.recompute and mode_bound == math.inf:
            # The other modes are restrictions of this one: they cannot fit either.
            raise nearest.error(captured, network)
        # The other modes are restrictions of the first: their bounds do not hold for all plans.
        if mode == options.recompute:
            bound = mode_bound
        if nearest.account.total <= _allowed(network):
            if best is None or nearest.plan.cost < best.cost:
                best = nearest.plan
            if best.cost - bound <= _WIDE * options.gap * abs(best.cost) or current().is_over:
                break
        elif closest is None or nearest.account.total < closest.account.total:
            closest = replace(nearest, plan=replace(nearest.plan, options=options))
    if best is not None:
        return replace(best, options=options, lower_bound=min(bound, best.cost))
    assert closest is not None
    raise closest.error(captured, network)


def _closest(
    captured: Captured,
    model: str,
    network: CostNetwork,
    solve: NetworkSolver,
    pins: Mapping[str, Layout],
    judge: Judge,
) -> tuple[_Candidate, float]:
    """Return a plan that fits or, where no attempt gives one, the plan that takes least.

    Return also a lower bound on the cost of every plan whose saved bytes are within the limit: +inf
    where it is proven that there is none.
    """
    # Bytes that every plan needs are no matter of choice, and are not in the tables. The tables of
    # a pipeline count all stages, for one micro-batch of those in flight.
    scale = network.shares.ranks / network.shares.in_flight
    limit = (_allowed(network) - network.fixed_nbytes) * scale
    least: _Candidate | None = None
    bound, price, above = -math.inf, 0.0, limit
    for attempt in range(MOST_ATTEMPTS):
        problem = network.problem(1.0, pins, limit)
        last = attempt == MOST_ATTEMPTS - 1
        try:
            if last:
                solution = _least(problem, solve)
            else:
                searched = solved_or_refused(lambda problem=problem: solve.within(problem))  # type: ignore[misc]
                solution, price = _better(problem, searched, solve.start), searched.multiplier
                if attempt == 0:
                    bound = solution.lower_bound
        except OverLimitError as error:
            # The plan that keeps least may still fit: the limit was lowered by guess.
            if attempt == 0 and not problem.fits(error.least):
                bound = math.inf
            last = True
            solution = _least(problem, solve)
        read, account = _read(captured, model, network, solution, judge)
        candidate = _Candidate(replace(read, memory_price=price), account, solution.usage / scale)
        if least is None or candidate.account.total < least.account.total:
            least = candidate
        over = candidate.account.total - _allowed(network)
        if over <= 0 and attempt and not last:
            raised = _Raised(captured, model, network, solve, judge, candidate, above, bound)
            return raised.run(lambda limit: network.problem(1.0, pins, limit), scale), bound
        if last or over <= 0:
            break
        above = limit
        # The solution may use less than the limit: from there the excess is taken off.
        limit = min(limit, solution.usage) - over * scale
    assert least is not None
    return least, bound


@dataclass
class _Raised:
    """The search for a cheaper plan than one that fits, where the limit was lowered by guess.

    What keeps less than a tighter limit fits a looser one all the same, and by how much a limit has
    to be lowered differs from plan to plan.
    best: the cheapest plan that fits. above: a limit on what is counted by which no plan fitted.
    bound: on the cost of all. Other fields: the arguments of `_closest`.
    """

    captured: Captured
    model: str
    network: CostNetwork
    solve: NetworkSolver
    judge: Judge
    best: _Candidate
    above: float
    bound: float
    seen: list[Solution] = field(default_factory=list)
    scale: float = 1.0

    def run(self, problem_of: Callable[[float], Problem], scale: float) -> _Candidate:
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
        """Whether the best is near enough to the bound, or there is no time for more."""
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
            if account.total <= _allowed(self.network):
                plan = replace(read, memory_price=self.best.plan.memory_price)
                self.best = _Candidate(plan, account, solution.usage / self.scale)
                last, fits = middle, True
            else:
                first = middle + 1
        return fits


def _least(problem: Problem, solve: NetworkSolver) -> Solution:
    """Return the solution that keeps least and, of those that do, costs least.

    It proves no lower bound on the cost.
    """
    smallest = solve(problem.weighed(_SECONDS_PER_BYTE))
    return Solution.of(problem, smallest.assignment, smallest.method, -math.inf, _SECONDS_PER_BYTE)


def _allowed(network: CostNetwork) -> int:
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

    Where gathers that begin ahead of their use take too much, they begin where they are read.
    """
    plan = plan_of_solution(captured, model, network.mesh, network, solution, 1.0)
    current().spend(len(network.graph.nodes) * _SECONDS_PER_NODE)
    account = judge(plan)
    if account.total > _allowed(network) and any(row.begins for row in plan.conversions):
        waiting = without_gathers_ahead(plan)
        less = judge(waiting)
        if less.total < account.total:
            plan, account = waiting, less
    return replace(plan, memory=account.rows), account
