"""Demands in people's words: layouts that have names, dims by name, columns and rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from families import Float64

import autoparallel
from autoparallel import Mesh
from autoparallel.analysis.synchronization import Cut
from autoparallel.errors import PlanError
from autoparallel.placement import Invariant, Layout, Placement, Replicate, Shard
from autoparallel.plan import OpChoice, ParameterChoice, Plan
from autoparallel.train.models import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_trace")
MESH = Mesh(dp=2, tp=2)
DP, TP = 0, 1


def planned(mesh: Mesh | str = MESH, **options: Any) -> Plan:
    """A plan of a layer of GPT."""
    with torch.device("meta"):
        model = GPT(GPTConfig(layers=1, hidden=64, heads=4, vocabulary=256, positions=32))
        inputs = model.example_inputs(batch=256)
    return autoparallel.make_plan(
        model, mesh=mesh, example_inputs=inputs, hardware="dgx-a100", **options
    )


def of(plan: Plan, path: str) -> ParameterChoice:
    """The choice for a parameter."""
    return next(parameter for parameter in plan.parameters if parameter.path == path)


def products(plan: Plan) -> list[OpChoice]:
    """The products with a weight."""
    return [op for op in plan.ops if op.name.endswith("_product")]


def is_split(layout: Layout, axis: int) -> bool:
    """Whether an axis splits a tensor."""
    return isinstance(layout[axis], Shard)


def columns_and_rows(plan: Plan) -> None:
    for op in products(plan):
        if op.where.endswith("expand"):
            assert [layout[TP] for layout in op.operands] == [Replicate(), Shard(0)]
        if op.where.endswith("contract"):
            assert [layout[TP] for layout in op.operands] == [Shard(2), Shard(1)]


def megatron(plan: Plan) -> None:
    for path, dim in (
        ("attention.query_key_value", 0),
        ("attention.projection", 1),
        ("feed_forward.expand", 0),
        ("feed_forward.contract", 1),
    ):
        placement = of(plan, f"blocks.0.{path}.weight").storage[TP]
        assert isinstance(placement, Shard), path
        assert placement.dim == dim, path


def fully_sharded(plan: Plan) -> None:
    for parameter in plan.parameters:
        if len(parameter.shape) == 2:
            assert is_split(parameter.storage, DP), parameter.path
    for op in products(plan):
        assert [is_split(layout, DP) for layout in op.operands] == [True, False], op.name


def state_alone(plan: Plan) -> None:
    for parameter in plan.parameters:
        assert not is_split(parameter.storage, DP)
        assert is_split(parameter.state, DP)


def sequence(plan: Plan) -> None:
    for op in products(plan):
        assert op.operands[0][TP] == Shard(1), op.name


def mesh_tensorflow(plan: Plan) -> None:
    """The axes split dims of these names in every product, and nothing else in any op."""
    megatron(plan)
    assert of(plan, "token_embedding.weight").storage == (Invariant(), Shard(0))
    splits = autoparallel.thread_splits(plan)
    for op in plan.ops:
        for axis, names in ((DP, ("batch",)), (TP, ("heads", "feed-forward", "vocabulary"))):
            states = [*splits.read[op.name], *(splits.made[value] for value in op.makes)]
            cuts = [state[axis] for state in states if isinstance(state[axis], Cut)]
            assert all(splits.threads.threads[cut.thread].name in names for cut in cuts), op.name


@pytest.mark.parametrize(
    ("demands", "check"),
    [
        (["*.expand is column on tp", "*.contract on tp is row"], columns_and_rows),
        (["megatron on tp"], megatron),
        (["heads on tp", "d_ff on tp"], megatron),
        (["FSDP on dp", "Megatron on tp"], fully_sharded),
        (["zero-1 on dp"], state_alone),
        (["context on tp"], sequence),
        (["only batch on dp", "only heads, hidden_ff, vocab on tp"], mesh_tensorflow),
    ],
    ids=lambda case: case[0] if isinstance(case, list) else "",
)
def test_a_demand_is_kept(demands: list[str], check: Callable[[Plan], None]) -> None:
    """What it is about is as it says, wherever that can be; and the plan says what was asked."""
    plan = planned(constraints=demands)
    check(plan)
    assert plan.options.constraints == tuple(demands)


def test_a_layout_is_a_demand_for_each_axis() -> None:
    """In Mesh-TensorFlow's words; with more demands beside it."""
    plan = planned(layout="batch:dp, heads:tp; d_ff:tp, vocab:tp", constraints=["zero-1 on dp"])
    assert plan.options.constraints == (
        "zero-1 on dp",
        "only batch on dp",
        "only heads, d_ff, vocab on tp",
    )
    mesh_tensorflow(plan)
    state_alone(plan)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hads on tp", "no dim of the model is called 'hads'.*did you mean heads"),
        ("experts on tp", "no dim of the model is called 'experts'"),
        ("heads on pp", "no axis 'pp'"),
        ("*.attention_norm is column on tp", "is about no product"),
        ("*.expand.bias is column on tp", "is about no product"),
        ("*.expand on tp is split 3", "makes linear_2: it has 3 dims"),
        ("*.expand.weight on tp is split 2", "expand.weight cannot be as.*it has 2 dims"),
        ("*.expand on dp is column on tp", "names two axes"),
        ("expand on tp is column", r"no module is called 'expand'.*did you mean \*\.expand\?"),
        ("*.expand is columns", 'says not how.*"column", "row"'),
    ],
)
def test_a_demand_that_cannot_be_kept_says_why(text: str, words: str) -> None:
    """Misspelt, about nothing in the model, or about a tensor that has no such dim."""
    with pytest.raises(PlanError, match=re.compile(words, re.DOTALL)):
        planned(constraints=[text])


