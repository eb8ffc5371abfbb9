"""Exports are texts of their languages, and what a target cannot express is listed."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from dataclasses import field, make_dataclass, replace

import pytest
import torch
from releases import attention_without_heads
from torch import Tensor, nn
from torch.nn import functional

import autoparallel
from autoparallel import Mesh, Shard, make_plan
from autoparallel.errors import PlanError
from autoparallel.exports.launch_settings import (
    TORCHTITAN_COMMAND,
    megatron_arguments,
    torchtitan_toml,
)
from autoparallel.exports.module_splits import module_splits
from autoparallel.exports.script_tables import literal
from autoparallel.exports.targets import TARGETS, export
from autoparallel.plan import Plan
from autoparallel.rewrite.folded_source import fold_statements
from autoparallel.train.models import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_trace")

HEADS = 4


@pytest.fixture(scope="module")
def planned() -> tuple[GPT, Plan]:
    """A model on two axes."""
    with torch.device("meta"):
        model = GPT(GPTConfig(2, 48, HEADS, 64, 32, 0.0))
    inputs = model.example_inputs(4, 16)
    plan = make_plan(model, mesh=Mesh(dp=2, tp=2), example_inputs=inputs, data_parallel=False,
                     hardware="dgx-a100")  # fmt: skip
    return model, plan


@pytest.mark.parametrize("target", TARGETS)
def test_texts_are_of_their_languages(target: str, planned: tuple[GPT, Plan]) -> None:
    """Python compiles, JSON and TOML parse; comments tell what is missing."""
    model, plan = planned
    result = export(plan, target, model, example_inputs=model.example_inputs(4, 16))
    text = result.text
    if result.ending == ".py":
        ast.parse(text)
    elif result.ending == ".json":
        json.loads(text)
    elif result.ending == ".toml":
        assert tomllib.loads(text)["parallelism"]["tensor_parallel_degree"] > 1
    else:
        assert "--tensor-model-parallel-size" in text
    if target not in ("transformers", "deepspeed"):
        assert all(sentence in text for sentence in result.missing)


@attention_without_heads
def test_ranks_of_unequal_parts_have_programs_of_their_own() -> None:
    """Four heads on three ranks: two programs in one file, and a name for each rank."""
    with torch.device("meta"):
        model = GPT(GPTConfig(1, 48, HEADS, 64, 32, 0.0))
    plan = make_plan(model, 3, example_inputs=model.example_inputs(2, 16), hardware="dgx-a100")
    text = export(plan, "python", model).text
    functions = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
    assert {"forward_0", "forward_2"} <= functions
    assert "forward_1 = forward_0" in text


def test_numbers_of_buffers_are_written_as_python_has_them() -> None:
    """Those that are not finite too."""
    tensor = torch.tensor([1.5, float("inf"), -float("inf"), float("nan")])
    read = eval(literal("mask", tensor), {"torch": torch})
    torch.testing.assert_close(read, tensor, equal_nan=True)


def test_partition_specs_are_the_plans() -> None:
    """Every parameter by its path; what JAX has no word for is listed."""
    layers = [nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False)]
    model, inputs = nn.Sequential(*layers), torch.ones(4, 8)
    plan = make_plan(model, 2, example_inputs=inputs, hardware="dgx-a100")
    text = export(plan, "jax", model).text
    table = ast.literal_eval(
        text[text.index("PARAMETERS = ") :]
        .removeprefix("PARAMETERS = ")
        .replace("PartitionSpec", "")
    )
    assert table == {"0.weight": ("tp", None), "2.weight": (None, "tp")}


class Halves(nn.Module):
    """Equal blocks, each of which gives a number that is returned, and that no block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(8, 32) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(32, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        numbers = []
        for up, down in zip(self.up, self.down, strict=True):
            inner = torch.tanh(up(x))
            numbers.append(inner.mean())
            x = x + down(inner)
        return [x.square().sum(), *numbers]


def test_a_block_gives_what_is_only_returned() -> None:
    """The function of repeated lines returns it, and the program has a name for it."""
    model = Halves()
    plan = make_plan(model, 2, example_inputs=torch.ones(4, 8))
    functions = {
        each.name: each
        for each in ast.parse(export(plan, "python", model).text).body
        if isinstance(each, ast.FunctionDef)
    }
    assert "forward_block" in functions
    whole = functions["forward"]
    stored, read = (
        {
            node.id
            for statement in statements
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, kind)
        }
        for statements, kind in ((whole.body[:-1], ast.Store), (whole.body[-1:], ast.Load))
    )
    assert len(read) == 5
    assert read <= stored


