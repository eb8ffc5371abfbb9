"""Plans with stages: all stages, one after the other, are the unsplit model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from broad_cases import broad
from pipeline_models import MODELS, Block, Language, batch_of
from torch import nn

import autoparallel
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.mesh import MICROBATCH, Mesh
from autoparallel.options import Options
from autoparallel.parallel.simulate import Simulation
from autoparallel.placement import Shard
from autoparallel.plan import Plan
from autoparallel.planning.pipeline_choices import in_parts
from autoparallel.planning.plan_check import require_sound
from autoparallel.planning.plan_graphs import with_graphs
from autoparallel.planning.plan_model import trace_model
from autoparallel.rewrite.stages import cut_plan
from autoparallel.strategy.build_network import build_network
from autoparallel.support.pytree import flatten

TOLERANCE = 1e-12
WEIGHTS = {"data_parallel": False}  # products are split by their weights


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = MODELS[kind]().double()
    return model


@cache
def unsplit(kind: str) -> Simulation:
    return autoparallel.simulate(model_of(kind), 1, example_inputs=batch_of(kind))


@pytest.mark.parametrize(
    ("kind", "axes", "microbatches", "options"),
    [
        *broad(("Language", {"pp": 2}, 4, {})),  # of 6 rows: two, two, two and none
        ("Language", {"pp": 2, "tp": 2}, 3, WEIGHTS),
        *broad(("Language", {"pp": 2, "dp": 2}, 3, {})),
        ("Language", {"pp": 3, "dp": 2, "tp": 2}, 2, {"recompute": "full"}),
        *broad(("Masked", {"pp": 4}, 2, {})),
        ("Masked", {"pp": 2, "tp": 2}, 2, WEIGHTS),
        *broad(("Skips", {"pp": 4}, 3, {})),
        ("Normalized", {"pp": 2, "tp": 2}, None, {}),
        ("Contrastive", {"pp": 2}, 2, {}),
        ("Frozen", {"pp": 3}, 3, {}),
    ],
    ids=str,
)
def test_stages_in_turn_are_the_model(
    kind: str, axes: dict[str, int], microbatches: int | None, options: dict[str, Any]
) -> None:
    """Outputs, every gradient and buffers, with dropout, ignored labels, ties and skips."""
    plan = autoparallel.make_plan(
        model_of(kind),
        mesh=Mesh(**axes),
        example_inputs=batch_of(kind),
        microbatches=microbatches,
        **options,
    )
    assert plan.pipeline is not None
    assert plan.pipeline.stages == axes["pp"]
    assert plan.pipeline.microbatches == (microbatches or 1)
    split = autoparallel.simulate(model_of(kind), example_inputs=batch_of(kind), plan=plan)
    whole = unsplit(kind)
    pairs = zip(flatten(split.output)[0], flatten(whole.output)[0], strict=True)
    for one, other in (
        *pairs,
        *((split.gradients[path], value) for path, value in whole.gradients.items()),
        *((split.buffers[path], value) for path, value in whole.buffers.items()),
    ):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
    assert split.apart < TOLERANCE


def language_plan(**options: Any) -> Plan:
    options = {"mesh": Mesh(pp=2, tp=2), "microbatches": 3, **options}
    return autoparallel.make_plan(
        model_of("Language"), example_inputs=batch_of("Language"), **options
    )


def test_stages_are_balanced_and_send_little() -> None:
    """A stack of equal blocks, wide enough to be work, is cut between blocks: at the residual."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    stack = nn.Sequential(*[nn.Sequential(*block) for _ in range(8)])
    plan = autoparallel.make_plan(
        stack,
        mesh=Mesh(pp=4),
        example_inputs=torch.zeros(64, 256),
        hardware="dgx-a100",
        microbatches=16,
    )
    assert plan.pipeline is not None
    first, *_, last = plan.pipeline.nbytes
    assert last == 0
    # A micro-batch of 8192 / 256 x 64 rows, cut where 256 columns cross, and not 512.
    rows = plan.inputs[0].planned[0]
    assert first == rows // 16 * 256 * 4
    assert max(plan.pipeline.seconds) < 1.25 * min(plan.pipeline.seconds)
    assert 0.1 < plan.pipeline.bubble < 0.4


