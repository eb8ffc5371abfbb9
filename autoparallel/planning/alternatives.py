"""The alternatives of each decision of a plan, and what each would cost more.

Of an op they are its other strategies, of a parameter the other ways to store it, and of a
redistribution the two ways to do without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.placement import Layout
from autoparallel.plan import Conversion, Plan
from autoparallel.planning.schedule_figures import shares_of
from autoparallel.planning.solution_to_plan import layouts_together, solution_of_plan
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.mesh_strategies import MeshStrategy
from autoparallel.strategy.parameter_storage import ParameterStorage
from autoparallel.strategy.stage_shares import WHOLE_MODEL
from planners import Factor, Problem, TooWideError, Variable, min_marginals

__all__ = ["Alternative", "Alternatives", "Without", "find_alternatives"]

Array = NDArray[np.float64]

# A pass of more work than this, in table entries read, takes longer than a second or two.
_MOST_WORK = 2.0**30


@dataclass(frozen=True, slots=True)
class Alternative:
    """An Alternative is another strategy of an op, next to all others' as they are planned.

    All seconds are weighted as those that the plan minimized: a matrix product counts
    `Plan.product_weight` times.

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


@dataclass(frozen=True, slots=True)
class Without:
    """The Without of a redistribution is what the two ways to do without it would cost more.

    made: the value is made as the redistribution would bring it. unread: nothing reads it so. Each
    is the seconds that all else planned anew adds to those of the plan, added up; infinite where no
    plan does that, NaN where it would take long to tell. Less than 0 is of a plan with a longer
    step, in which work overlaps.
    """

    made: float = math.nan
    unread: float = math.nan


@dataclass(frozen=True)
class Alternatives:
    """The Alternatives of a plan's decisions, the cheapest first.

    ops: by their names in the graph. parameters: by their names, other ways to store them, each
    with the seconds that all else planned anew adds, as in Without; what reads a parameter follows
    its storage, so that nothing can be told of all else as planned. redistributions: by value and
    target.
    """

    ops: Mapping[str, tuple[Alternative, ...]] = field(default_factory=dict)
    parameters: Mapping[str, tuple[tuple[ParameterStorage, float], ...]] = field(
        default_factory=dict
    )
    redistributions: Mapping[tuple[str, Layout], Without] = field(default_factory=dict)


def find_alternatives(plan: Plan) -> Alternatives:
    """Return the alternatives of each op, parameter and redistribution.

    All seconds are weighted as in the plan's cost: a matrix product counts `Plan.product_weight`
    times. Of a plan with stages, they are those of one micro-batch on all stages, as in its ops.
    Of an op, how its parameters are stored, and the copies that are made of what it reads and
    makes, are chosen anew; everything else is as planned. So the extra seconds are an upper bound
    of those of planning anew with that choice, which are told beside them. What is impossible next
    to the others is left out. There are none for a plan without its graph, for one in parts, and on
    one rank.

    >>> import torch, autoparallel
    >>> layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
    >>> plan = autoparallel.make_plan(layers, 2, example_inputs=torch.ones(8, 64))
    >>> "linear_product" in find_alternatives(plan).ops
    True
    """
    captured = plan.captured
    if captured is None or plan.world_size == 1:
        return Alternatives()
    options = plan.options
    graph = with_larger_hints(captured, options.tokens)
    hardware = find_hardware(options.hardware)
    shares = WHOLE_MODEL
    if plan.pipeline is not None:
        shares = shares_of(plan.pipeline.ranks, plan.pipeline.microbatches, options)
    network = build_network(
        graph, plan.mesh, hardware, options, whole_outputs=captured.part, shares=shares,
        also=layouts_together(plan, graph),
    )  # fmt: skip
    constrain(network, captured)
    try:
        chosen = solution_of_plan(network, plan)
    except PlanError:
        # Of a plan that was made next to others, or changed since, nothing is known here.
        return Alternatives()
    problem = network.problem(plan.product_weight)
    anew = _Anew(network, plan, chosen)
    search = _Search(network, problem, chosen)

    ops: dict[str, tuple[Alternative, ...]] = {}
    known: dict[tuple[str, int], tuple[Alternative, ...]] = {}
    for op in plan.ops:
        # Ops that are alike in equal blocks, and are planned alike, have equal alternatives.
        key = (captured.blocks.twin(op.name), chosen[op.name])
        if key not in known:
            known[key] = search.alternatives(op.name, anew.of(op.name))
        ops[op.name] = known[key]
    return Alternatives(
        ops,
        {parameter.name: anew.stored(parameter.name) for parameter in plan.parameters},
        {(one.value, one.target): anew.without(one) for one in plan.conversions},
    )


