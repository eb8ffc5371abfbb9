"""Exports are loaded into what they are for, on two gloo processes: the logits are the model's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from broad_cases import broad
from families import Float64
from processes import run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from autoparallel import make_plan
from autoparallel.exports.emitted_script import emitted_script
from autoparallel.exports.parallelize_module import parallelize_module_source
from autoparallel.exports.transformers_plan import transformers_plan
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.train.models import GPT, GPTConfig

WORLD_SIZE = 2
# Activations are whole between the products, as those programs have them.
OPTIONS = {"hardware": "dgx-a100", "sequence_parallel": False}


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


@dataclass(frozen=True)
class Loaded:
    """What one rank has found: the largest differences of logits and of gradients from the unsplit
    model's, and the number of split parameters, for each export by name.
    """

    logits: dict[str, float]
    gradients: dict[str, float]
    split: dict[str, int]


def run_exports(rank: int, name: str, texts: dict[str, str], folder: str) -> Loaded:
    """Load every export into what it is for, on one rank."""
    found = Loaded({}, {}, {})
    run_parallelized(name, texts["parallelize_module"], found)
    run_script(name, texts["python"], found)
    if "transformers" in texts:
        run_transformers(name, texts["transformers"], folder, found)
    return found


def run_parallelized(name: str, source: str, found: Loaded) -> None:
    """Torch's parallelize_module: logits, and gradients of all parameters."""
    plain, model = model_of(name), model_of(name)
    names: dict[str, Any] = {}
    exec(compile(source, "exported.py", "exec"), names)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("tp",))
    model = names["parallelize"](model, mesh)
    expected, output = plain(**inputs()), model(**inputs())
    expected.loss.backward()
    output.loss.backward()
    wanted = dict(plain.named_parameters())
    worst, split = 0.0, 0
    for path, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            split += not all(placement.is_replicate() for placement in gradient.placements)
            gradient = gradient.full_tensor()
        worst = max(worst, float((gradient - wanted[path].grad).abs().max()))
    key = "parallelize_module"
    found.logits[key] = float((output.logits - expected.logits).detach().abs().max())
    found.gradients[key], found.split[key] = worst, split


def run_script(name: str, source: str, found: Loaded) -> None:
    """The program as a file of its own: logits, and gradients of all parameters."""
    names: dict[str, Any] = {"__name__": "sharded"}
    exec(compile(source, "sharded.py", "exec"), names)
    plain = model_of(name)
    model = names["sharded_model"](plain.state_dict())
    tokens = inputs()["input_ids"]
    with Float64():
        expected = plain(tokens).logits
    (logits,) = model(tokens)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    (expected * weights).sum().backward()
    (logits * weights).sum().backward()
    model.finish_gradients()
    wanted = {path: p.grad for path, p in plain.named_parameters()}
    worst, split = 0.0, 0
    for path, parameter in model.named_parameters():
        layout = model._layouts[path][0]
        part = take_layout_part(wanted[path], layout, model.ranks.sizes, model.ranks.coordinates)
        worst = max(worst, float((parameter.grad - part).abs().max()))
        split += part.shape != wanted[path].shape
    found.logits["python"] = float((model.whole(logits, 0) - expected).detach().abs().max())
    found.gradients["python"], found.split["python"] = worst, split


def run_transformers(name: str, entries: str, folder: str, found: Loaded) -> None:
    """transformers' own tensor parallelism: logits."""
    import transformers
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
    found.logits["transformers"] = float((logits - expected).abs().max())
    found.split["transformers"] = len(split)


@pytest.mark.parametrize(
    ("name", "split"),
    [*broad(("GPT2LMHeadModel", 1)), ("LlamaForCausalLM", 15), ("GPT", None)],
)
def test_exports_compute_what_the_model_does(name: str, split: int | None, tmp_path: Path) -> None:
    """Loaded into the real thing. split: the parameters that transformers splits."""
    model = model_of(name)
    plan = make_plan(model, WORLD_SIZE, example_inputs=inputs(), **OPTIONS)
    exports = {
        "parallelize_module": parallelize_module_source(plan, model, example_inputs=inputs())
    }
    # Transformers casts to float32 here and there, which a program has as casts to float64.
    with Float64():
        tokens = {"input_ids": inputs()["input_ids"]}
        exports["python"] = emitted_script(
            make_plan(model, WORLD_SIZE, example_inputs=tokens, **OPTIONS), model
        )
    if split is not None:
        exports["transformers"] = transformers_plan(plan, model, example_inputs=inputs())
        model.save_pretrained(tmp_path)
        told = "\n".join(exports["transformers"].missing)
        # Of GPT-2 transformers splits only what is no Conv1D; the rest is told.
        other = "a Conv1D has its weight the other way around"
        assert (other in told) == (name == "GPT2LMHeadModel")
    script = exports["python"].text
    assert script.count("forward_block(") >= 3  # its definition, and two calls
    assert "# all-reduce " in script
    texts = {target: export.text for target, export in exports.items()}
    arguments = (name, texts, str(tmp_path))
    before = partial(model_of, name)
    for found in run_processes(run_exports, WORLD_SIZE, *arguments, before=before):
        assert found.logits.keys() == texts.keys()
        assert max(found.logits.values()) < 1e-12
        assert max(found.gradients.values()) < 1e-12
        # Weights and biases of the products of two layers, at least.
        assert min(found.split["parallelize_module"], found.split["python"]) >= 8
        assert found.split.get("transformers") == split
