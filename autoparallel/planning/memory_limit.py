"""Planning under a memory limit: the fastest plan that fits, or by how much none does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoparallel.analysis.memory import Account, memory_of
from autoparallel.analysis.timeline import step_and_waits
from autoparallel.errors import MemoryLimitError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.planning.step_search import StepSearch, Timed
from autoparallel.strategy.build_network import rebuilt
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.support.units import bytes_text
from planners import InfeasibleError, OverLimitError, Problem, Solution

__all__ = ["plan_within"]

# Each attempt plans with a limit that is lowered by the excess of the plan before; the last one
# takes the plan that keeps least.
_MOST_ATTEMPTS = 8
# For a model that does not fit, up to so many times as many ranks are tried.
_MOST_RANKS = 64
# So many of the largest items of memory are named in the error.
_LARGEST_ITEMS = 5
# The price of a byte where the plan that keeps least is looked for: so high that bytes decide, and
# so low that seconds, which break ties, are not lost in rounding.
_SECONDS_PER_BYTE = 1e-3


@dataclass(frozen=True)
class _Candidate:
    """A plan and its memory on the rank that needs most.

    account: all of the memory, by category. counted: those bytes of it that the planner's tables
    count, which are there when the backward pass begins.
    """

    plan: Plan
    account: Account
    counted: float


def plan_within(
    captured: Captured,
    model: str,
    network: CostNetwork,
    solve: NetworkSolver,
    pins: Mapping[str, Layout] = {},
) -> Plan:
    """Return the plan of least cost among those that fit into the memory limit of the options.

    captured: the traced program. model: the name that the plan gives it. network: its cost network.
    solve: a solver of the network's problems. pins: layouts of parameters, by node name.

    The planner limits the sum of saved bytes. The rest of a plan's memory (buffers, inputs,
    temporaries) is known when it is made: then the limit is lowered by the excess and it is planned
    again. A block that is recomputed has all its activations at once: where that is too much, less
    is recomputed. The lower bound is that of the limit as it was given, over all modes of
    recomputation, so that the plan's gap also counts what lowering the limit may have cost.
    Raises MemoryLimitError where nothing fits, and PlanError where the pins rule out all plans.
    """
    options = network.options
    # A mode that the user has asked for by name is not given up.
    fewer = {"auto": ("selective", "none")}
    closest: _Candidate | None = None
    bound = -math.inf
    for mode in (options.recompute, *fewer.get(options.recompute, ())):
        # The constraints belong to a network's states, and must be laid on each network anew.
        if mode != options.recompute:
            network = rebuilt(network, options=replace(options, recompute=mode))
            constrain(network, captured)
            solve = NetworkSolver(network)
        nearest, mode_bound = _closest(captured, model, network, solve, pins)
        if mode == options.recompute and mode_bound == math.inf:
            # The other modes are restrictions of this one: they cannot fit either.
            raise _does_not_fit(captured, network, nearest)
        # The other modes are restrictions of the first: their bounds do not hold for all plans.
        if mode == options.recompute:
            bound = mode_bound
        if nearest.account.total <= _allowed(network):
            plan = replace(nearest.plan, options=options, lower_bound=min(bound, nearest.plan.cost))
            return _shortest(captured, model, network, plan, pins)
        if closest is None or nearest.account.total < closest.account.total:
            closest = replace(nearest, plan=replace(nearest.plan, options=options))
    assert closest is not None
    raise _does_not_fit(captured, network, closest)


def _closest(
    captured: Captured,
    model: str,
    network: CostNetwork,
    solve: NetworkSolver,
    pins: Mapping[str, Layout],
) -> tuple[_Candidate, float]:
    """Return a plan that fits or, where no attempt gives one, the plan that takes least.

    Return also a lower bound on the cost of every plan whose saved bytes are within the limit: +inf
    where it is proven that there is none.
    """
    # Bytes that every plan needs are no matter of choice, and are not in the tables.
    limit = _allowed(network) - network.fixed_nbytes
    least: _Candidate | None = None
    bound = -math.inf
    for attempt in range(_MOST_ATTEMPTS):
        problem = network.problem(1.0, pins, limit)
        last = attempt == _MOST_ATTEMPTS - 1
        try:
            if last:
                solution = _least(problem, solve)
            else:
                solution = _better(problem, solve.within(problem), solve.start)
                if attempt == 0:
                    bound = solution.lower_bound
        except OverLimitError as error:
            # The plan that keeps least may still fit: the limit was lowered by guess.
            if attempt == 0 and not problem.fits(error.least):
                bound = math.inf
            last = True
            solution = _least(problem, solve)
        except InfeasibleError as error:
            raise PlanError(
                "no plan is possible", why=str(error), fix="loosen the options or the pins"
            ) from error
        candidate = _Candidate(*_read(captured, model, network, solution), solution.usage)
        if least is None or candidate.account.total < least.account.total:
            least = candidate
        over = candidate.account.total - _allowed(network)
        if last or over <= 0:
            break
        # The solution may use less than the limit: from there the excess is taken off.
        limit = min(limit, solution.usage) - over
    assert least is not None
    return least, bound


def _shortest(
    captured: Captured, model: str, network: CostNetwork, plan: Plan, pins: Mapping[str, Layout]
) -> Plan:
    """Return the plan, or one of a shorter step that fits among those without a limit.

    Nothing within a limit costs less than the best without one, which is easier to prove: there, no
    copy is gathered again and no block recomputed. The better of both bounds is the plan's, and no
    step is shorter than the bound on all steps without a limit.
    """
    recompute = "none" if plan.options.recompute == "auto" else plan.options.recompute
    free = rebuilt(network, replace(plan.options, memory_limit=None, recompute=recompute))
    constrain(free, captured)
    solve = NetworkSolver(free)
    problem = free.problem(1.0, pins)
    best = solve(problem)
    rest = f"; bound without the limit by {best.method}"
    if best.lower_bound > plan.lower_bound and plan.lower_bound < plan.cost:
        bound = min(best.lower_bound, plan.cost)
        plan = replace(plan, lower_bound=bound, method=plan.method + rest)

    def fits(timed: Timed) -> bool:
        """Say whether a plan without a limit is within it."""
        account = memory_of(timed.plan, graph=free.graph)
        return account.total <= _allowed(network)

    step, waits = step_and_waits(plan, network.hardware)
    limited = Timed("", plan, Solution({}, plan.cost, plan.lower_bound, plan.method), step, waits)
    found, _ = StepSearch(
        captured, model, free, solve, problem, best, accepts=fits, rival=limited
    ).run()
    if found.memory:
        return found
    return replace(found, options=plan.options, memory=memory_of(found, graph=free.graph).rows)


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
    captured: Captured, model: str, network: CostNetwork, solution: Solution
) -> tuple[Plan, Account]:
    """Return the plan of a solution, and all of its memory on the rank that needs most."""
    plan = plan_of_solution(captured, model, network.mesh, network, solution, 1.0)
    account = memory_of(plan, graph=network.graph)
    return replace(plan, memory=account.rows), account


def _shares(account: Account) -> str:
    """Return the categories of memory with their sizes, the largest first."""
    rows = sorted(((size, name) for name, size in account.rows), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {bytes_text(size)}" for size, name in rows if size)


def _does_not_fit(
    captured: Captured, network: CostNetwork, candidate: _Candidate
) -> MemoryLimitError:
    """Return the error that says what the plan that needs least takes, and what would do.

    What would do is a larger limit, more ranks, or a smaller batch.
    """
    allowed, account = _allowed(network), candidate.account
    largest = [
        f"{item.category.replace('_', ' ')}: {item.name}"
        f"{f' ({item.count} of them)' if item.count > 1 else ''} {bytes_text(item.nbytes)}"
        for item in account.items[:_LARGEST_ITEMS]
    ]

    def error(more: str = "use more ranks") -> MemoryLimitError:
        """Return the error that advises this, too."""
        error = MemoryLimitError(
            f"the model does not fit: no plan was found that takes at most {bytes_text(allowed)} "
            f"per rank on {network.mesh}",
            where="\n".join(largest),
            why=f"the plan found that needs least takes {bytes_text(account.total)}, "
            f"{bytes_text(account.total - allowed)} more than allowed: {_shares(account)}",
            fix=f'pass memory_limit="{_at_least(account.total)}", or {more}, or a smaller batch',
        )
        error.least = account.total
        return error

    def advised() -> MemoryLimitError:
        """Return the error that says how many ranks would do, which takes networks for more."""
        fixed_nbytes = account.total - candidate.counted
        ranks = _enough_ranks(
            captured, network, candidate.plan.options, candidate.counted, fixed_nbytes
        )
        return error(f"use {ranks.world_size} ranks ({ranks})") if ranks else error()

    plain = error()
    plain.advised = advised
    return plain


def _at_least(nbytes: int) -> str:
    """Return a size that is not smaller, in whole GiB, MiB or KiB, of at least two digits.

    >>> _at_least(40 * 2**30), _at_least(5 * 2**30 + 1)
    ('40GiB', '5121MiB')
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if nbytes >= 10 * unit:
            return f"{-(-nbytes // unit)}{name}"
    return f"{-(-nbytes // 2**10)}KiB"


