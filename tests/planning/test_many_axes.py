"""Equal axes of a mesh are planned for in whatever order first: the bound and the plan of that."""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from broad_cases import broad
from torch import nn

import autoparallel
from autoparallel.cost.hardware import find_hardware
from autoparallel.graph.captured import Captured
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.planning import many_axes, memory_limit
from autoparallel.planning.many_axes import narrowed
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.equal_axes import arranged_layout, equal_axes
from autoparallel.strategy.step_parts import Kind, Means, StepParts
from planners import InfeasibleError, Problem, Solution, exact

MESH = Mesh(a=2, b=2, c=2)
SIZES = (2, 2, 2)


class Gated(nn.Module):
    """A gated layer of an uneven size, a norm, and a loss; one weight is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 2 * 72), nn.Linear(72, 48)
        self.norm = nn.LayerNorm(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.up(self.norm(x)).chunk(2, dim=-1)
        y = self.down(one.sigmoid() * two) + x
        return nn.functional.linear(y, self.down.weight.t()).square().mean()


class Mixed(nn.Module):
    """A look-up whose weight is tied to the last product, and attention with two heads between."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.fused = nn.Embedding(96, 32), nn.Linear(32, 96, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(2, (2, 16)).transpose(1, 2)
            for part in self.fused(self.tokens(x)).chunk(3, dim=-1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        logits = nn.functional.linear(y, self.tokens.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten())


MODELS: dict[str, tuple[Any, Any]] = {
    "gated": (Gated, torch.ones(4096, 48)),
    "mixed": (Mixed, torch.zeros(64, 16, dtype=torch.long)),
}


@lru_cache(maxsize=2)
def traced(name: str) -> Captured:
    """The model, captured."""
    make, inputs = MODELS[name]
    model = make()
    plan = autoparallel.make_plan(model, 1, example_inputs=inputs)
    assert plan.captured is not None
    return plan.captured


def options_of(machine: str, **more: Any) -> Options:
    return Options(data_parallel=True, hardware=machine, **more)


@pytest.mark.parametrize(
    ("name", "machine", "limit"),
    [*broad(("mixed", "cpu", None)), ("gated", "dgx-a100", "1GiB")],
)
def test_what_any_order_costs_is_a_bound(name: str, machine: str, limit: str | None) -> None:
    """Plain sums, with bytes charged, and sums that bound steps: none is above the real optimum."""
    graph, hardware = traced(name).graph, find_hardware(machine)
    options = options_of(machine, memory_limit=limit)
    groups = equal_axes(SIZES, hardware.links(SIZES))
    assert groups == ((0, 1, 2),)
    every = build_network(graph, MESH, hardware, options)
    some = build_network(graph, MESH, hardware, options, groups=groups, known=every)
    assert some.fixed_nbytes == every.fixed_nbytes
    real, least = every.problem(), some.problem()
    assert sum(v.size for v in least.variables) < 0.5 * sum(v.size for v in real.variables)
    usage = exact.solve(real).usage
    for charge in (0.0, 1.0, 100.0) if limit else (0.0,):
        price = charge * exact.solve(real).cost / max(usage, 1.0)
        best = exact.solve(real.weighed(price))
        bound = exact.solve(least.weighed(price))
        assert bound.cost <= best.cost * (1 + 1e-9)
        # It is no bound that anything is above.
        assert bound.cost >= 0.95 * best.cost
    parts, arranged = StepParts(every), StepParts(some)
    means = Means(0.5, 0.5, 0.5, 0.0), Means(1.0, 0.25, 0.0, 0.5)
    for mean in (np.ones(len(Kind)), *(each.weights for each in means)):
        best = exact.solve(parts.problem(real, mean))
        bound = exact.solve(arranged.problem(least, mean))
        assert bound.cost <= best.cost * (1 + 1e-9)
        assert bound.cost >= 0.8 * best.cost


@pytest.mark.parametrize(("name", "machine"), [("gated", "cpu"), ("mixed", "dgx-a100")])
def test_the_best_of_few_states_is_that_of_all(
    name: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_axes, "_FEW_AXES", 2)
    graph, hardware, options = traced(name).graph, find_hardware(machine), options_of(machine)
    few = narrowed(graph, MESH, hardware, options, None, False)
    assert few is not None
    best = exact.solve(few.network.problem())
    real = exact.solve(build_network(graph, MESH, hardware, options).problem())
    assert few.bound <= real.cost * (1 + 1e-9)
    assert best.cost <= real.cost * 1.01
    assert real.cost <= best.cost * (1 + 1e-9)


@pytest.mark.parametrize("limit", [*broad(None), "1GiB"])
def test_where_the_best_states_do_not_go_together_all_are_planned_for(
    limit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That they do in no order says nothing of the others."""

    class Solver(NetworkSolver):
        def __call__(self, problem: Problem) -> Solution:
            if self.network.only is not None:
                raise InfeasibleError(problem.names[:2])
            return super().__call__(problem)

    monkeypatch.setattr(many_axes, "_FEW_AXES", 2)
    monkeypatch.setattr(many_axes, "NetworkSolver", Solver)
    monkeypatch.setattr(memory_limit, "NetworkSolver", Solver)
    model, x = MODELS["gated"]
    plan = autoparallel.make_plan(
        model(), mesh=MESH, example_inputs=x, hardware="dgx-a100", memory_limit=limit
    )
    assert 0 < plan.lower_bound <= plan.cost
    assert "whatever order" not in plan.method


def test_states_in_any_order_cost_the_same() -> None:
    graph, hardware = traced("gated").graph, find_hardware("cpu")
    network = build_network(graph, MESH, hardware, options_of("cpu"))
    groups = equal_axes(SIZES, hardware.links(SIZES))
    for name, joints in network.strategies.items():
        seconds: dict[Any, float] = {}
        for joint, cost in zip(joints, network.costs[name], strict=True):
            key = tuple(sorted(map(str, joint.parts)))
            assert seconds.setdefault(key, cost.seconds) == pytest.approx(cost.seconds, rel=1e-12)
            for layout in joint.results:
                orders = {arranged_layout(order, groups) for order in permutations(layout)}
                assert len(orders) == 1


@pytest.mark.parametrize("limit", [None, *broad(0.8)])
def test_on_four_axes_the_module_computes_the_same(limit: float | None) -> None:
    """A step on 16 ranks, with a limit below what the best plan without one takes, and without."""
    torch.manual_seed(0)
    model, x = Gated().double(), torch.randn(64, 48, dtype=torch.float64)
    mesh = Mesh(a=2, b=2, c=2, d=2)
    loose = None if limit is None else "1GiB"
    plan = autoparallel.make_plan(model, mesh=mesh, example_inputs=x, memory_limit=loose)
    assert "whatever order" in plan.method
    assert 0 < plan.lower_bound <= plan.cost <= 1.1 * plan.lower_bound
    assert 0 < plan.step_bound <= plan.step
    # Few states are there, and yet nothing is said to be impossible that is not.
    assert not any("can be split here" in op.reason for op in plan.ops)
    if limit is not None:
        free, nbytes = plan, int(limit * sum(size for _, size in plan.memory))
        plan = autoparallel.make_plan(model, mesh=mesh, example_inputs=x, memory_limit=nbytes)
        assert sum(size for _, size in plan.memory) <= nbytes
        assert free.lower_bound <= plan.lower_bound * (1 + 1e-9) <= plan.cost * (1 + 2e-9)
    made = autoparallel.simulate(model, plan=plan, example_inputs=x)
    loss = model(x)
    loss.backward()
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-12, atol=1e-12)
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(made.gradients[path], parameter.grad, rtol=1e-10, atol=1e-12)
    assert made.apart == 0
