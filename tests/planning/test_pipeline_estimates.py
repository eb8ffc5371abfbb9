"""Estimates of pipelines from a model with few of its blocks, against plans of the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from broad_cases import broad
from pipeline_models import MODELS, batch_of
from torch import nn

import autoparallel
from autoparallel.analysis.stage_memory import memory_of_pipeline
from autoparallel.graph.captured import Captured
from autoparallel.graph.shortened import shortened
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.planning.pipeline_choices import in_parts, shares_of
from autoparallel.planning.pipeline_estimates import Estimator
from autoparallel.planning.pipeline_meshes import best_mesh, best_order
from autoparallel.planning.pipelines import pipeline_plan
from autoparallel.planning.plan_model import trace_model
from autoparallel.planning.stage_estimates import Estimate
from autoparallel.train.models import GPT, GPTConfig


def gpt(layers: int) -> Any:
    with torch.device("meta"):
        return GPT(GPTConfig(layers, 512, 8, 1024, 128)).bfloat16()


def traced(model: nn.Module, inputs: Any, options: Options) -> Captured:
    captured = trace_model(model, (), inputs, options)
    assert isinstance(captured, Captured)
    return captured


@pytest.mark.parametrize("limit", [None, "120MiB"], ids=str)
def test_estimates_are_near_plans(limit: str | None) -> None:
    """Seconds and bytes of 9 layers from those of 3, on stages that the layers do not divide into
    evenly."""
    model = gpt(9)
    inputs = model.example_inputs(batch=16, sequence=128)
    plan = autoparallel.make_plan(
        model,
        mesh=Mesh(pp=3, tp=2),
        example_inputs=inputs,
        microbatches=8,
        memory_limit=limit,
        recompute="none",
        hardware="dgx-a100",
    )
    options = plan.options
    captured = in_parts(traced(model, inputs, options))
    estimator = Estimator(captured, options)
    assert estimator.short is not None
    assert estimator.blocks == 9
    found = estimator.estimate(Mesh(tp=2), shares_of(3, 8, options), 8)
    assert found is not None
    assert found.seconds == pytest.approx(plan.step, rel=0.1)
    if limit:
        assert plan.pipeline is not None
        assert found.nbytes == pytest.approx(max(plan.pipeline.memory), rel=0.25)


class Loss(nn.Module):
    """A model that returns its loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT(GPTConfig(5, 256, 4, 128, 256)).bfloat16()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids, labels).loss
        return loss


def test_few_of_many_messages_are_under_way() -> None:
    """A stage has room for what it receives and sends of the micro-batches in flight, and not of
    all of a step: the estimate of its bytes is near the plan's, however many there are.
    """
    with torch.device("meta"):
        model = Loss()
    inputs, count = model.model.example_inputs(batch=128, sequence=256), 128
    options = Options(
        hardware="dgx-a100", recompute="none", memory_limit=2**30, microbatches=count, tokens=1
    )
    captured = in_parts(traced(model, inputs, options))
    found = Estimator(captured, options).estimate(Mesh(tp=1), shares_of(2, count, options), count)
    plan = pipeline_plan(captured, "GPT", Mesh(pp=2), options)
    assert found is not None
    most = max(account.total for account in memory_of_pipeline(plan))
    assert found.nbytes == pytest.approx(most, rel=0.2)


def test_what_is_shortened() -> None:
    """Chains of equal blocks; not skips, and not short chains."""
    options = Options()
    model = gpt(6)
    graph = traced(model, model.example_inputs(batch=4, sequence=16), options).graph
    short = shortened(graph)
    assert short is not None
    assert [times for _, _, times in short.times] == [4]
    assert len(short.graph.calls) < len(graph.calls) / 1.5
    for kind in ("Language", "Skips"):
        plain = MODELS[kind]().double()
        assert shortened(traced(plain, batch_of(kind), options).graph) is None


def test_stages_among_all_meshes() -> None:
    """Across slow links, little is sent between stages, and a mesh with them is chosen."""
    model = gpt(8)
    inputs = model.example_inputs(batch=32, sequence=128)
    options = Options(data_parallel=True, hardware="dgx-a100")
    captured = traced(model, inputs, options)
    found = best_mesh(captured, 16, options, float("inf"))
    assert found is not None
    mesh, _ = found
    assert mesh.world_size == 16
    assert dict(mesh.axes)["pp"] > 1
    assert best_mesh(captured, 16, options, 0.0) is None
    fast = Options(data_parallel=True, hardware="dgx-a100", rng="fast")
    assert best_mesh(captured, 16, fast, float("inf")) is None  # it is refused


def test_stages_on_each_rank_are_chosen() -> None:
    """Several stages on each rank leave a smaller bubble; what was asked for is not chosen."""
    model = gpt(16)
    inputs = model.example_inputs(batch=64, sequence=128)
    options = Options(data_parallel=True, hardware="dgx-a100", microbatches=8)
    captured = traced(model, inputs, options)
    found: dict[int | None, tuple[int, float]] = {}
    for each in (None, 1):
        asked = replace(options, stages_per_rank=each)
        estimator = Estimator(in_parts(captured), asked)
        best = best_order(estimator, 4, Mesh(tp=2), asked)
        assert best is not None
        mesh = Mesh(pp=4, tp=2)
        estimator.settle(mesh, best)
        found[each] = estimator.settled(mesh, asked).each_rank, best.seconds
    assert found[None][0] > 1
    assert found[1][0] == 1
    assert found[None][1] < found[1][1]


@pytest.mark.parametrize("each", [*broad(1), 2])
def test_some_blocks_are_recomputed(each: int) -> None:
    """Within a limit that some blocks exceed, only as many are recomputed as must be.

    The plan takes about the time of the estimate: it has its stages.
    """
    model = gpt(8)
    inputs = model.example_inputs(batch=64, sequence=128)

    def estimated(recompute: str, limit: int) -> tuple[Estimate, Captured]:
        """Return the estimate of two stages of four ranks each, and the traced model."""
        options = Options(
            data_parallel=True,
            hardware="dgx-a100",
            recompute=recompute,
            memory_limit=limit,
            stages_per_rank=each,
        )
        captured = in_parts(traced(model, inputs, options))
        found = Estimator(captured, options).estimate(Mesh(dp=2, tp=2), shares_of(2, 4, options), 4)
        assert found is not None
        return found, captured

    alike, _ = estimated("full", 2**40)
    limit = int(1.05 * alike.nbytes)
    some, captured = estimated("auto", limit)
    assert some.nbytes <= limit
    assert some.seconds < alike.seconds
    assert 0 < some.mixes[0].count("full") < 8
    options = Options(
        data_parallel=True,
        hardware="dgx-a100",
        recompute="auto",
        memory_limit=limit,
        microbatches=4,
        stages_per_rank=each,
    )
    plan = pipeline_plan(captured, "GPT", Mesh(pp=2, dp=2, tp=2), options)
    modes = dict(plan.recompute)
    assert 0 < list(modes.values()).count("full") < 8
    memory = memory_of_pipeline(plan)
    assert max(account.total for account in memory) <= limit
    assert plan.step == pytest.approx(some.seconds, rel=0.05)
