"""Exports are loaded into what they are for, on two gloo processes: the logits are the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import nn

from autoparallel import make_plan
from autoparallel.exports.emitted_script import emitted_script
from autoparallel.exports.parallelize_module import parallelize_module_source
from autoparallel.exports.transformers_plan import transformers_plan
from autoparallel.plan import Plan
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.train.models import GPT, GPTConfig

WORLD_SIZE = 2
MODELS = ("GPT2LMHeadModel", "LlamaForCausalLM", "GPT")


def model_of(name: str) -> nn.Module:
    """A small model in float64, with the same weights in every process."""
    torch.manual_seed(0)
    if name == "GPT":
        return GPT(GPTConfig(2, 48, 4, 64, 32, 0.0)).double()
    import transformers

    transformers.logging.set_verbosity_error()
    common = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "use_cache": False}
    if name == "GPT2LMHeadModel":
        config: Any = transformers.GPT2Config(
            n_layer=2, n_embd=48, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, **common,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, **common,
        )  # fmt: skip
    return getattr(transformers, name)(config).double()


def inputs() -> dict[str, torch.Tensor]:
    """Two sequences."""
    tokens = torch.arange(16).reshape(2, 8) * 7 % 64
    return {"input_ids": tokens, "labels": tokens}


def plan_of(name: str, model: nn.Module) -> Plan:
    """Its plan for two ranks, with activations whole between the products."""
    return make_plan(model, WORLD_SIZE, example_inputs=inputs(), hardware="dgx-a100",
                     sequence_parallel=False)  # fmt: skip


def run_parallelized(rank: int, source: str, name: str) -> tuple[float, float, int]:
    """The largest differences of logits and gradients, and the split parameters, on one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    plain, model = model_of(name), model_of(name)
    names: dict[str, Any] = {}
    exec(compile(source, "exported.py", "exec"), names)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("tp",))
    model = names["parallelize"](model, mesh)
    expected, output = plain(**inputs()), model(**inputs())
    expected.loss.backward()
    output.loss.backward()
    worst, split = 0.0, 0
    wanted = dict(plain.named_parameters())
    for path, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            split += not all(placement.is_replicate() for placement in gradient.placements)
            gradient = gradient.full_tensor()
        worst = max(worst, float((gradient - wanted[path].grad).abs().max()))
    return float((output.logits - expected.logits).abs().max()), worst, split


@pytest.mark.parametrize("name", MODELS)
def test_parallelize_module_computes_what_the_model_does(name: str) -> None:
    """Logits, and gradients of all parameters."""
    model = model_of(name)
    export = parallelize_module_source(plan_of(name, model), model, example_inputs=inputs())
    for logits, gradients, split in run_processes(run_parallelized, WORLD_SIZE, export.text, name):
        assert logits < 1e-12
        assert gradients < 1e-12
        # Weights and biases of the products of two layers, at least.
        assert split >= 8


def run_script(rank: int, source: str, name: str) -> tuple[float, float]:
    """The largest differences of logits and of gradients on one rank."""
    names: dict[str, Any] = {"__name__": "sharded"}
    exec(compile(source, "sharded.py", "exec"), names)
    plain = model_of(name)
    model = names["sharded_model"](plain.state_dict())
    tokens = inputs()["input_ids"]
    expected, (logits,) = plain(tokens).logits, model(tokens)
    # Transformers computes losses in float32, whose rounding depends on how classes are split.
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    (expected * weights).sum().backward()
    (logits * weights).sum().backward()
    model.finish_gradients()
    wanted = {path: p.grad for path, p in plain.named_parameters()}
    worst = 0.0
    for path, parameter in model.named_parameters():
        layout = model._layouts[path][0]
        part = take_layout_part(wanted[path], layout, model.ranks.sizes, model.ranks.coordinates)
        worst = max(worst, float((parameter.grad - part).abs().max()))
    difference = (model.whole(logits, 0) - expected).detach().abs().max()
    return float(difference), worst


@pytest.mark.parametrize("name", MODELS)
def test_the_script_computes_what_the_model_does(name: str) -> None:
    """Logits, and gradients of all parameters; its repeated lines are one function."""
    model = model_of(name)
    tokens = {"input_ids": inputs()["input_ids"]}
    plan = make_plan(model, WORLD_SIZE, example_inputs=tokens, hardware="dgx-a100",
                     sequence_parallel=False)  # fmt: skip
    export = emitted_script(plan, model)
    assert export.text.count("forward_block(") >= 3  # its definition, and two calls
    assert "# all-reduce " in export.text
    for logits, gradients in run_processes(run_script, WORLD_SIZE, export.text, name):
        assert logits < 1e-12
        assert gradients < 1e-12


def run_transformers(rank: int, entries: str, name: str, folder: str) -> tuple[float, int]:
    """The largest difference of logits, and the number of split parameters, on one rank."""
    import transformers
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig

    transformers.logging.set_verbosity_error()
    model = getattr(transformers, name).from_pretrained(
        folder, distributed_config=DistributedConfig(**json.loads(entries)), dtype=torch.float64
    )
    with torch.no_grad():
        logits = model(**inputs()).logits
        logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
        expected = model_of(name).eval()(**inputs()).logits
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    split = [p for p in split if not all(placement.is_replicate() for placement in p.placements)]
    return float((logits - expected).abs().max()), len(split)


@pytest.mark.parametrize(("name", "parts"), [("LlamaForCausalLM", 15), ("GPT2LMHeadModel", 1)])
def test_transformers_computes_what_the_model_does(name: str, parts: int, tmp_path: Path) -> None:
    """The logits. Of GPT-2 transformers splits only what is no Conv1D; the rest is told."""
    model = model_of(name)
    export = transformers_plan(plan_of(name, model), model, example_inputs=inputs())
    model.save_pretrained(tmp_path)
    for logits, split in run_processes(
        run_transformers, WORLD_SIZE, export.text, name, str(tmp_path)
    ):
        assert logits < 1e-12
        assert split == parts
    told = "\n".join(export.missing)
    assert ("a Conv1D has its weight the other way around" in told) == (name == "GPT2LMHeadModel")
