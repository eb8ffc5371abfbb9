"""Exports for libraries that not every machine has are loaded into the real thing, where it is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_processes
from test_loaded_exports import OPTIONS, WORLD_SIZE, inputs, model_of
from torch import nn

from autoparallel import Mesh, make_plan
from autoparallel.exports.targets import export
from autoparallel.placement import layout_text

pytestmark = pytest.mark.optional
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
HAS_JAX = importlib.util.find_spec("jax") is not None


def run_deepspeed(rank: int, name: str, text: str) -> tuple[float, int]:
    """How far DeepSpeed's logits are from the unsplit model's, and how many weights it splits."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed

    plain, model = model_of(name), model_of(name)
    whole = {path: parameter.shape for path, parameter in plain.named_parameters()}
    config = {**json.loads(text), "train_micro_batch_size_per_gpu": 1}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=optimizer, dist_init_required=False
    )
    output, expected = engine(**inputs()), plain(**inputs())
    parts = dict(engine.module.named_parameters())
    split = sum(parts[path].shape != shape for path, shape in whole.items())
    return float((output.logits - expected.logits).detach().abs().max()), split


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
@pytest.mark.parametrize(("name", "split"), [("GPT", 10), ("LlamaForCausalLM", 9)])
def test_deepspeed_computes_what_the_model_does(name: str, split: int) -> None:
    """Its engine splits the modules that the configuration names, and computes the same logits.

    split: weights, and biases of columns, in both layers; and the head. Keys and values, which the
    plan gives their inputs in parts, are whole, as the export tells. DeepSpeed reduces no gradients
    in float64.
    """
    model = model_of(name)
    plan = make_plan(model, WORLD_SIZE, example_inputs=inputs(), **OPTIONS)
    text = export(plan, "deepspeed", model, example_inputs=inputs()).text
    for apart, parts in run_processes(run_deepspeed, WORLD_SIZE, name, text):
        assert apart < 1e-12
        assert parts == split


# What JAX does with the specs: every parameter and input placed, the model run, its output told.
IN_JAX = """
import json, sys
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh, NamedSharding
names, numbers = {}, np.load("numbers.npz")
exec(open("specs.py").read(), names)
devices = np.array(jax.devices()).reshape(names["SIZES"])
mesh = Mesh(devices, names["AXES"])
placed = {
    path: jax.device_put(numbers[path], NamedSharding(mesh, spec))
    for path, spec in names["PARAMETERS"].items()
}
def forward(parameters, x):
    hidden = jax.numpy.maximum(x @ parameters["0.weight"].T, 0.0)
    return hidden @ parameters["2.weight"].T
output = jax.jit(forward)(placed, numbers["x"])
np.save("output.npy", np.asarray(output))
at = {device: list(map(int, place)) for place, device in np.ndenumerate(devices)}
parts = {
    path: [[at[part.device], np.asarray(part.data).tolist()] for part in array.addressable_shards]
    for path, array in placed.items()
}
print(json.dumps(parts))
"""


@pytest.mark.skipif(not HAS_JAX, reason="jax is not installed")
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(dp=2, tp=2)], ids=str)
def test_jax_places_what_the_plan_does(mesh: Mesh, tmp_path: Path) -> None:
    """On host devices, by NamedSharding: each has its part, and the output is the model's."""
    import numpy as np

    from autoparallel.runtime.tensor_parts import take_layout_part

    torch.manual_seed(0)
    layers = [nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False)]
    model, x = nn.Sequential(*layers).double(), torch.randn(4, 8, dtype=torch.float64)
    plan = make_plan(model, mesh=mesh, example_inputs=x, hardware="dgx-a100", data_parallel=False)
    (tmp_path / "specs.py").write_text(export(plan, "jax", model).text)
    numbers = {path: p.detach().numpy() for path, p in model.named_parameters()}
    np.savez(tmp_path / "numbers.npz", x=x.numpy(), **numbers)
    devices = f"--xla_force_host_platform_device_count={mesh.world_size}"
    run = subprocess.run(
        [sys.executable, "-c", IN_JAX],
        cwd=tmp_path,
        env={**os.environ, "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    output = torch.from_numpy(np.load(tmp_path / "output.npy"))
    assert torch.allclose(output, model(x), rtol=1e-12)
    sizes = tuple(size for _, size in mesh.axes)
    weights = dict(model.named_parameters())
    for path, parts in json.loads(run.stdout).items():
        layout = plan.storage[path]
        assert len(parts) == mesh.world_size, layout_text(layout)
        for place, numbers_there in parts:
            wanted = take_layout_part(weights[path].detach(), layout, sizes, tuple(place))
            assert wanted.tolist() == numbers_there
