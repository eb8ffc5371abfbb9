"""Planning anew with a choice forced: what the best plan with it would cost, and which it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.placement import Layout
from autoparallel.plan import Conversion, Plan
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution, solution_of_plan
from autoparallel.rewrite.emitted_program import require_graph
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.constraints import constrain
from planners import InfeasibleError, Solution, TooWideError, exact

__all__ = ["Allowed", "Forcing"]

# Per variable of the network, which of its states are allowed; all are of variables left out.
Allowed = Mapping[str, NDArray[np.bool_]]


class Forcing:
    """The cost network of a plan, to be solved again and again with other choices forced.

    plan: one that has its graph. All questions share one memo: of equal layers that a choice does
    not touch, every table is looked up. chosen: the states that make the plan.
    Raises PlanError for a plan without its graph and for a plan in parts.
    """

    def __init__(self, plan: Plan) -> None:
        if plan.breaks:
            raise PlanError(
                f"the plan for {plan.model} has {len(plan.parts)} parts, each planned by itself",
                fix="ask about one of them: explain(plan.parts[0].plan, ...)",
            )
        self.plan, self.captured = plan, require_graph(plan)
        graph = with_larger_hints(self.captured, plan.options.tokens)
        hardware = find_hardware(plan.options.hardware)
        part = self.captured.part
        self.network = build_network(graph, plan.mesh, hardware, plan.options, whole_outputs=part)
        constrain(self.network, self.captured)
        self.chosen = solution_of_plan(self.network, plan)
        limit = plan.options.memory_limit
        self.problem = self.network.problem(
            plan.product_weight, {}, None if limit is None else limit - self.network.fixed_nbytes
        )
        # The plan itself is no assignment to begin with: what is forced rules it out.
        self.solver = NetworkSolver(self.network)

    def least_costs(self, name: str) -> NDArray[np.float64] | None:
        """Return the cost of the best plan with each state of a variable, +inf where there is none.

        It takes one pass over the network for all states together. None where that is too wide, and
        where bytes are limited: then each question must be solved for itself.
        """
        if self.problem.limit is not None or self.solver.is_wide:
            return None
        try:
            return exact.min_marginals(self.problem, [name], memo=self.solver.memo)[name]
        except TooWideError:
            self.solver.is_wide = True
            return None

    def solve(self, allowed: Allowed) -> Solution | None:
        """Return the best solution in the allowed states, None where there is none."""
        masks = {}
        for name, mask in allowed.items():
            if not mask.any():
                return None
            unary = self.problem.variable(name).unary
            masks[name] = np.where(mask, unary, np.inf)
        forced = self.problem.with_unary(masks)
        try:
            solution = self.solver(forced) if forced.limit is None else self.solver.within(forced)
        except InfeasibleError:
            return None
        return solution if math.isfinite(solution.cost) else None

    def plan_of(self, solution: Solution) -> Plan:
        """Return a solution as a plan."""
        plan = self.plan
        return plan_of_solution(
            self.captured, plan.model, plan.mesh, self.network, solution, plan.product_weight
        )

    def made_as(self, conversion: Conversion) -> Allowed | None:
        """Return the states in which a value is made as a conversion would bring it.

        None for a value that nobody decides about: an input or a buffer.
        """
        producer = self.network.graph.producers[conversion.value]
        layouts: list[Layout]
        if producer.kind == "call":
            place = [value.name for value in producer.results].index(conversion.value)
            layouts = [joint.results[place] for joint in self.network.strategies[producer.name]]
        elif producer.kind == "parameter":
            layouts = [choice.storage for choice in self.network.storages[producer.name]]
        else:
            return None
        return {producer.name: _mask(layouts, lambda layout: layout == conversion.target)}

    def never_read_as(self, conversion: Conversion) -> Allowed | None:
        """Return the states in which nothing reads a value in a conversion's target.

        None where something must: a buffer is written as it is.
        """
        network, target = self.network, conversion.target
        allowed: dict[str, NDArray[np.bool_]] = {}
        for reader in network.graph.readers[conversion.value]:
            places = [i for i, name in enumerate(reader.operands()) if name == conversion.value]
            allowed[reader.name] = np.array(
                [
                    all(joint.operands[place] != target for place in places)
                    for joint in network.strategies[reader.name]
                ]
            )
        if conversion.value in network.outputs:
            allowed[f"return:{conversion.value}"] = _mask(
                network.outputs[conversion.value], lambda layout: layout != target
            )
        if any(name == conversion.value for _, name in network.graph.mutations):
            return None
        return allowed


def _mask(layouts: object, test: Callable[[Layout], bool]) -> NDArray[np.bool_]:
    """Return, per layout, whether it passes a test."""
    assert isinstance(layouts, list | tuple)
    return np.array([test(layout) for layout in layouts])
