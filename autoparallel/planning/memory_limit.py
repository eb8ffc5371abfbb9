"""Planning under a memory limit: the fastest plan that fits, or by how much none does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoparallel.analysis.memory import Account, memory_of
from autoparallel.errors import MemoryLimitError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.strategy.build_network import rebuilt
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.support.units import bytes_text
from planners import InfeasibleError, OverLimitError, Problem, Solution

__all__ = ["plan_within"]

# Each attempt plans with a limit lowered by what the plan before took too much; the last one takes
# the plan that keeps least.
_MOST_ATTEMPTS = 5
# How many times as many ranks are tried for a model that does not fit.
_MOST_RANKS = 64
_LARGEST_ITEMS = 5
# A gap between cost and bound, as a share of the cost, that needs no other proof.
_ENOUGH = 0.01
# So much that nothing but bytes counts, and so little that seconds are not lost in rounding.
_SECONDS_PER_BYTE = 1e-3


@dataclass(frozen=True)
class _Found:
    """A plan, what it takes, and how much of that the planner counts."""

    plan: Plan
    taken: Account
    counted: float


def plan_within(
    captured: Captured,
    model: str,
    network: CostNetwork,
    solve: NetworkSolver,
    pins: Mapping[str, Layout] = {},
) -> Plan:
    """The plan of least cost among those that fit into the memory limit of the options.

    The planner limits the sum of what is kept. What a plan takes besides (buffers, inputs, what is
    there for a moment only) is known when it is made: then the limit is lowered and it is planned
    again. What is run again is there for a moment: where that is too much, less is run again.
    The bound is that of the limit as it was given, for all that may be run again.
    Raises MemoryLimitError where nothing fits.
    """
    options = network.options
    fewer = {"auto": ("selective", "none"), "full": (), "selective": (), "none": ()}
    closest: _Found | None = None
    bound = -math.inf
    for mode in (options.recompute, *fewer[options.recompute]):
        if mode != options.recompute:
            network = rebuilt(network, options=replace(options, recompute=mode))
            constrain(network, captured.aliases)
            solve = NetworkSolver(network)
        found, own_bound = _closest(captured, model, network, solve, pins)
        if mode == options.recompute:
            bound = own_bound
        if found.taken.total <= _allowed(network):
            plan = replace(found.plan, options=options, lower_bound=min(bound, found.plan.cost))
            return _proven(captured, model, network, plan, pins)
        if closest is None or found.taken.total < closest.taken.total:
            closest = replace(found, plan=replace(found.plan, options=options))
    assert closest is not None
    raise _does_not_fit(captured, network, closest)


def _closest(
    captured: Captured,
    model: str,
    network: CostNetwork,
    solve: NetworkSolver,
    pins: Mapping[str, Layout],
) -> tuple[_Found, float]:
    """A plan that fits or, where none was found, the one found that takes least.

    And what no plan costs less than whose kept bytes alone are within the limit.
    """
    limit = _allowed(network) - network.fixed_nbytes
    least: _Found | None = None
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
        except OverLimitError:
            # The plan that keeps least may still fit: the limit was lowered by guess.
            last = True
            solution = _least(problem, solve)
        except InfeasibleError as error:
            raise PlanError(
                "no plan is possible", why=str(error), fix="loosen the options or the pins"
            ) from error
        found = _Found(*_read(captured, model, network, solution), solution.usage)
        if least is None or found.taken.total < least.taken.total:
            least = found
        over = found.taken.total - _allowed(network)
        if last or over <= 0:
            break
        limit = min(limit, solution.usage) - over
    assert least is not None
    return least, bound


def _proven(
    captured: Captured, model: str, network: CostNetwork, plan: Plan, pins: Mapping[str, Layout]
) -> Plan:
    """The plan, or the one without a limit if that fits; with the better of their bounds.

    Nothing within a limit costs less than the best without one, which is easier to prove: no copy
    is made again, no block run again.
    """
    if plan.cost - plan.lower_bound <= _ENOUGH * plan.cost:
        return plan
    recompute = "none" if plan.options.recompute == "auto" else plan.options.recompute
    free = rebuilt(network, replace(plan.options, memory_limit=None, recompute=recompute))
    constrain(free, captured.aliases)
    best = NetworkSolver(free)(free.problem(1.0, pins))
    other, taken = _read(captured, model, free, best)
    if taken.total <= _allowed(network) and other.cost <= plan.cost:
        return replace(other, options=plan.options)
    if best.lower_bound <= plan.lower_bound:
        return plan
    return replace(
        plan,
        lower_bound=min(best.lower_bound, plan.cost),
        method=f"{plan.method}; bound without the limit by {best.method}",
    )


def _least(problem: Problem, solve: NetworkSolver) -> Solution:
    """The solution that keeps least and, of those that do, costs least. It bounds no cost."""
    found = solve(problem.weighed(_SECONDS_PER_BYTE))
    return Solution.of(problem, found.assignment, found.method, -math.inf, _SECONDS_PER_BYTE)


def _allowed(network: CostNetwork) -> int:
    assert network.options.memory_limit is not None
    return network.options.memory_limit


def _better(problem: Problem, found: Solution, start: Mapping[str, int] | None) -> Solution:
    """The solution found, or the assignment to begin with, if that fits and costs less."""
    if start is None or problem.limit is None:
        return found
    own = Solution.of(problem, start, "as given", found.lower_bound)
    return own if own.usage <= problem.limit and own.cost < found.cost else found


def _read(
    captured: Captured, model: str, network: CostNetwork, solution: Solution
) -> tuple[Plan, Account]:
    plan = plan_of_solution(captured, model, network.mesh, network, solution, 1.0)
    taken = memory_of(plan, graph=network.graph)
    return replace(plan, memory=taken.rows), taken


def _shares(taken: Account) -> str:
    rows = sorted(((size, name) for name, size in taken.rows), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {bytes_text(size)}" for size, name in rows if size)


def _does_not_fit(captured: Captured, network: CostNetwork, found: _Found) -> MemoryLimitError:
    """What the plan that needs least takes, and what limit or how many ranks would do."""
    allowed, taken = _allowed(network), found.taken
    largest = [
        f"{item.category.replace('_', ' ')}: {item.name}"
        f"{f' ({item.count} of them)' if item.count > 1 else ''} {bytes_text(item.nbytes)}"
        for item in taken.items[:_LARGEST_ITEMS]
    ]
    fixed_nbytes = taken.total - found.counted
    ranks = _enough_ranks(captured, network, found.plan.options, fixed_nbytes)
    more = f"use {ranks.world_size} ranks ({ranks})" if ranks else "use more ranks"
    error = MemoryLimitError(
        f"the model does not fit: no plan was found that takes at most {bytes_text(allowed)} per "
        f"rank on {network.mesh}",
        where="\n".join(largest),
        why=f"the plan found that needs least takes {bytes_text(taken.total)}, "
        f"{bytes_text(taken.total - allowed)} more than allowed: {_shares(taken)}",
        fix=f'pass memory_limit="{_at_least(taken.total)}", or {more}, or a smaller batch',
    )
    error.least = taken.total
    return error


def _at_least(nbytes: int) -> str:
    """A size that is not smaller, in MiB or GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if nbytes >= 10 * unit:
            return f"{-(-nbytes // unit)}{name}"
    return f"{-(-nbytes // 2**10)}KiB"


def _enough_ranks(
    captured: Captured, network: CostNetwork, options: Options, fixed_nbytes: float
) -> Mesh | None:
    """The mesh with more ranks on its first axis, by doubling, on which a plan should fit.

    besides: bytes of a plan that the planner does not count, taken to be no more there.
    """
    (name, size), *others = network.mesh.axes
    factor = 2
    while factor <= _MOST_RANKS:
        mesh = Mesh(**{name: size * factor, **dict(others)})
        wider = rebuilt(network, options=options, mesh=mesh)
        constrain(wider, captured.aliases)
        try:
            least = _least(wider.problem(), NetworkSolver(wider))
        except InfeasibleError:
            return None
        if least.usage + fixed_nbytes <= _allowed(network):
            return mesh
        factor *= 2
    return None
