"""The plan that is returned has the shortest step of all that experts use, and a bound holds."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from broad_cases import broad
from torch import nn

import autoparallel
from autoparallel import Mesh, Plan
from autoparallel.analysis.timeline import step_and_waits
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.options import Options
from autoparallel.placement import Replicate, Shard
from autoparallel.planning.predicted_step import repriced
from autoparallel.planning.search import search
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.planning.step_search import step_weights
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.layout_families import families, states_of_family
from autoparallel.strategy.step_parts import Kind, StepParts, least_step
from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig
from autoparallel.view.report import plan_text
from planners import InfeasibleError, Solution, exact

TWO_AXES = Mesh(dp=2, tp=4)


class Gated(nn.Module):
    """A gated feed-forward layer behind a norm, as in Llama, with a loss."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return (x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))).square().mean()


def gpt(layers: int, hidden: int, positions: int = 512, vocabulary: int = 8192) -> nn.Module:
    return GPT(GPTConfig(layers, hidden, hidden // 64, vocabulary, positions))


def vision(width: int = 256) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 1000),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def bert() -> nn.Module:
    return Bert(BertConfig(layers=2, hidden=512, heads=8))


def tokens(model: nn.Module, batch: int = 8) -> Any:
    return model.example_inputs(batch=batch)  # type: ignore[operator]


# Ten models: how each is made, and its inputs.
MODELS: dict[str, tuple[Any, Any]] = {
    "gpt small": (lambda: gpt(2, 256, 64, 512), tokens),
    "gpt": (lambda: gpt(4, 1024), tokens),
    "gpt wide": (lambda: gpt(2, 4096, 1024), tokens),
    "gpt long": (lambda: gpt(2, 1024, 4096), lambda model: tokens(model, 2)),
    "gpt vocabulary": (lambda: gpt(1, 1024, 512, 100_000), tokens),
    "bert": (bert, tokens),
    "gated": (Gated, lambda _: torch.zeros(8, 128, 512)),
    "gated wide": (lambda: Gated(8192), lambda _: torch.zeros(8, 2048, 8192)),
    "vision": (vision, lambda _: torch.zeros(64, 3, 32, 32)),
    "encoder": (encoder, lambda _: torch.zeros(16, 128, 256)),
}
MESHES = (Mesh(tp=8), Mesh(dp=2, tp=4), Mesh(dp=4, tp=2), Mesh(dp=8, tp=8))
MACHINES = ("dgx-a100", "dgx-h100")


@lru_cache(maxsize=1)
def traced(name: str) -> Captured:
    """The model, captured on the meta device."""
    make, inputs_of = MODELS[name]
    with torch.device("meta"):
        model = make()
        inputs = inputs_of(model)
    plan = autoparallel.make_plan(model, 1, example_inputs=inputs)
    assert plan.captured is not None
    return plan.captured


def problem_of(name: str, mesh: Mesh, machine: str) -> tuple[Captured, CostNetwork]:
    captured, options = traced(name), Options(data_parallel=True, hardware=machine)
    graph = with_larger_hints(captured, options.tokens)
    return captured, build_network(graph, mesh, find_hardware(machine), options)


def seeds(captured: Captured, network: CostNetwork) -> dict[str, tuple[Plan, Solution]]:
    """The least sum of every family, as somebody finds it who asks for that layout."""
    problem = network.problem()
    found = {}
    for family in families(network):
        try:
            solution = exact.solve(problem.among(states_of_family(network, family)))
        except InfeasibleError:
            continue
        of_all = Solution.of(problem, solution.assignment, "seed", 0.0)
        plan = plan_of_solution(captured, "seed", network.mesh, network, of_all, 1.0)
        found[str(family)] = plan, of_all
    return found


def check(name: str, mesh: Mesh, machine: str) -> None:
    """No seed has a shorter step than the plan, and none a shorter one than the bound."""
    captured, network = problem_of(name, mesh, machine)
    plan = search(captured, name, mesh, network.options)
    assert plan.step_seconds == pytest.approx(autoparallel.timeline(plan).seconds)
    assert 0 < plan.step_bound <= plan.step_seconds
    for family, (seed, _) in seeds(captured, network).items():
        step, _ = step_and_waits(seed, network.hardware)
        assert step >= plan.step_seconds * (1 - 1e-9), (family, step, plan.step_seconds)


@pytest.mark.parametrize("name", ["gpt", "gated wide"])
def test_no_seed_is_shorter(name: str) -> None:
    check(name, TWO_AXES, "dgx-h100")


@pytest.mark.broad
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_no_seed_is_shorter_anywhere(name: str, mesh: Mesh, machine: str) -> None:
    check(name, mesh, machine)


@pytest.mark.parametrize("name", [*broad("gpt"), "vision"])
def test_parts_add_up(name: str) -> None:
    """All kinds together are the sum, and no step is shorter than its kinds allow."""
    captured, network = problem_of(name, TWO_AXES, "dgx-a100")
    parts, problem = StepParts(network), network.problem()
    states = {variable.name: variable.size for variable in problem.variables}
    assert len(states) == len(problem.variables)
    whole = parts.problem(problem, np.ones(len(Kind)))
    for family, (plan, solution) in seeds(captured, network).items():
        seconds = parts.seconds(solution.assignment)
        assert whole.cost(solution.assignment) == pytest.approx(seconds.sum())
        # The last reductions hide what is computed before the first product: it is not counted.
        assert seconds.sum() == pytest.approx(solution.cost, rel=0.02)
        assert seconds.sum() <= solution.cost * (1 + 1e-9)
        step, _ = step_and_waits(plan, network.hardware)
        assert least_step(seconds) <= step * (1 + 1e-9), family


def test_every_mean_is_a_bound() -> None:
    """The least mean over all plans is not above the step of any."""
    captured, network = problem_of("gpt", TWO_AXES, "dgx-h100")
    parts, problem = StepParts(network), network.problem()
    steps = [
        step_and_waits(plan, network.hardware)[0] for plan, _ in seeds(captured, network).values()
    ]
    for weights in step_weights()[::87]:
        assert exact.solve(parts.problem(problem, weights)).cost <= min(steps) * (1 + 1e-9)


class Padded(nn.Module):
    """Products with a large value between them that follows from a weight, and is the same on all
    ranks: what each has of its gradient is padded to the whole.
    """

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.before, self.after = (
            nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3)) for _ in range(2)
        )
        self.table = nn.Parameter(torch.zeros(16 * 256 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (16, width)."""
        for layer in self.before:
            x = torch.relu(layer(x))
        x = x * self.table.cumsum(0).view(16, 256, -1).mean(1)
        for layer in self.after:
            x = torch.relu(layer(x))
        return x.square().mean()


def test_memory_is_written_beside_what_is_sent() -> None:
    """It is computing, beside which gathers and reductions run: a bound that counts it with what is
    moved, which nothing but gradients of weights hides, would be above the step of a plan.
    """
    with torch.device("meta"):
        model, x = Padded(), torch.zeros(16, 1024)
    captured = autoparallel.make_plan(model, 1, example_inputs=x).captured
    assert captured is not None
    options = Options(data_parallel=True, hardware="cpu")
    graph = with_larger_hints(captured, options.tokens)
    network = build_network(graph, Mesh(dp=4), find_hardware("cpu"), options)
    value = next(node.result.name for node in graph.calls if "cumsum" in node.target)
    [reader] = graph.readers[value]
    edge = network.values[reader.result.name]
    parts = dict(StepParts(network)._of_edge(reader.result.name, edge))
    row = edge.produced.layouts.index((Replicate(),))
    column = edge.groups.index(((Shard(0),),))
    seconds = {kind: float(table[row, column].max()) for kind, table in parts.items()}
    assert seconds[Kind.BACKWARD] > 0
    assert {kind for kind, some in seconds.items() if some} == {Kind.BACKWARD}


def test_without_overlap_the_sum_is_the_step() -> None:
    """Then the optimum is proven."""
    captured = traced("gated wide")
    options = Options(data_parallel=True, hardware="dgx-a100", overlap=False)
    plan = search(captured, "gated", TWO_AXES, options)
    assert plan.step_bound == plan.lower_bound
    # But for the latency of gradient buckets, which the sum leaves out.
    assert plan.step_bound == pytest.approx(plan.step_seconds, rel=0.01)
    assert plan.method == "variable elimination"


def test_the_bound_is_told() -> None:
    """In the plan's lines, its report and its text."""
    plan = search(
        traced("gated wide"), "gated", TWO_AXES, Options(data_parallel=True, hardware="dgx-h100")
    )
    again = Plan.from_json(plan.to_json())
    assert (again.step_seconds, again.step_bound) == (plan.step_seconds, plan.step_bound)
    assert plan.step_proof in str(plan)
    assert plan.step_proof in plan_text(plan)
    text = plan.to_json().replace(f'"step_bound": {plan.step_bound!r}', '"step_bound": 0.0')
    assert Plan.from_json(text).step_proof == ""


def test_a_mesh_is_chosen_by_its_step() -> None:
    """The best of all meshes, and of one of three axes."""
    make, inputs_of = MODELS["gated"]
    with torch.device("meta"):
        model = make()
        inputs = inputs_of(model)
    chosen = autoparallel.make_plan(
        model, 8, mesh="auto", example_inputs=inputs, hardware="dgx-a100"
    )
    captured = traced("gated")
    for mesh in (Mesh(dp=8), Mesh(dp=4, tp=2), Mesh(dp=2, tp=4), Mesh(dp=2, sp=2, tp=2)):
        plan = search(captured, "Gated", mesh, chosen.options)
        assert chosen.step_seconds <= plan.step_seconds * (1 + 1e-9)


def test_other_hardware_prices_all_again() -> None:
    """The plan's timeline on another machine is that of the same plan made for it."""
    make, inputs_of = MODELS["gated wide"]
    with torch.device("meta"):
        model = make()
        inputs = inputs_of(model)
    demands: dict[str, Any] = {"mesh": TWO_AXES, "example_inputs": inputs}
    plan = autoparallel.make_plan(model, hardware="dgx-a100", **demands)
    there = autoparallel.timeline(plan, hardware="dgx-h100")
    assert there.seconds < 0.7 * plan.step_seconds
    pinned = {parameter.path: parameter.storage for parameter in plan.parameters}
    fixed = autoparallel.make_plan(model, hardware="dgx-h100", pins=pinned, **demands)
    # The same plan but for what pins leave open: its ops take as long, one by one.
    assert fixed.step_seconds <= there.seconds * (1 + 1e-9)
    moved = repriced(plan, find_hardware("dgx-h100"))
    back = repriced(moved, find_hardware("dgx-a100"))
    assert [op.seconds for op in back.ops] == [op.seconds for op in plan.ops]
    assert back.seconds == pytest.approx(plan.seconds)
    assert [c.seconds for c in back.conversions] == [c.seconds for c in plan.conversions]
    with pytest.raises(PlanError, match="cannot be told"):
        autoparallel.timeline(Plan.from_json(plan.to_json()), hardware="dgx-h100")
    same = autoparallel.timeline(Plan.from_json(plan.to_json()), hardware="dgx-a100")
    assert same.seconds == plan.step_seconds


def test_a_sum_in_which_activations_count_as_whole_bounds_no_step() -> None:
    """Within a limit: another plan is shorter without overlap than the one returned."""
    with torch.device("meta"):
        model = GPT(GPTConfig(1, 256, 4, 512, 512))
    one_by_one, overlapped = (
        autoparallel.make_plan(
            model,
            4,
            example_inputs=model.example_inputs(batch=32),
            hardware="dgx-a100",
            sequence_parallel=False,
            memory_limit=2**40,
            recompute="none",
            overlap=overlap,
        )
        for overlap in (False, True)
    )
    assert overlapped.seconds < one_by_one.step_seconds
    assert one_by_one.step_bound <= overlapped.seconds