class MaskInside(nn.Module):
    """A block that makes its mask itself: of the inputs' sizes alone, before all micro-batches.

    A query sees one key ahead: a mask that hides all later keys would become the kernel's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(causal=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        mask: torch.Tensor = torch.ones(length, length, dtype=torch.bool).tril(1)
        out: torch.Tensor = self.block(x, mask)
        return out


def test_blocks_that_make_their_mask_are_recomputed() -> None:
    torch.manual_seed(3)
    model = Language(blocks=4)
    model.blocks = nn.ModuleList(MaskInside() for _ in range(4))
    plan = autoparallel.make_plan(
        model,
        mesh=Mesh(pp=2),
        microbatches=3,
        example_inputs=batch_of("Language"),
        recompute="full",
    )
    assert plan.captured is not None
    stages = cut_plan(plan.captured.graph, plan)
    inside = {name for group in plan.recomputed for name in group}
    again = {name for stage in stages for group in stage.plan.recomputed for name in group}
    assert len(plan.recomputed) >= 4
    assert sum(len(stage.plan.recomputed) for stage in stages) == len(plan.recomputed)
    # All but what each stage computes once.
    once = set(inert_calls(plan.captured.graph))
    assert inside & once
    assert again == inside - once


@pytest.mark.parametrize("sequence", [True, False])
def test_sequences_are_split_beside_stages(sequence: bool) -> None:
    """Between tensor-parallel products, without replicas: a rank keeps its part of the tokens."""
    options = Options(data_parallel=False, sequence_parallel=sequence, hardware="dgx-a100")
    captured = trace_model(model_of("Language"), (), batch_of("Language"), options)
    assert isinstance(captured, Captured)
    captured = in_parts(captured)
    mesh = Mesh(**{MICROBATCH: 2}, tp=2)
    hardware = find_hardware(options.hardware)
    network = build_network(captured.graph, mesh, hardware, options, None, captured.part)
    norms = [name for name in network.strategies if name.startswith("layer_norm")]
    assert norms
    for name in norms:
        ways = [strategy.results[0] for strategy in network.strategies[name]]
        assert ((Shard(0), Shard(1)) in ways) == sequence


@pytest.mark.parametrize("axes", [{"pp": 3}, {"pp": 2, "tp": 2}], ids=str)
def test_what_is_put_off_is_predicted_as_it_is_run(axes: dict[str, int]) -> None:
    """Stages of several ranks go back whole; of the first stage, nothing that came in has a
    gradient, and all of its backward pass waits.
    """
    plan = language_plan(mesh=Mesh(**axes), schedule="zero_bubble", data_parallel=True)
    pipeline = plan.pipeline
    assert pipeline is not None
    both = zip(pipeline.seconds, pipeline.forward_seconds, strict=True)
    first, *others = (seconds - forward for seconds, forward in both)
    if "tp" in axes:
        assert set(pipeline.weight_seconds) == {0.0}
        return
    assert pipeline.weight_seconds[0] == pytest.approx(first)
    for put_off, backward in zip(pipeline.weight_seconds[1:], others, strict=True):
        assert 0 < put_off < backward


class Counted(tuple[Any, ...]):
    """Rows that count how often somebody goes through all of them."""

    times = 0

    def __iter__(self) -> Iterator[Any]:
        Counted.times += 1
        return super().__iter__()


def test_stages_find_their_rows_without_a_look_at_all() -> None:
    """However many stages there are, a plan's rows are gone through equally often."""
    counts = []
    for stages in (2, 4):
        plan = language_plan(mesh=Mesh(pp=stages))
        assert plan.captured is not None
        rows = {"ops": plan.ops, "conversions": plan.conversions, "parameters": plan.parameters}
        counting = replace(plan, **{name: Counted(each) for name, each in rows.items()})
        Counted.times = 0
        assert len(cut_plan(plan.captured.graph, counting)) == stages
        counts.append(Counted.times)
    assert counts[0] == counts[1] > 0


def test_plan_is_read_as_it_was_written() -> None:
    """And checked: an edited one is refused, in words, before it runs."""
    plan = language_plan(data_parallel=False)
    assert "pipeline     2 stages, 3 micro-batches, 1f1b" in str(plan)
    assert plan.world_size == 4
    text = plan.to_json()
    read = Plan.from_json(text)
    assert read == plan
    assert read.to_json() == text
    model = model_of("Language")
    traced = trace_model(model, (), batch_of("Language"), read.options)
    read = with_graphs(read, traced)
    require_sound(read, model)
    assert read.pipeline is not None
    backwards = replace(read.pipeline, starts=read.pipeline.starts[::-1])
    for wrong, why in [
        (replace(read, pipeline=backwards), "one behind the other"),
        (replace(read, pipeline=replace(read.pipeline, microbatches=2)), "another number"),
        (replace(read, conversions=read.conversions[:-1] + read.conversions[:1]), ""),
    ]:
        if why:
            with pytest.raises(PlanError, match=why):
                require_sound(wrong, model)
    first = read.ops[0]
    swapped = replace(first, operands=first.results * len(first.operands))
    with pytest.raises(PlanError, match="cannot be"):
        require_sound(replace(read, ops=(swapped, *read.ops[1:])), model)


