"""The plan is the optimum, by two other solvers, and costs what the solver says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, inputs_for
from torch import nn

import autoparallel
from autoparallel.cost.hardware import find_hardware
from autoparallel.options import Options
from autoparallel.placement import layout_text
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.cost_network import CostNetwork
from planners import exact, exhaustive, ilp


def network_of(model: nn.Module, inputs: Any, world_size: int, **options: Any) -> CostNetwork:
    """The cost network of a model's plan."""
    plan = autoparallel.make_plan(model, world_size, example_inputs=inputs, **options)
    assert plan.captured is not None
    mesh = autoparallel.Mesh(tp=world_size)
    return build_network(plan.captured.graph, mesh, find_hardware("cpu"), Options(**options))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_equals_the_integer_program_on_two_layers_of_gpt(sequence_parallel: bool) -> None:
    """HiGHS finds no cheaper plan, and its bound proves that there is none."""
    network = network_of(build("gpt"), inputs_for("gpt"), 2, sequence_parallel=sequence_parallel)
    problem = network.problem()
    own, other = exact.solve(problem), ilp.solve(problem)
    assert own.cost == pytest.approx(other.cost, rel=1e-7)
    assert other.lower_bound <= own.cost * (1 + 1e-9)


class Tiny(nn.Module):
    """A few ops, so that all plans can be tried."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, 2 * features, bias=False)
        self.second = nn.Linear(2 * features, features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("features", [16, 12])
def test_equals_trying_everything(features: int, world_size: int, sequence_parallel: bool) -> None:
    """Every combination of strategies and storages of a two-layer perceptron."""
    network = network_of(
        Tiny(features), torch.zeros(6, features), world_size, sequence_parallel=sequence_parallel
    )
    for weight in (1.0, 64.0):
        problem = network.problem(weight)
        assert exact.solve(problem).cost == pytest.approx(exhaustive.solve(problem).cost)


def test_predicted_seconds_add_up() -> None:
    """With sequence parallelism the objective is the predicted time, priced again from the plan."""
    plan = autoparallel.make_plan(build("gpt"), 4, example_inputs=inputs_for("gpt"))
    assert plan.product_weight == 1.0
    assert plan.seconds == pytest.approx(plan.cost)
    parts = sum(op.seconds for op in plan.ops) + sum(c.seconds for c in plan.conversions)
    assert parts < plan.seconds


def test_a_column_and_a_row() -> None:
    """The MLP of the paper: one all-reduce forward, one backward, none in between."""
    x = torch.zeros(64, 256, requires_grad=True)
    plan = autoparallel.make_plan(Tiny(256), 4, example_inputs=x, sequence_parallel=False)
    assert [layout_text(parameter.storage) for parameter in plan.parameters] == ["S(0)", "S(1)"]
    moves = [(layout_text(c.source), layout_text(c.target)) for c in plan.conversions]
    assert moves == [("I", "R"), ("P", "I")]


def test_pins_are_kept() -> None:
    """The rest of the plan follows what is given, at no less than the free cost."""
    inputs = inputs_for("gpt")
    free = autoparallel.make_plan(build("gpt"), 2, example_inputs=inputs)
    path = "blocks.0.feed_forward.expand.weight"
    pinned = autoparallel.make_plan(
        build("gpt"),
        2,
        example_inputs=inputs,
        pins={path: autoparallel.Invariant()},
        product_weight=free.product_weight,
    )
    assert pinned.storage[path] == (autoparallel.Invariant(),)
    assert pinned.cost > free.cost