def _enough_ranks(
    captured: Captured,
    network: CostNetwork,
    options: Options,
    counted_nbytes: float,
    fixed_nbytes: float,
) -> Mesh | None:
    """Return the mesh with more ranks on its first axis on which a plan should fit.

    counted_nbytes: bytes of a plan that the planner counts. fixed_nbytes: the others, taken to be
    no more on a larger mesh. Return None where no such mesh has a plan.
    """
    # The outermost axis is the one across nodes, along which machines are added.
    (name, size), *others = network.mesh.axes
    allowed, factor = _allowed(network), 2
    # More ranks share the counted bytes at best evenly: fewer than this cannot do.
    while factor <= _MOST_RANKS and counted_nbytes / factor + fixed_nbytes > allowed:
        factor *= 2
    while factor <= _MOST_RANKS:
        mesh = Mesh(**{name: size * factor, **dict(others)})
        wider = rebuilt(network, options=options, mesh=mesh)
        try:
            constrain(wider, captured)
        except PlanError:
            # What is demanded of fewer ranks cannot be had of so many.
            return None
        try:
            least = NetworkSolver(wider)(wider.problem().usage_alone())
        except InfeasibleError:
            return None
        if least.cost + fixed_nbytes <= allowed:
            return mesh
        factor *= 2
    return None
