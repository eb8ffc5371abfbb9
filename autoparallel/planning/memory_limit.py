"""Planning under a memory limit: the fastest plan that fits, or by how much none does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from autoparallel.analysis.memory import memory_of
from autoparallel.analysis.memory_account import Account
from autoparallel.analysis.observed_runs import Seen
from autoparallel.analysis.timeline import step_and_waits
from autoparallel.graph.captured import Captured
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.planning.closest_plan import Candidate, allowed_nbytes, closest
from autoparallel.planning.eased_plans import Eased, EasedPlans, solved_or_refused
from autoparallel.planning.least_bytes import LeastBytes
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import solution_of_plan
from autoparallel.planning.step_search import StepSearch, Timed
from autoparallel.strategy.build_network import rebuilt
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from planners import Solution
from planners.effort import current

__all__ = ["plan_within", "unlimited"]

Judge = Callable[..., Account]

# A gap of so many times the one that is asked for is wide: plans that recompute less may be better.
_WIDE = 3
# A plan that takes no longer than so many times its estimate is as it was meant to be.
_AS_ESTIMATED = 1.05
# What it takes to count a plan's memory, by the nodes of the graph.
_SECONDS_PER_NODE = 1e-4


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
    searches within the limit are by groups of states and take long, and of stages, of whose bytes
    such a search knows but a sum, the first that does in about the time that it is said to take is
    taken; where none does, the quickest of them.
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
    reached = math.nan  # the estimate that the last plan to come up to one came up to
    for way in eased if (solve.many or of_stages) and start is None else ():
        # Ways of one estimate keep less and less.
        quicker = quickest is None or way.seconds < quickest[0]
        if not way.keeps_less or not quicker or way.seconds == reached:
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
            reached = way.seconds
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
    over: Candidate | None = None
    best: Plan | None = None
    bound = -math.inf
    for mode in (options.recompute, *fewer.get(options.recompute, ())):
        # The constraints belong to a network's states, and must be laid on each network anew.
        if mode != options.recompute:
            network = rebuilt(network, options=replace(options, recompute=mode))
            constrain(network, captured)
            solve = NetworkSolver(network)
        beat = math.inf if best is None else best.cost
        nearest, mode_bound = closest(captured, model, network, solve, pins, judge, beat)
        if mode == options.recompute and mode_bound == math.inf:
            # The other modes are restrictions of this one: they cannot fit either.
            raise nearest.error(captured, network)
        # The other modes are restrictions of the first: their bounds do not hold for all plans.
        if mode == options.recompute:
            bound = mode_bound
        if nearest.account.total <= allowed_nbytes(network):
            if best is None or nearest.plan.cost < best.cost:
                best = nearest.plan
            if best.cost - bound <= _WIDE * options.gap * abs(best.cost) or current().is_over:
                break
        elif over is None or nearest.account.total < over.account.total:
            over = replace(nearest, plan=replace(nearest.plan, options=options))
    if best is not None:
        return replace(best, options=options, lower_bound=min(bound, best.cost))
    assert over is not None
    raise over.error(captured, network)
