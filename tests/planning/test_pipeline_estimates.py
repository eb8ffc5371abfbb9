"""Estimates of pipelines from a model with few of its blocks, against plans of the whole."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from broad_cases import broad
from pipeline_models import MODELS, batch_of
from torch import nn

import autoparallel
from autoparallel.analysis.stage_memory import memory_of_pipeline
from autoparallel.cost.hardware import find_hardware
from autoparallel.cost.links import Link
from autoparallel.graph.captured import Captured
from autoparallel.graph.shortened import shortened
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.pipeline_choices import in_parts
from autoparallel.planning.pipeline_estimates import Estimator
from autoparallel.planning.pipeline_meshes import best_mesh, best_order
from autoparallel.planning.pipelines import pipeline_plan
from autoparallel.planning.plan_model import trace_model
from autoparallel.planning.schedule_figures import shares_of
from autoparallel.planning.short_chains import Asked, ShortChains
from autoparallel.planning.stage_chain import StageChain, most_saved
from autoparallel.planning.stage_estimates import Estimate
from autoparallel.planning.stage_work import StageBytes
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.stage_shares import StageShares
from autoparallel.train.models import GPT, GPTConfig


def gpt(layers: int) -> Any:
    with torch.device("meta"):
        return GPT(GPTConfig(layers, 512, 8, 1024, 128)).bfloat16()


def traced(model: nn.Module, inputs: Any, options: Options) -> Captured:
    captured = trace_model(model, (), inputs, options)
    assert isinstance(captured, Captured)
    return captured


@pytest.mark.parametrize("limit", [*broad(None), "120MiB"], ids=str)
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


def test_blocks_of_a_short_model_count_as_all() -> None:
    """Calls around the blocks stand once: they may not choose how tensors lie in each of them.

    The solution of the short model costs, and uses, what that of the whole does.
    """
    model = gpt(12)
    options = Options(hardware="dgx-a100", recompute="none", data_parallel=True)
    captured = in_parts(traced(model, model.example_inputs(batch=16, sequence=128), options))
    mesh, shares = Mesh(dp=2, tp=2), shares_of(3, 8, options)
    layouts = Mesh(microbatch=8, dp=2, tp=2)
    graph = with_larger_hints(captured, options.tokens)
    hardware = find_hardware("dgx-a100")
    network = build_network(graph, layouts, hardware, options, None, captured.part, shares)
    constrain(network, captured)
    whole = NetworkSolver(network)(network.problem())
    chains = Estimator(captured, options).chains
    short, _ = chains._solved(Asked(mesh, shares, 8, {}, options), "none", 0.0)
    assert short.cost == pytest.approx(whole.cost, rel=0.01)
    assert short.usage == pytest.approx(whole.usage, rel=0.01)


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


@pytest.mark.parametrize(("layers", "chosen"), [*broad((16, 4)), (12, 3)])
def test_stages_on_each_rank_are_chosen(layers: int, chosen: int) -> None:
    """Several stages on each rank leave a smaller bubble, if blocks divide into them evenly; what
    was asked for is not chosen.
    """
    model = gpt(layers)
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
    assert found[None][0] == chosen
    assert found[1][0] == 1
    assert found[None][1] < found[1][1]


@pytest.mark.parametrize("limit", [*broad(False), True])
def test_smaller_micro_batches_are_looked_at_where_not_all_is_kept(
    limit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gpt(8)
    captured = traced(model, model.example_inputs(batch=64, sequence=128), Options())
    options = Options(data_parallel=True, hardware="dgx-a100", recompute="auto")
    options = replace(options, memory_limit=2**26 if limit else 2**40)
    counts: list[int] = []
    estimate = Estimator.estimate

    def noted(self: Estimator, inside: Mesh, shares: StageShares, count: int, *rest: Any) -> Any:
        if (inside, shares.ranks) == (Mesh(tp=2), 4):
            counts.append(count)
        return estimate(self, inside, shares, count, *rest)

    monkeypatch.setattr(Estimator, "estimate", noted)
    assert best_mesh(captured, 8, options, float("inf")) is not None
    assert set(counts) == ({16, 32} if limit else {16})


def test_blocks_have_as_much_kept_as_their_rank_has_room_for() -> None:
    """The first rank, with most micro-batches in flight, recomputes most of its blocks."""
    model = gpt(8)
    captured = in_parts(traced(model, model.example_inputs(batch=64, sequence=128), Options()))
    options = Options(data_parallel=True, hardware="dgx-a100", memory_limit=2**40)

    def found(recompute: str, limit: int) -> Estimate:
        asked = replace(options, recompute=recompute, memory_limit=limit)
        best = Estimator(captured, asked).estimate(Mesh(dp=2, tp=2), shares_of(2, 4, asked), 4)
        assert best is not None
        return best

    alike = found("full", 2**40)
    some = found("auto", int(1.2 * alike.nbytes))
    ways = some.mixes[0].blocks
    assert sorted(set(ways)) == ["full", "none", "selective"]
    assert ways[:4].count("full") > ways[4:].count("full")
    assert some.seconds < alike.seconds
    # Mixtures of two ways and of three compete, the quickest first.
    steps = [mix.seconds for mix in some.mixes]
    assert len(set(steps)) > 1
    assert steps == sorted(steps)


def test_nothing_more_is_kept_where_a_rank_has_no_room() -> None:
    """Two blocks on two ranks, of which the first holds three micro-batches."""

    def chain(seconds: float, kept: tuple[float, float]) -> StageChain:
        each, none = np.full(2, seconds), np.zeros(2)
        sizes = StageBytes(none, np.array(kept), np.zeros(3), (), 0.0)
        joined, block, link = none.astype(bool), np.arange(2), Link.ring(1e9, 0.0, 0.0)
        return StageChain(
            each, each, none, each, none, none, np.zeros(3), joined, block, sizes, link
        )

    def marked(limit: float) -> list[bool]:
        one, other = chain(1.0, (4.0, 4.0)), chain(2.0, (3.0, 1.0))
        return most_saved(one, other, np.arange(2), (3, 1), (0, 1), limit, False)

    assert marked(12.0) == [True, True]
    assert marked(9.0) == [False, True]
    assert marked(8.0) == [False, False]


@pytest.mark.broad
@pytest.mark.parametrize("each", [1, 2])
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
    assert 0 < some.mixes[0].blocks.count("full") < 8
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


def test_chains_do_not_depend_on_those_before() -> None:
    """Other stages on a rank share chains, and other schedules do not: what is done once a step and
    what stays are those of the chain that was asked for, whatever was asked for before it.
    """
    model = gpt(8)
    captured = in_parts(traced(model, model.example_inputs(batch=64, sequence=128), Options()))
    options = Options(data_parallel=True, hardware="dgx-a100", memory_limit=2**30)
    short = shortened(captured.graph)
    assert short is not None
    kinds = [("1f1b", 1), ("gpipe", 1), ("1f1b", 4)]
    alone: dict[tuple[str, int, str], list[float]] = {}
    for turn in (kinds, kinds[::-1]):
        chains = ShortChains(captured, short, options)
        for (order, each), way in itertools.product(turn, ("none", "full")):
            asked = replace(options, schedule=order, stages_per_rank=each)
            of = Asked(Mesh(dp=4), shares_of(2, 8, asked), 8, {}, asked)
            chain = chains.chain(of, way, 0.1)
            figures = [*chain.seconds.tolist(), *chain.once.tolist(), *chain.bytes.stays.tolist()]
            assert alone.setdefault((order, each, way), figures) == figures


def test_what_a_head_keeps_is_no_activation_of_blocks() -> None:
    """From blocks' alone follows how much more another way to recompute them keeps.

    One stage has all of them, wherever stages of a larger head are cut.
    """
    found = []
    for vocabulary in (512, 65536):
        with torch.device("meta"):
            model = GPT(GPTConfig(8, 256, 8, vocabulary, 128)).bfloat16()
        inputs = model.example_inputs(batch=64, sequence=128)
        captured = in_parts(traced(model, inputs, Options()))
        options = Options(data_parallel=True, hardware="dgx-a100", memory_limit=2**40)
        asked = replace(options, recompute="full")
        best = Estimator(captured, asked).estimate(Mesh(tp=2), shares_of(1, 8, asked), 8)
        assert best is not None
        found.append((best.activations, best.nbytes))
    (small, less), (large, more) = found
    assert large == pytest.approx(small, rel=0.01)
    assert more > less + 2**27
