"""What rules plans out before their memory is counted is never more than that."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from broad_cases import broad

import autoparallel
from autoparallel import Mesh, Plan
from autoparallel.analysis.memory import memory_of
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.options import Options
from autoparallel.planning.least_bytes import LeastBytes
from autoparallel.planning.memory_limit import unlimited
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.planning.whole_trace import trace_whole
from autoparallel.strategy.build_network import build_network, rebuilt
from autoparallel.strategy.layout_families import LayoutFamilies
from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig
from planners import InfeasibleError, Solution, exact

pytestmark = pytest.mark.usefixtures("one_trace")
MODELS = {
    "gpt": lambda: GPT(GPTConfig(2, 64, 4, 256, 64)),
    "bert": lambda: Bert(BertConfig(layers=1, hidden=64, heads=4, vocabulary=256)),
}


@lru_cache
def model_of(name: str) -> tuple[torch.nn.Module, Any]:
    with torch.device("meta"):
        model = MODELS[name]()
    return model, model.example_inputs(batch=8)


@lru_cache
def traced(name: str) -> Captured:
    model, inputs = model_of(name)
    plan = autoparallel.make_plan(model, 1, example_inputs=inputs)
    assert plan.captured is not None
    return plan.captured


@pytest.mark.parametrize(
    ("name", "optimizer", "recompute"),
    [
        ("gpt", "adam", "auto"),
        *broad(("gpt", "sgd", "full"), ("bert", "mixed_adam", "none")),
        ("gpt", "sgd", "selective"),
    ],
)
def test_no_plan_takes_less(name: str, optimizer: str, recompute: str) -> None:
    """Of any family: of its plan, and of all in it."""
    captured, mesh = traced(name), Mesh(dp=2, tp=2)
    limited = Options(
        data_parallel=True, memory_limit=2**30, recompute=recompute, optimizer=optimizer, tokens=1
    )
    free = build_network(captured.graph, mesh, find_hardware("dgx-a100"), unlimited(limited))
    least = LeastBytes(free, rebuilt(free, limited))
    parameters, families, problem = LeastBytes(free), LayoutFamilies(free), free.problem()
    shares = []
    for family in families.families():
        states = families.states(family)
        try:
            solution = exact.solve(problem.among(states))
        except InfeasibleError:
            continue
        of_all = Solution.of(problem, solution.assignment, "", 0.0)
        plan = plan_of_solution(captured, "", mesh, free, of_all, 1.0)
        total = memory_of(plan, graph=free.graph).total
        counted = least.of(solution.assignment)
        assert least.among(states) <= counted <= total, family
        assert parameters.of(solution.assignment) <= counted + abs(least.fixed_nbytes)
        shares.append(counted / total)
    # It would be no use if it were little.
    assert max(shares) > 0.6


@pytest.mark.parametrize("name", [*broad("gpt2"), "mixtral"])
def test_no_plan_takes_less_than_its_states_say(name: str) -> None:
    """Limits are laid on what the tables count: that nothing fits would else be said in vain.

    Weights of experts are transposed before they are read: their gradients are the parameters'.
    """
    mesh, rng = Mesh(dp=2, tp=2), np.random.default_rng(0)
    limited = Options(data_parallel=True, memory_limit=2**34, recompute="none", tokens=1)
    captured = trace_whole(zoo.build(name, 1), (), zoo.inputs_for(name))
    hardware = find_hardware("dgx-a100")
    network = build_network(captured.graph, mesh, hardware, limited)
    problem, shares = network.problem(), []
    for scale in (1e-5, 1e-3, 1e-1):
        costs = {
            variable.name: variable.unary + scale * rng.random(variable.size)
            for variable in problem.variables
        }
        chosen = exact.solve(problem.weighed(0.0).with_unary(costs)).assignment
        solution = Solution.of(problem, chosen, "", 0.0)
        plan = plan_of_solution(captured, "", mesh, network, solution, 1.0)
        total = memory_of(plan, graph=network.graph).total
        shares.append((solution.usage + network.fixed_nbytes) / total)
    assert max(shares) <= 1.0
    assert max(shares) > 0.8


def need(plan: Plan) -> int:
    return sum(size for _, size in plan.memory)


@pytest.mark.broad
def test_the_best_of_all_meshes_within_a_limit() -> None:
    """Meshes that are left because of their bounds have nothing better."""
    model, inputs = model_of("gpt")
    options: dict[str, Any] = {"example_inputs": inputs, "hardware": "dgx-a100"}
    free = autoparallel.make_plan(model, mesh=Mesh(dp=2, tp=2), **options)
    options["memory_limit"] = int(0.9 * need(free))
    chosen = autoparallel.make_plan(model, 4, mesh="auto", **options)
    assert need(chosen) <= options["memory_limit"]
    steps = {}
    for mesh in (Mesh(dp=4), Mesh(dp=2, tp=2), Mesh(tp=4)):
        try:
            steps[mesh] = autoparallel.make_plan(model, mesh=mesh, **options).step_seconds
        except PlanError:
            continue
    assert chosen.step_seconds == pytest.approx(min(steps.values()))


def test_a_limit_that_is_none_changes_nothing() -> None:
    """The plan that fits without one is the plan."""
    model, inputs = model_of("gpt")
    options: dict[str, Any] = {"example_inputs": inputs, "mesh": Mesh(dp=2, tp=2)}
    plan = autoparallel.make_plan(model, memory_limit="1GiB", **options)
    same = autoparallel.make_plan(model, memory_limit=need(plan), **options)
    assert same.parameters == plan.parameters
    assert same.step_seconds == plan.step_seconds
    assert (same.cost, same.lower_bound) == (plan.cost, plan.lower_bound)
    assert plan.recompute == ()
    assert not any(conversion.again for conversion in plan.conversions)
