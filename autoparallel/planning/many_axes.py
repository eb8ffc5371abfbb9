"""Planning on more than three axes: first in whatever order equal axes come, then in the right one.

An op has some thousands of joint strategies on four axes. Most are others with axes of the same
size and equal links exchanged, so one network has a state for all of these (see
`strategy/equal_axes.py`). It is solved first. Its optimum is a bound on all plans, and says which
states the best plan has, but for their order; the network of these alone, in all orders, is small.
What may still be better by the first one's min-marginals joins it, where that is not much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from autoparallel.cost.hardware import Hardware
from autoparallel.graph.graph import Graph
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.planning.memory_limit import unlimited
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.step_search import step_weights
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.equal_axes import AxisGroups, equal_axes
from autoparallel.strategy.step_parts import StepParts
from planners import InfeasibleError, OverLimitError, Problem, TooWideError, exact
from planners.table_memo import Memo

__all__ = ["Narrowed", "narrowed"]

# Fewer axes are planned for as they are.
_FEW_AXES = 3
# A gap of this share of the cost is far below the error of any cost model.
_ENOUGH = 1e-3
# Min-marginals of more work, in table entries read, take too long; of the states that they leave,
# so many of a variable join the network.
_MOST_WORK, _MOST_STATES = 2**32, 4
# The price of a byte where bytes decide, and seconds break ties.
_SECONDS_PER_BYTE = 1e-3

_Told = dict[str, frozenset[Any]]


@dataclass(frozen=True)
class Narrowed:
    """A network of few states, and what is proven of the network of all.

    network: of these states. bound: no plan's seconds add up to less. step_bound: no plan's step is
    shorter.
    """

    network: CostNetwork
    bound: float
    step_bound: float

    def told(self, plan: Plan) -> Plan:
        """Return a plan of the network with what is proven of all plans."""
        return replace(
            plan,
            lower_bound=min(self.bound, plan.cost),
            step_bound=min(self.step_bound, plan.step_seconds),
            method=f"{plan.method}; layouts in whatever order of equal axes first",
        )


def narrowed(
    graph: Graph,
    mesh: Mesh,
    hardware: Hardware,
    options: Options,
    stored: Mapping[str, Layout] | None,
    whole_outputs: bool,
) -> Narrowed | None:
    """Return the network of the states that the best plan on many axes may have, without its limit.

    Arguments as of `build_network`. None on few axes, and where no two of them are equal; there,
    nothing is gained. None, too, where the best states go together in no order: others may.
    """
    sizes = tuple(size for _, size in mesh.axes)
    groups = equal_axes(sizes, hardware.links(sizes))
    if sum(size > 1 for size in sizes) <= _FEW_AXES or len(groups) == len(sizes):
        return None
    try:
        return _of_few_states(graph, mesh, hardware, options, stored, whole_outputs, groups)
    except InfeasibleError:
        return None


def _of_few_states(
    graph: Graph,
    mesh: Mesh,
    hardware: Hardware,
    options: Options,
    stored: Mapping[str, Layout] | None,
    whole_outputs: bool,
    groups: AxisGroups,
) -> Narrowed:
    """Return the network as `narrowed` does. groups: of equal axes.

    Raises InfeasibleError where nothing is possible with these states.
    """
    free = unlimited(options) if options.memory_limit is not None else options
    build = partial(build_network, graph, mesh, hardware, stored=stored)
    build = partial(build, whole_outputs=whole_outputs)
    relaxed = build(free, groups=groups)
    solve = NetworkSolver(relaxed)
    problem = relaxed.problem()
    optimum = solve(problem)
    parts = StepParts(relaxed)
    # No bound on steps is above what this plan's seconds are by the same weights.
    grid = step_weights()
    weights = grid[int(np.argmax(grid @ parts.seconds(optimum.assignment)))]
    least = solve(parts.problem(problem, weights))
    only = relaxed.arranged_states(_states([optimum.assignment, least.assignment]))
    bound = optimum.lower_bound
    if options.memory_limit is not None:
        counted = build(options, groups=groups, known=relaxed)
        within, near = _within(counted)
        only = _both(only, counted.arranged_states(_states(near)))
        bound = max(bound, within)
    network = build(free, known=relaxed, only=only)
    best = NetworkSolver(network)(network.problem())
    if options.memory_limit is None and best.cost - bound > _ENOUGH * best.cost:
        try:
            possible = _possible(problem, best.cost, solve.memo)
        except TooWideError:
            possible = {}
        if possible:
            few = {name: states[:_MOST_STATES] for name, states in possible.items()}
            only = _both(only, relaxed.arranged_states(few))
            network = build(free, known=relaxed, only=only)
            # Where these are all that may be better, the best of them is the best of all.
            if all(len(states) <= _MOST_STATES for states in possible.values()):
                bound = NetworkSolver(network)(network.problem()).lower_bound
    return Narrowed(network, bound, least.lower_bound)


def _within(network: CostNetwork) -> tuple[float, list[Mapping[str, int]]]:
    """Return a bound on the cost of what is within the limit, and assignments near the best: that
    one, those of least bytes over and of most within the limit, and that of least of all.
    """
    assert network.options.memory_limit is not None
    limit = network.options.memory_limit - network.fixed_nbytes
    problem = network.problem(limit=limit)
    solve = NetworkSolver(network)
    bound, near = -math.inf, list[Mapping[str, int]]()
    try:
        best = solve.within(problem)
        bound = best.lower_bound
        near.append(best.assignment)
    except OverLimitError:
        # Nothing fits; what needs least is told.
        pass
    by_usage = sorted(solve.known, key=lambda solution: solution.usage)
    near += [solution.assignment for solution in by_usage if problem.fits(solution.usage)][-1:]
    near += [solution.assignment for solution in by_usage if not problem.fits(solution.usage)][:1]
    near.append(solve(problem.weighed(_SECONDS_PER_BYTE)).assignment)
    return bound, near


def _states(assignments: Iterable[Mapping[str, int]]) -> dict[str, set[int]]:
    """Return the states that each variable has in some assignment."""
    states: dict[str, set[int]] = {}
    for assignment in assignments:
        for name, state in assignment.items():
            states.setdefault(name, set()).add(state)
    return states


def _both(one: Mapping[str, frozenset[Any]], two: Mapping[str, frozenset[Any]]) -> _Told:
    """Return the states of both."""
    return {name: states | two.get(name, frozenset()) for name, states in one.items()}


def _possible(problem: Problem, cost: float, memo: Memo) -> dict[str, list[int]]:
    """Return, per variable, the states that an assignment of less cost may have, the best first.

    Raises TooWideError where that takes too long to tell.
    """
    marginals = exact.min_marginals(problem, problem.names, memo=memo, most_work=_MOST_WORK)
    return {
        name: [int(state) for state in np.argsort(table, kind="stable") if table[state] <= cost]
        for name, table in marginals.items()
    }
