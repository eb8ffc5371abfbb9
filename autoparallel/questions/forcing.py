"""Planning anew with a choice forced: what the best plan with it would cost, and which it is.

Without a memory limit that is one more optimum of the same network. Within a limit, finding it is a
search as long as that for the plan. But that search has ended at a price of a byte, at which memory
costs what it saves elsewhere: with all bytes charged at it, the network is an ordinary one again,
and one pass over it tells what all choices cost. So it is for networks that are too wide, a few
decisions of which are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.memory import memory_of
from autoparallel.analysis.stage_memory import memory_of_pipeline
from autoparallel.analysis.timeline import step_and_waits
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.placement import Layout
from autoparallel.plan import Conversion, Plan
from autoparallel.planning.closest_plan import MOST_ATTEMPTS
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.schedule_figures import shares_of
from autoparallel.planning.solution_to_plan import (
    layouts_together,
    plan_of_solution,
    solution_of_plan,
)
from autoparallel.planning.stage_cuts import cut_into_stages
from autoparallel.rewrite.emitted_program import require_graph
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.stage_shares import WHOLE_MODEL
from planners import (
    InfeasibleError,
    OverLimitError,
    Problem,
    Solution,
    TooWideError,
    exact,
)
from planners.state_costs import Range, StateCosts

__all__ = ["Allowed", "Forcing"]

# Per variable of the network, which of its states are allowed; all are of variables left out.
Allowed = Mapping[str, NDArray[np.bool_]]

# A pass of more work than this, in table entries read, takes longer than some seconds.
_MOST_WORK = 2.0**32


class Forcing:
    """The cost network of a plan, to be solved again and again with other choices forced.

    plan: one that has its graph; of one with stages, that of one micro-batch on all stages, which
    is what is chosen together. All questions share one memo: of equal layers that a choice does
    not touch, every table is looked up. chosen: the states that make the plan.
    Raises PlanError for a plan without its graph and for a plan in parts.
    """

    def __init__(self, plan: Plan) -> None:
        if plan.breaks:
            raise PlanError(
                f"the plan for {plan.model} has {len(plan.parts)} parts, each planned by itself",
                fix="ask about one of them: explain(plan.parts[0].plan, ...)",
            )
        self.captured, self.pipeline = require_graph(plan), plan.pipeline
        graph = with_larger_hints(self.captured, plan.options.tokens)
        hardware = find_hardware(plan.options.hardware)
        part = self.captured.part
        shares = WHOLE_MODEL
        if plan.pipeline is not None:
            shares = shares_of(plan.pipeline.ranks, plan.pipeline.microbatches, plan.options)
        self.network = build_network(
            graph, plan.mesh, hardware, plan.options, whole_outputs=part, shares=shares,
            also=layouts_together(plan, graph),
        )  # fmt: skip
        constrain(self.network, self.captured)
        self.chosen = solution_of_plan(self.network, plan)
        limit = plan.options.memory_limit
        # The tables of a pipeline count all stages, for one micro-batch of those in flight.
        self.scale = shares.ranks / shares.in_flight
        self.problem = self.network.problem(
            plan.product_weight,
            {},
            None if limit is None else (limit - self.network.fixed_nbytes) * self.scale,
        )
        self.plan = plan if plan.pipeline is None else self._of_one_microbatch(plan)
        # The plan itself is no assignment to begin with: what is forced rules it out.
        self.solver = NetworkSolver(self.network)
        self.priced = self.problem.weighed(self.price)
        memo = self.solver.memo
        self.costs = StateCosts(self.priced, self.chosen, memo=memo, most_work=_MOST_WORK)
        self.ranges: dict[str, Range] = {}
        self.is_too_wide = False

    @property
    def price(self) -> float:
        """The seconds that a byte is charged."""
        return self.plan.memory_price

    @property
    def own_cost(self) -> float:
        """The cost of the plan itself, bytes charged, with which others' costs are compared."""
        return self.priced.cost(self.chosen) if self.price else self.plan.cost

    def state_costs(self, name: str) -> Range | None:
        """Return what the best plan with each state of a variable costs, bytes charged.

        It takes one pass over the network for all states together. None where no few decisions
        make the network narrow: then each question must be solved for itself.
        """
        if name not in self.ranges and not self.is_too_wide:
            try:
                self.ranges |= self.costs.of([name])
            except TooWideError:
                self.is_too_wide = True
        return self.ranges.get(name)

    def proven(self, allowed: Allowed) -> float:
        """Return a lower bound on the cost of all plans in the allowed states, and in the limit."""
        bounds = [-math.inf]
        for name, mask in allowed.items():
            costs = self.state_costs(name)
            if costs is not None:
                bounds.append(float(np.min(costs.least[mask], initial=math.inf)))
        return max(bounds) - self.price * (self.problem.limit or 0.0)

    def solve(self, allowed: Allowed, search: bool = False) -> Solution | None:
        """Return the best solution in the allowed states, None where there is none.

        search: look for the best one whose plan is within the memory limit, or of a network that is
        wide, however long it takes. Otherwise bytes are charged in place of the limit, and the
        decisions that make a network wide are held.
        """
        masks = {}
        for name, mask in allowed.items():
            if not mask.any():
                return None
            masks[name] = np.where(mask, self.problem.variable(name).unary, np.inf)
        forced = self.problem.with_unary(masks)
        try:
            if search and self.problem.limit is not None:
                solution = self._within(forced)
            elif search or self.is_too_wide:
                solution = self._at_price(forced, self.solver)
            else:
                solution = self._beside_held(forced, allowed)
        except InfeasibleError:
            return None
        return solution if math.isfinite(solution.cost) else None

    def excess(self, plan: Plan) -> int:
        """Return the bytes of a rank that a plan of this network takes beyond the memory limit."""
        limit = self.plan.memory_limit
        if limit is None:
            return 0
        if self.pipeline is not None:
            accounts = memory_of_pipeline(self.in_stages(plan), self.network.graph)
            return max(max(account.total for account in accounts) - limit, 0)
        return max(memory_of(plan, graph=self.network.graph).total - limit, 0)

    def _within(self, forced: Problem) -> Solution:
        """Return the best solution whose whole plan is within the memory limit; where none is
        found, the one that takes least.

        The tables count what is saved, as in planning: where the rest of a plan is too much, the
        limit is lowered by that and it is planned again. The bound is of the limit as it was given.
        """
        bound, least, problem = -math.inf, math.inf, forced
        nearest: Solution | None = None
        for _ in range(MOST_ATTEMPTS):
            try:
                solution = self.solver.within(problem)
            except OverLimitError as error:
                if nearest is None and not forced.fits(error.least):
                    raise
                break
            if nearest is None:
                bound = solution.lower_bound
            over = self.excess(self.plan_of(solution))
            if over < least:
                nearest, least = replace(solution, lower_bound=min(bound, solution.cost)), over
            if not over:
                break
            assert problem.limit is not None
            lower = min(problem.limit, solution.usage) - over * self.scale
            problem = replace(forced, limit=lower)
        return self._at_price(forced, self.solver) if nearest is None else nearest

    def _at_price(self, forced: Problem, solver: Callable[[Problem], Solution]) -> Solution:
        """Return a solution with bytes charged; its lower bound is one on its cost alone."""
        plain = solver(forced.weighed(self.price))
        charge = self.price * (self.problem.limit or 0.0)
        bound = plain.lower_bound - charge
        return Solution.of(forced, plain.assignment, plain.method, bound, self.price)

    def _beside_held(self, forced: Problem, allowed: Allowed) -> Solution:
        """Return a solution with bytes charged, and with the decisions held that make it wide."""
        for name in allowed:
            self.state_costs(name)
        held = {n: self.chosen[n] for n in self.costs.held if n not in allowed}
        if not held:
            return self._at_price(forced, self.solver)

        def narrow(problem: Problem) -> Solution:
            """Solve what is left."""
            return exact.solve(problem.pinned(held), memo=self.solver.memo)

        try:
            solution = self._at_price(forced, narrow)
        except (InfeasibleError, TooWideError):
            return self._at_price(forced, self.solver)
        return replace(solution, lower_bound=min(self.proven(allowed), solution.cost))

    def step_of(self, plan: Plan) -> float:
        """Return the predicted seconds of a step with a plan of this network."""
        if self.pipeline is not None:
            return self.in_stages(plan).step
        return step_and_waits(plan, self.network.hardware)[0]

    def in_stages(self, plan: Plan) -> Plan:
        """Return a plan of one micro-batch, cut anew into as many stages as the one asked about."""
        assert self.pipeline is not None
        network, count = self.network, self.pipeline.microbatches
        return cut_into_stages(network.graph, plan, network.shares, count)

    def _of_one_microbatch(self, plan: Plan) -> Plan:
        """Return a plan with stages as that of one micro-batch on all of them."""
        # Which copies are made again is a choice of the plan that its states do not tell.
        rows = sum(op.seconds for op in plan.ops) + sum(row.seconds for row in plan.conversions)
        updates = (table.cost[self.chosen[name]] for name, table in self.network.updates.items())
        return replace(plan, pipeline=None, seconds=rows + float(sum(updates)))

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
