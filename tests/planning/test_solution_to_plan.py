"""A plan costs what the planner says: priced again by code that shares nothing with its tables.

Not the best plans alone: whatever a network can say is read as a plan and priced.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from any_plans import any_plans, network_of
from families import build, inputs_for
from own_prices import price
from torch import nn

import autoparallel
from autoparallel.analysis.abstract_execution import AbstractExecution
from autoparallel.analysis.liveness import Liveness
from autoparallel.analysis.memory import memory_of
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.planning import counted_bytes
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.train.models import GPT, GPTConfig
from planners import Solution, exact

broad = pytest.mark.broad
AUTO = {"memory_limit": 10**12, "recompute": "auto"}
MIXED = {"memory_limit": 10**12, "optimizer": "mixed_adam"}


class Convolutions(nn.Module):
    """Images in, a loss out; running statistics are written back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3)
        )
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """x: (b, 3, 8, 8). labels: (b,) below 8."""
        return nn.functional.cross_entropy(self.head(self.body(x).mean((2, 3))), labels)


def sample(name: str, layers: int) -> tuple[nn.Module, dict[str, Any]]:
    """A model and its inputs; "gpt16" in 16 bits."""
    if name == "convolutions":
        return Convolutions(), {"x": torch.zeros(8, 3, 8, 8), "labels": torch.zeros(8).long()}
    if name == "gpt16":
        return build("gpt", layers).bfloat16(), inputs_for("gpt", batch=8, sequence=16)
    return build(name, layers), inputs_for(name, batch=8, sequence=16)


@pytest.mark.parametrize(
    ("name", "mesh", "options"),
    [
        ("gpt", {"dp": 2, "tp": 2}, AUTO),
        ("gpt16", {"dp": 2, "tp": 4}, MIXED),
        ("convolutions", {"tp": 4}, {}),
        pytest.param("gpt", {"tp": 4}, AUTO, marks=broad),
        pytest.param("gpt", {"dp": 2, "tp": 4}, {"recompute": "full"}, marks=broad),
        pytest.param("mlp", {"dp": 2, "tp": 2, "cp": 2}, MIXED, marks=broad),
        pytest.param("bert", {"dp": 2, "tp": 2}, {**AUTO, "hardware": "dgx-a100"}, marks=broad),
        pytest.param("hf-llama", {"dp": 2, "tp": 2}, MIXED, marks=broad),
        pytest.param("hf-gpt2", {"dp": 2, "tp": 3}, AUTO, marks=broad),
        pytest.param("convolutions", {"dp": 2, "tp": 4}, MIXED, marks=broad),
    ],
    ids=str,
)
def test_any_plan_costs_what_the_network_says(
    name: str, mesh: dict[str, int], options: dict[str, Any]
) -> None:
    """States of parameters split and gathered, copies made again, ops run again, many moves.

    A GPT's bytes are those of the account when the backward pass begins, but for what a plan makes
    a copy of where the model has a view. Drawn plans of other models convert in more such places.
    """
    layers = 2 if "recompute" in options else 1
    captured, network = network_of(*sample(name, layers), Mesh(**mesh), **options)
    spread = again = repeated = 0
    for plan, solution in any_plans(captured, network, range(5)):
        assert price(plan).seconds == pytest.approx(solution.cost, rel=1e-9)
        assert plan.seconds == pytest.approx(solution.cost, rel=1e-9)
        spread += sum(p.state != p.storage for p in plan.parameters)
        again += sum(conversion.again for conversion in plan.conversions)
        repeated += len(plan.recomputed)
        if plan.memory_limit is not None and name.startswith("gpt"):
            assert solution.usage == pytest.approx(as_it_begins(network, plan), rel=0.2)
    assert spread
    if "memory_limit" in options and name != "mlp":
        assert again
    assert bool(repeated) == ("recompute" in options)


def as_it_begins(network: CostNetwork, plan: Plan) -> int:
    """Bytes of a plan, but for inputs and buffers, where the network counts them: as its backward
    pass begins."""
    walk = AbstractExecution(network.graph, plan, plan.recomputed, remade=plan.remade)
    (at,) = (i for i, moment in enumerate(walk.moments) if moment.node == network.moment.call)
    taken = memory_of(plan)
    stays = taken.parameters + taken.gradients + taken.optimizer_state
    return stays + int(Liveness(walk).backward[at])


@pytest.mark.parametrize(
    "recompute",
    ["none", pytest.param("selective", marks=broad), pytest.param("full", marks=broad)],
)
def test_the_bytes_of_the_best_plans(recompute: str) -> None:
    """What is returned, what the loss keeps, its gradients, and what goes into ops that are run
    again, views too. To the byte, but for token ids that are cut out again for the backward pass.
    """
    model = GPT(GPTConfig(2, 64, 8, 211, positions=16, dropout=0.1)).bfloat16()
    captured, network = network_of(
        model,
        model.example_inputs(8),
        Mesh(dp=2, tp=2),
        recompute=recompute,
        memory_limit=10**12,
        tokens=1,
    )
    assert network.moment.call == "cross_entropy_loss"
    problem = network.problem()
    for charge in (0.0, 1e-9, 1e-7):
        found = exact.solve(problem.weighed(charge))
        solution = Solution.of(problem, found.assignment, "weighed", multiplier=charge)
        plan = plan_of_solution(captured, "best", network.mesh, network, solution, 1.0)
        assert bool(plan.recomputed) == (recompute != "none")
        assert solution.usage == pytest.approx(as_it_begins(network, plan), rel=5e-3)


def test_a_bound_is_that_of_the_limit_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """What attention takes for a moment does not fit: the limit is lowered, and its bound stays,
    where no other moment is counted.
    """
    monkeypatch.setattr(counted_bytes, "_MOST_MOMENTS", 0)
    model = GPT(GPTConfig(1, 64, 8, 211, positions=1024, dropout=0.1)).bfloat16()
    inputs, mesh, limit = model.example_inputs(8), Mesh(dp=2, tp=2), 150 * 2**20
    _, network = network_of(model, inputs, mesh, memory_limit=limit, recompute="auto")
    first = NetworkSolver(network).within(network.problem(1.0, {}, limit - network.fixed_nbytes))
    plan = autoparallel.make_plan(model, mesh=mesh, example_inputs=inputs, memory_limit=limit)
    assert sum(size for _, size in plan.memory) <= limit
    assert plan.lower_bound <= first.cost < plan.cost


@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt", marks=broad)])
def test_the_best_plans_too(name: str) -> None:
    """As `make_plan` returns them, in a limit and without one; and from their JSON."""
    model, inputs = sample(name, 2)
    mesh = Mesh(dp=2, tp=2)
    free = autoparallel.make_plan(model, mesh=mesh, example_inputs=inputs)
    least = autoparallel.make_plan(
        model, mesh=mesh, example_inputs=inputs, memory_limit="1GiB", optimizer="mixed_adam"
    )
    for plan in (free, least):
        assert price(plan).seconds == pytest.approx(plan.cost, rel=1e-9)
        assert plan.lower_bound <= plan.cost * (1 + 1e-12)
        assert autoparallel.Plan.from_json(plan.to_json()) == plan
