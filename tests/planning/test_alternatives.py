"""Alternatives next to a plan: what they cost is no less than planning anew with them, and exact
where nothing else would change.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

import autoparallel
from autoparallel.cost.hardware import find_hardware
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.plan import Plan
from autoparallel.planning.alternatives import Alternatives, find_alternatives
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import solution_of_plan
from autoparallel.questions.forcing import Forcing
from autoparallel.strategy.build_network import build_network
from autoparallel.train.models import GPT, GPTConfig
from planners import least_among


@cache
def plan_of(layers: int, data_parallel: bool, weight: float = 1.0, overlap: bool = True) -> Plan:
    config = GPTConfig(layers, hidden=48, heads=4, vocabulary=210, positions=32, dropout=0.0)
    tokens = torch.zeros(4, 10, dtype=torch.long)
    return autoparallel.make_plan(
        GPT(config),
        2,
        example_inputs=(tokens, tokens),
        data_parallel=data_parallel,
        product_weight=weight,
        overlap=overlap,
    )


@pytest.mark.parametrize(("data_parallel", "weight"), [(False, 1.0), (True, 1.0), (False, 1024.0)])
def test_they_cost_no_less_than_planning_anew(data_parallel: bool, weight: float) -> None:
    """Everything else chosen anew can only be cheaper, and never cheaper than the optimum.

    Where products count more than their seconds, all costs are weighted so. Collectives are waited
    for: the plan is the one of the least sum, which some alternatives change in one op alone.
    """
    plan = plan_of(1, data_parallel, weight, overlap=False)
    assert plan.captured is not None
    graph = with_larger_hints(plan.captured, plan.options.tokens)
    hardware = find_hardware(plan.options.hardware)
    network = build_network(graph, plan.mesh, hardware, plan.options)
    problem = network.problem(weight)
    solve = NetworkSolver(network)
    best = solve(problem)
    chosen = solution_of_plan(network, plan)
    found = find_alternatives(plan)
    compared = exact = 0
    for name, alternatives in found.ops.items():
        for alternative in alternatives:
            at = network.strategies[name].index(alternative.strategy)
            forced = least_among(problem, {name: [at]}, memo=solve.memo)[name]
            slack, told = 1e-9 * best.cost, plan.cost + alternative.seconds
            kept = least_among(problem, {name: [chosen[name]]}, memo=solve.memo)[name]
            assert alternative.anew == pytest.approx(forced - kept, abs=slack)
            assert best.cost - slack <= forced <= told + slack
            compared += 1
            exact += told - forced <= slack
        assert len(network.strategies[name]) > len(alternatives)
    assert compared > 50
    assert exact
    for name, stored in found.parameters.items():
        for storage, anew in stored:
            at = network.storages[name].index(storage)
            forced = least_among(problem, {name: [at]}, memo=solve.memo)[name]
            assert anew == pytest.approx(forced - problem.cost(chosen), abs=1e-9 * best.cost)
    assert any(found.parameters.values())


@pytest.mark.parametrize("data_parallel", [False, True])
def test_doing_without_a_redistribution_costs_what_forbidding_it_does(data_parallel: bool) -> None:
    """In both ways: as the value is made, and as it is read. Each is solved for itself."""
    plan = plan_of(1, data_parallel)
    found = find_alternatives(plan).redistributions
    assert {(one.value, one.target) for one in plan.conversions} == {*found}
    forcing = Forcing(plan)
    compared = 0
    for conversion in plan.conversions:
        without = found[conversion.value, conversion.target]
        ways = (forcing.made_as(conversion), forcing.never_read_as(conversion))
        for told, allowed in zip((without.made, without.unread), ways, strict=True):
            solution = None if allowed is None else forcing.solve(allowed)
            wanted = math.inf if solution is None else solution.cost - forcing.own_cost
            assert told == pytest.approx(wanted, abs=1e-9 * plan.cost), conversion
            compared += math.isfinite(told)
    assert compared > len(plan.conversions)


class Gated(torch.nn.Module):
    """Two products read an input, for nothing: no variable says how both of them do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.up(x) * self.gate(x)).square().mean()


def test_of_what_two_ops_read_for_nothing_no_cost_is_claimed() -> None:
    """Each of them has as many states as there are sets of layouts that both may read."""
    x = torch.ones(8, 12)
    plan = autoparallel.make_plan(
        Gated(), 2, example_inputs=x, data_parallel=True, hardware="dgx-a100"
    )
    forcing = Forcing(plan)
    (conversion,) = (one for one in plan.conversions if len(one.readers) == 2)
    network = forcing.network
    states = {len(network.strategies[name]) for name in conversion.readers}
    assert states == {len(network.values[conversion.value].groups)}
    without = find_alternatives(plan).redistributions[conversion.value, conversion.target]
    assert math.isnan(without.unread)
    # That costs something, but not what one of the two would add by itself.
    allowed = forcing.never_read_as(conversion)
    assert allowed is not None
    assert forcing.solve(allowed) is not None


def test_equal_blocks_have_equal_alternatives() -> None:
    """They are found for the first one."""
    plan = plan_of(2, False)
    assert plan.captured is not None
    found = find_alternatives(plan).ops
    twins = [name for name in found if plan.captured.blocks.twin(name) != name]
    assert twins
    for name in twins:
        costs = [
            [one.seconds for one in found[op]] for op in (name, plan.captured.blocks.twin(name))
        ]
        assert costs[0] == pytest.approx(costs[1])


def test_there_are_none_where_nothing_is_known() -> None:
    """One rank has no choice, and a plan that was read has no graph."""
    layer, inputs = torch.nn.Linear(4, 4), torch.ones(2, 4)
    alone = autoparallel.make_plan(layer, 1, example_inputs=inputs)
    assert find_alternatives(alone) == Alternatives()
    plan = autoparallel.make_plan(layer, 2, example_inputs=inputs)
    assert find_alternatives(plan) != Alternatives()
    assert find_alternatives(Plan.from_json(plan.to_json())) == Alternatives()