class Attention(nn.Module):
    """Attention that counts heads, and leaves it to view how large they are.

    With parts for weights its code would run, and compute heads of half the size.
    """

    def __init__(self, counts_heads: bool) -> None:
        super().__init__()
        self.counts_heads = counts_heads
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = (
            (batch, length, HEADS, -1) if self.counts_heads else (batch, length, -1, 32 // HEADS)
        )
        query, key, value = (
            product(x).view(shape).transpose(1, 2) for product in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize("counts_heads", [False, True])
def test_parts_go_on_only_where_the_code_makes_the_plans_parts(counts_heads: bool) -> None:
    """A view that counts heads would compute something else on parts, without a word."""
    model, inputs = Attention(counts_heads), torch.ones(2, 8, 32)
    plan = make_plan(model, 2, example_inputs=inputs, sequence_parallel=False, hardware="dgx-a100")
    splits = module_splits(plan, model, example_inputs=inputs)
    assert {split.path: split.kind for split in splits.modules} == {
        "query": "column", "key": "column", "value": "column", "out": "row",
    }  # fmt: skip
    assert {split.gathered for split in splits.modules} == {counts_heads}
    assert any("has sizes of its own" in text for text in splits.missing) == counts_heads


class Aside(nn.Module):
    """Reads one weight outside of its module, another one through a view, and a bias twice."""

    def __init__(self) -> None:
        super().__init__()
        self.outside, self.viewed = nn.Linear(32, 64, bias=False), nn.Linear(64, 96, bias=False)
        self.twice = nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x, self.outside.weight) @ self.viewed.weight.t()
        return self.twice(hidden.relu()) * self.twice.bias


def test_weights_that_others_read_stay_whole() -> None:
    """Who splits a module sees only what its own forward does."""
    model, inputs = Aside(), torch.ones(2, 8, 32)
    pins = {"outside.weight": Shard(0), "viewed.weight": Shard(1), "twice.weight": Shard(0),
            "twice.bias": Shard(0)}  # fmt: skip
    plan = make_plan(model, 2, example_inputs=inputs, sequence_parallel=False, pins=pins)
    splits = module_splits(plan, model, example_inputs=inputs)
    assert splits.modules == ()
    told = "\n".join(splits.missing)
    assert "outside.weight is read in the model, and not in its own module alone" in told
    assert "twice.bias is read in the model, and not in its own module alone" in told
    assert "viewed.weight is S(1): aten" in told


def test_repeated_lines_are_folded_only_where_they_correspond() -> None:
    """Names must be the same ones in every group; numbers may differ."""
    program = "b = f(a, w1, 1)\nc = g(b, a)\nd = f(c, w2, 2)\ne = g(d, {})\nh(e)"
    variable = ["a", "b", "c", "d", "e", "w1", "w2"]
    same = fold_statements(ast.parse(program.format("c")).body, variable)
    assert same is not None
    assert (same.count, same.arguments, same.results) == (2, ("a", "w1"), ("c",))
    assert same.calls == ((("a", "w1"), ("c",), (1,)), (("c", "w2"), ("e",), (2,)))
    assert fold_statements(ast.parse(program.format("b")).body, variable) is None


def test_an_unknown_target_is_refused(planned: tuple[GPT, Plan]) -> None:
    """With those that there are."""
    model, plan = planned
    with pytest.raises(PlanError, match="parallelize_module"):
        autoparallel.export(plan, "alpa", model)


def test_megatron_has_these_arguments(planned: tuple[GPT, Plan]) -> None:
    """Megatron-Core's own configuration takes each, by its name and with its value."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    _, plan = planned
    recomputed = replace(plan, recompute=(("blocks.0", "full"), ("blocks.1", "none")))
    for one in (plan, recomputed):
        values: dict[str, object] = {}
        for line in megatron_arguments(one).text.splitlines():
            words = [] if line.startswith("#") else re.split(r" (?=--)", line)
            for word in words:
                name, _, value = word.removeprefix("--").partition(" ")
                values[name.replace("-", "_")] = int(value) if value.isdecimal() else value or True
        # It is of the optimizer, and not of the model.
        values.pop("use_distributed_optimizer", None)
        config = TransformerConfig(num_layers=2, hidden_size=48, num_attention_heads=4, **values)
        # Without data parallelism, products are split on both axes.
        assert config.tensor_model_parallel_size == 4
        assert config.recompute_granularity == values.get("recompute_granularity")


@pytest.mark.optional
def test_torchtitan_reads_its_command_line(planned: tuple[GPT, Plan]) -> None:
    """By torchtitan's own parser and configuration, where 0.3 or later is installed."""
    tyro = pytest.importorskip("tyro")
    configs = pytest.importorskip("torchtitan.config.configs")
    checkpoints = pytest.importorskip("torchtitan.distributed.activation_checkpoint")
    config = make_dataclass(
        "Config",
        [
            (
                "parallelism",
                configs.ParallelismConfig,
                field(default_factory=configs.ParallelismConfig),
            ),
            (
                "activation_checkpoint",
                checkpoints.ActivationCheckpointingConfig,
                field(default_factory=checkpoints.SelectiveAC.Config),
            ),
        ],
    )
    _, plan = planned
    (line,) = [
        line.removeprefix(TORCHTITAN_COMMAND)
        for line in torchtitan_toml(plan).text.splitlines()
        if line.startswith(TORCHTITAN_COMMAND)
    ]
    read = tyro.cli(config, args=line.split())
    assert read.parallelism.tensor_parallel_degree == 4
    assert read.parallelism.data_parallel_replicate_degree == 1
    assert read.parallelism.data_parallel_shard_degree == 1
    assert read.activation_checkpoint is None


@pytest.mark.optional
def test_deepspeed_reads_its_partition(planned: tuple[GPT, Plan]) -> None:
    """By DeepSpeed's own reader, where it is installed."""
    config = pytest.importorskip("deepspeed.module_inject.autotp_config")
    model, plan = planned
    text = export(plan, "deepspeed", model, example_inputs=model.example_inputs(4, 16)).text
    partition = json.loads(text)["tensor_parallel"]["partition_config"]
    read = config.AutoTPConfig.from_dict(partition)
    kinds = {spec.partition_type.value for spec in read.layer_specs}
    assert kinds <= {"column", "row"}
    assert read.find_matching_spec("blocks.1.feed_forward.expand.weight") is not None
