"""The alternatives of each op: other strategies, and their extra cost with all else as planned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.plan import Plan
from autoparallel.planning.solution_to_plan import solution_of_plan
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.mesh_strategies import MeshStrategy
from planners import Factor, Problem, TooWideError, Variable, min_marginals

__all__ = ["Alternative", "find_alternatives"]

Array = NDArray[np.float64]

# A pass of more work than this, in table entries read, takes longer than a second or two.
_MOST_WORK = 2.0**31


@dataclass(frozen=True, slots=True)
class Alternative:
    """An Alternative is another strategy of an op, next to all others' as they are planned.

    strategy: what it would do on each axis. seconds: by which those of a step, added up, would be
    more; less than 0 where they would be less, and something else speaks against it: a limit on
    memory, or the step in which work overlaps. own: of these, those of the op itself; the others
    are those of moving what it reads and makes. anew: the seconds by which the best plan with it
    exceeds the best with the strategy that was chosen, everything else planned anew in both, by the
    sum of seconds; under a memory limit, with bytes charged at the price that the limit has. NaN
    where that would take long to tell.
    """

    strategy: MeshStrategy
    seconds: float
    own: float
    anew: float = math.nan


def find_alternatives(plan: Plan) -> dict[str, tuple[Alternative, ...]]:
    """Return the alternatives of each op, the cheapest first, by the op's name.

    How its parameters are stored, and the copies that are made of what it reads and makes, are
    chosen anew; everything else is as planned. So the extra seconds are an upper bound of those of
    planning anew with that choice, which are told beside them. What is impossible next to the
    others is left out. The result is empty for a plan without its graph, for one in parts, and on
    one rank.

    >>> import torch, autoparallel
    >>> layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
    >>> plan = autoparallel.make_plan(layers, 2, example_inputs=torch.ones(8, 64))
    >>> "linear_product" in find_alternatives(plan)
    True
    """
    captured = plan.captured
    if captured is None or plan.world_size == 1:
        return {}
    options = plan.options
    graph = with_larger_hints(captured, options.tokens)
    hardware = find_hardware(options.hardware)
    network = build_network(graph, plan.mesh, hardware, options, whole_outputs=captured.part)
    constrain(network, captured)
    try:
        chosen = solution_of_plan(network, plan)
    except PlanError:
        # Of a plan that was made next to others, or changed since, nothing is known here.
        return {}
    search = _Search(network, network.problem(), chosen)
    anew = _planned_anew(network, plan, chosen)
    known: dict[tuple[str, int], tuple[Alternative, ...]] = {}
    found: dict[str, tuple[Alternative, ...]] = {}
    for op in plan.ops:
        # Ops that are alike in equal blocks, and are planned alike, have equal alternatives.
        key = (captured.blocks.twin(op.name), chosen[op.name])
        if key not in known:
            known[key] = search.alternatives(op.name, anew.get(op.name))
        found[op.name] = known[key]
    return found


def _planned_anew(network: CostNetwork, plan: Plan, chosen: Mapping[str, int]) -> dict[str, Array]:
    """Return what each strategy of an op costs more than that of the plan, by the op's name, with
    all else chosen anew.

    It takes one pass over the network. Empty where that would take long, and for a plan in which
    products count more than their seconds.
    """
    if plan.product_weight != 1.0:
        return {}
    limit = plan.memory_limit
    problem = network.problem(1.0, {}, None if limit is None else limit - network.fixed_nbytes)
    priced = problem.weighed(plan.memory_price)
    names = [op.name for op in plan.ops]
    try:
        marginals = min_marginals(priced, names, most_work=_MOST_WORK)
    except TooWideError:
        return {}
    return {name: table - table[chosen[name]] for name, table in marginals.items()}


class _Search:
    """A search around a plan. factors: those of each variable."""

    def __init__(self, network: CostNetwork, problem: Problem, chosen: Mapping[str, int]) -> None:
        self.network, self.chosen = network, chosen
        self.variables: Mapping[str, Variable] = {one.name: one for one in problem.variables}
        self.factors: dict[str, list[Factor]] = {}
        for factor in problem.factors:
            for name in factor.scope:
                self.factors.setdefault(name, []).append(factor)

    def alternatives(self, name: str, anew: Array | None) -> tuple[Alternative, ...]:
        """Return the alternatives of one op. anew: see `_planned_anew`."""
        own = np.asarray(self.variables[name].unary, dtype=float)
        total = own.copy()
        copies: dict[str, Array] = {}
        for factor in self.factors.get(name, ()):
            others = (other for other in factor.scope if other != name)
            copy = next((other for other in others if self.is_free(other)), "")
            if not copy:
                total = total + self.line(factor, (name,))
            elif copy in copies:
                copies[copy] = copies[copy] + self.line(factor, (name, copy))
            else:
                copies[copy] = self.line(factor, (name, copy))
        for copy, table in copies.items():
            price = np.asarray(self.variables[copy].unary, dtype=float)
            for factor in self.factors[copy]:
                if name not in factor.scope:
                    price = price + self.line(factor, (copy,))
            total = total + (table + price).min(axis=1)
        state = self.chosen[name]
        if not np.isfinite(total[state]):
            return ()
        strategies, more = self.network.strategies[name], total - total[state]
        alternatives = [
            Alternative(
                strategies[other],
                float(more[other]),
                float(own[other] - own[state]),
                math.nan if anew is None else float(anew[other]),
            )
            for other in range(len(strategies))
            if other != state and np.isfinite(total[other])
        ]
        return tuple(sorted(alternatives, key=lambda one: one.seconds))

    def is_free(self, variable: str) -> bool:
        """Return whether a variable is chosen anew: how a parameter is stored, or in which layouts
        a value with several readers is there.
        """
        return variable.endswith("*") or variable in self.network.storages

    def line(self, factor: Factor, free: tuple[str, ...]) -> Array:
        """Return a factor's table over the free variables, in their order; the others are as they
        are planned.
        """
        at = tuple(slice(None) if one in free else self.chosen[one] for one in factor.scope)
        table = np.asarray(factor.table, dtype=float)[at]
        order = [one for one in factor.scope if one in free]
        return table if order == list(free) else table.T