def test_a_module_is_asked_for_what_it_makes() -> None:
    """Not for its weight, which has no third dim, nor for its bias."""
    plan = planned(constraints=["*.expand on tp is split 2"])
    for op in plan.ops:
        if op.where.endswith("expand") and not op.name.endswith("_product"):
            assert op.results[0][TP] == Shard(2)


@pytest.mark.parametrize(
    ("demands", "pins", "words"),
    [
        (["batch on tp", "megatron on tp"], {}, ["'batch on tp' leaves S(0)", "'megatron on tp'"]),
        (["zero-1 on dp", "fsdp on dp", "heads on tp"], {}, ["'zero-1 on dp'", "'fsdp on dp'"]),
        (["*.expand is column on tp", "*.expand is row on tp"], {}, ["S(2)", "leaves P"]),
        (
            ["fsdp on dp"],
            {"blocks.0.feed_forward.expand.weight": (Invariant(), Shard(1))},
            ["the pin I | S(1)", "'fsdp on dp' leaves S("],
        ),
    ],
)
def test_demands_that_contradict_each_other_are_named(
    demands: list[str], pins: dict[str, tuple[Placement, ...]], words: list[str]
) -> None:
    """Both of them, the tensor that cannot heed both, and what each would leave; no others."""
    with pytest.raises(PlanError, match="cannot be as") as error:
        planned(constraints=demands, pins=pins)
    for word in words:
        assert word in str(error.value)
    assert "'heads on tp'" not in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "options", "words"),
    [
        (Mesh(tp=2), {"constraints": ["batch on tp"], "data_parallel": False}, "data_parallel"),
        (Mesh(tp=2), {"constraints": ["fsdp on tp"], "data_parallel": False}, "data_parallel"),
        (
            Mesh(tp=2),
            {"constraints": ["ddp on tp"], "data_parallel": False},
            "ddp splits the batch, and no product",
        ),
        (
            Mesh(pp=2, dp=2),
            {"constraints": ["fsdp on pp"], "microbatches": 2},
            "pp has stages, which split no tensor\n  fix:   its axes are dp",
        ),
        (
            Mesh(pp=2, dp=2),
            {"constraints": ["fsdp on microbatch"], "microbatches": 2},
            "no axis 'microbatch'",
        ),
        (MESH, {"layout": "batch->dp"}, "'batch->dp' is no rule"),
        (MESH, {"layout": 3}, "layout=3"),
    ],
)
def test_what_nothing_can_heed_is_refused(mesh: Mesh, options: Any, words: str) -> None:
    """Nothing that the options allow, no layout."""
    with pytest.raises(PlanError, match=words):
        planned(mesh, **options)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        (Mesh(dp=2, tp=3), {"layout": "batch:dp, heads:tp, hidden_ff:tp, vocab:tp"}),
        (Mesh(dp=2, tp=2), {"constraints": ["fsdp on dp", "megatron on tp"]}),
        (Mesh(tp=3), {"constraints": ["ulysses on tp"]}),
    ],
    ids=str,
)
def test_what_was_asked_for_is_right(mesh: Mesh, options: dict[str, Any]) -> None:
    """Loss and every gradient in float64, as of the unsplit model."""
    torch.manual_seed(0)
    config = GPTConfig(layers=1, hidden=48, heads=6, vocabulary=60, positions=12, dropout=0.0)
    model = GPT(config).double()
    inputs = model.example_inputs(batch=6)
    plan = autoparallel.make_plan(model, mesh=mesh, example_inputs=inputs, **options)
    _require_right(model, model, inputs, plan)


def test_experts_and_the_batch_share_an_axis() -> None:
    """Experts exchange their tokens where an axis is asked to split both; routers stay whole."""
    with Float64():
        # Torch's grouped products take no float64: the unsplit model has its experts one by one.
        model, reference = zoo.build("mixtral", 1), zoo.build("mixtral", 1)
        reference.config._experts_implementation = "eager"
    inputs = {name: torch.cat([value] * 4)[:8] for name, value in zoo.inputs_for("mixtral").items()}
    with Float64():
        plan = autoparallel.make_plan(
            model,
            mesh=Mesh(dp=2, ep=2),
            example_inputs=inputs,
            constraints=["batch on dp", "batch on ep", "experts on ep"],
        )
    kernels = [kernel for op in plan.ops for kernel in op.kernels if kernel.startswith("experts")]
    assert kernels == ["experts_exchanged"]
    assert of(plan, "model.layers.0.mlp.experts.down_proj").storage[1] == Shard(0)
    assert not is_split(of(plan, "model.layers.0.mlp.gate.weight").storage, 1)
    _require_right(model, reference, inputs, plan)


def _require_right(
    model: torch.nn.Module, reference: torch.nn.Module, inputs: Any, plan: Plan
) -> None:
    """Compare the loss and all gradients of the plan's ranks with those of an unsplit model."""
    result = autoparallel.simulate(model, plan=plan, example_inputs=inputs)
    with Float64():
        output = reference(**inputs) if isinstance(inputs, dict) else reference(*inputs)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    split = result.output if isinstance(result.output, torch.Tensor) else result.output.loss
    torch.testing.assert_close(split, loss.detach(), rtol=1e-11, atol=1e-12)
    loss.backward()
    for path, parameter in reference.named_parameters():
        torch.testing.assert_close(
            result.gradients[path], parameter.grad, rtol=1e-9, atol=1e-12, msg=path
        )
    assert result.apart == 0