def test_programs_of_stages_are_read() -> None:
    plan = language_plan()
    first, last = (autoparallel.emitted_program(plan, rank=rank) for rank in (0, 3))
    assert "embedding" in first
    assert "cross_entropy" not in first
    assert "cross_entropy" in last
    with pytest.raises(PlanError, match="rank 4"):
        autoparallel.emitted_program(plan, rank=4)
    with pytest.raises(PlanError, match="not told of a plan with stages"):
        autoparallel.to_fx(plan, rank=0)


class Branching(nn.Module):
    """A model whose Python looks at values: of what it computes, or of its inputs alone."""

    def __init__(self, of_inputs: bool = False) -> None:
        super().__init__()
        self.of_inputs = of_inputs
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.first(tokens)
        if ((tokens if self.of_inputs else x) > 100).any():
            x = x * 2
        return self.last(x).square().mean()


class Clipped(torch.autograd.Function):
    """Twice the input; its gradient is clipped, so that those of parts do not add up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient.clamp(-0.001, 0.001) * 2


class Clipping(Branching):
    """A model with a Function of its own, of which nothing is known unless it is tried out."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.last(Clipped.apply(self.first(tokens))).square().mean()


class Numbering(Branching):
    """A model that cannot be traced whole."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.first(tokens)
        return self.last(x * float(x.detach().sum().numpy()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": Mesh(pp=512)}, "cannot be cut into 512 stages"),
        ({"rng": "fast"}, "draw the same numbers"),
        (
            {"memory_limit": "1KiB"},
            r"(?s)on Mesh\(pp=2, tp=2\).*stage [01] of 2",
        ),
        ({"pins": {"embedding.weight": (autoparallel.Invariant(),) * 2}}, "one placement for each"),
        ({"pins": {"embeding.weight": autoparallel.Invariant()}}, "no parameter 'embeding.weight'"),
        ({"mesh": Mesh(dp=2, pp=2)}, "stands first"),
        ({"mesh": Mesh(microbatch=2)}, "axis in time"),
        ({"mesh": Mesh(tp=2)}, "there are none"),
        ({"mesh": Mesh(pp=2), "microbatches": 0}, "microbatches=0"),
        ({"mesh": Mesh(pp=2), "schedule": "dualpipe"}, "schedule='dualpipe'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        language_plan(**options)


def test_models_that_cannot_be_cut() -> None:
    """A batch that ops couple is one micro-batch, or refused by the name of the op."""
    with pytest.raises(PlanError, match="as 2 micro-batches") as refused:
        autoparallel.make_plan(
            model_of("Normalized"),
            mesh=Mesh(pp=2),
            microbatches=2,
            example_inputs=batch_of("Normalized"),
        )
    assert "batch_norm" in str(refused.value)
    options: dict[str, Any] = {"example_inputs": torch.ones(4, 6), "unknown_ops": "replicate"}
    with pytest.raises(PlanError, match=r"Clipped\S+ cannot be computed for one micro-batch"):
        autoparallel.make_plan(Clipping(), mesh=Mesh(pp=2), microbatches=2, **options)
    alone = autoparallel.make_plan(Clipping(), mesh=Mesh(pp=2), **options)
    assert alone.pipeline is not None
    assert alone.pipeline.microbatches == 1
    for kind, words in [(Branching, "one stage alone would know"), (Numbering, "cannot be cut")]:
        with pytest.raises(AutoParallelError, match=words):
            autoparallel.make_plan(kind(), mesh=Mesh(pp=2), example_inputs=torch.ones(4, 6))


def test_branches_on_inputs_are_checked() -> None:
    """By every stage, of the whole batch: no micro-batch can tell."""
    model, inputs = Branching(of_inputs=True), torch.ones(4, 6)
    options: dict[str, Any] = {"mesh": Mesh(pp=2), "microbatches": 2}
    plan = autoparallel.make_plan(model, example_inputs=inputs, **options)
    for rank in range(2):
        once = autoparallel.emitted_program(plan, rank=rank).partition("each micro-batch")[0]
        assert "branch_taken" in once
    other = inputs.clone()
    other[3] = 1000
    with pytest.raises(PlanError, match="goes another way"):
        autoparallel.simulate(model, example_inputs=other, plan=plan)


def test_one_stage_changes_nothing() -> None:
    plan = autoparallel.make_plan(
        Language(), mesh=Mesh(pp=1, tp=2), example_inputs=batch_of("Language")
    )
    assert plan.pipeline is None