class _Anew:
    """An _Anew tells what each state of a variable costs more than the chosen one, all else anew.

    One pass over the network tells of all. Nothing is known where that would take long.
    """

    def __init__(self, network: CostNetwork, plan: Plan, chosen: Mapping[str, int]) -> None:
        self.network, self.chosen = network, chosen
        self.costs: Mapping[str, Array] = {}
        self.whole = 0.0  # cost of the plan itself
        limit = plan.memory_limit
        room = None if limit is None else limit - network.fixed_nbytes
        problem = network.problem(plan.product_weight, {}, room)
        asked = dict.fromkeys([op.name for op in plan.ops])
        asked |= dict.fromkeys(parameter.name for parameter in plan.parameters)
        reads = (name for conversion in plan.conversions for name in self.reading(conversion.value))
        asked |= dict.fromkeys(name for name in reads if name in problem.names)
        weighed = problem.weighed(plan.memory_price)
        self.whole = weighed.cost(chosen)
        with suppress(TooWideError):
            self.costs = min_marginals(weighed, list(asked), most_work=_MOST_WORK)

    def reading(self, value: str) -> list[str]:
        """Return the names of variables that may say in which layouts a value is read."""
        readers = [node.name for node in self.network.graph.readers[value]]
        return [f"{value}*", *readers, f"return:{value}"]

    def of(self, name: str) -> Array | None:
        """Return the extra seconds of each state of a variable, None where they are not known."""
        table = self.costs.get(name)
        return None if table is None else table - table[self.chosen[name]]

    def stored(self, name: str) -> tuple[tuple[ParameterStorage, float], ...]:
        """Return the other ways to store a parameter, the cheapest first."""
        costs = self.costs.get(name)
        if costs is None:
            return ()
        states = enumerate(zip(self.network.storages[name], costs, strict=True))
        rows = [
            (storage, float(cost) - self.whole)
            for state, (storage, cost) in states
            if state != self.chosen[name] and np.isfinite(cost)
        ]
        return tuple(sorted(rows, key=lambda row: row[1]))

    def without(self, conversion: Conversion) -> Without:
        """Return what it would cost to do without a redistribution."""
        network, value, target = self.network, conversion.value, conversion.target
        if not self.costs:
            return Without()
        edge = network.values[value]
        maker = network.graph.producers[value].name
        made = self.least(maker, [layout == target for layout in edge.produced.layouts])
        # The states of the only reader are those of the table, else of a variable between.
        names = self.reading(value)
        reads = names[:1] if edge.offers else names[1:]
        known = next((name for name in reads if name in self.costs), "")
        if not known:  # several readers decide, and no variable says it for all of them
            return Without(made)
        unread = self.least(known, [target not in group for group in edge.groups])
        return Without(made, unread)

    def least(self, name: str, allowed: Sequence[bool]) -> float:
        """Return the least of some states' extra seconds; infinity where nobody decides on it."""
        costs = self.costs.get(name)
        if costs is None:
            return math.inf
        return float(np.min(costs[np.array(allowed)], initial=math.inf)) - self.whole


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
        """Return the alternatives of one op. anew: what `_Anew` tells of its states."""
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
