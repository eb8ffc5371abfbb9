"""Checks on the device: the same numbers as the unsplit model, masks as on the CPU, flash kernels.

Each returns rows with the largest error that was seen and the one that is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from gpu_kit.setting import Setting

__all__ = ["families", "flash", "gloo_ranks", "masks", "single_nccl"]

# What rounding leaves of the numbers of an unsplit model whose sums are taken in another order.
ALLOWED = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 5e-2}


def _error(one: Any, other: Any) -> float:
    """Return the largest difference of two tensors, relative to the largest number."""
    one, other = one.detach().double(), other.detach().double()
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-6)).item()


def _whole(tensor: Any) -> torch.Tensor:
    """Return the whole of a tensor that may be split."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _compared(model: nn.Module, split: nn.Module, batch: dict[str, Any]) -> float:
    """Return the largest error of a step's loss and gradients, against the plain model's."""
    expected, loss = model(**batch).loss, split(**batch).loss
    expected.backward()
    loss.backward()
    errors = [_error(_whole(loss), expected)]
    plain = dict(model.named_parameters())
    for path, parameter in split.named_parameters():
        gradient = plain[path].grad
        # That of a bias in front of a softmax is nothing but rounding.
        if gradient is not None and gradient.abs().max() > 1e-7:
            errors.append(_error(_whole(parameter.grad), gradient))
    return max(errors)


def _row(what: str, error: float, dtype: torch.dtype) -> dict[str, Any]:
    """Return a row of a table of checks."""
    allowed = ALLOWED[dtype]
    return {"what": what, "error": error, "allowed": allowed, "right": bool(error <= allowed)}


def single_nccl(setting: Setting) -> Iterator[dict[str, Any]]:
    """Train at world size 1 in a process group of NCCL (of gloo without a GPU)."""
    import autoparallel

    backend = "nccl" if setting.cuda else "gloo"
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("KIT_PORT", "29571")}
    dist.init_process_group(backend)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = setting.gpt(layers=2).to(dtype)
        batch = setting.batch(model, 2)
        split = autoparallel.autoparallelize(model, 1, example_inputs=batch)
        yield _row(f"1 rank, {backend}, {dtype}", _compared(model, split, batch), dtype)
    dist.destroy_process_group()


def gloo_ranks(setting: Setting) -> Iterator[dict[str, Any]]:
    """Train as one of the ranks of gloo that share the device; torchrun has started them."""
    import autoparallel

    if setting.cuda:
        torch.cuda.set_device(0)
        os.environ["LOCAL_RANK"] = "0"  # all ranks are on one GPU
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    mesh = init_device_mesh(setting.device, (ranks,), mesh_dim_names=("tp",))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for sequence_parallel in (False, True):
            model = setting.gpt(layers=2).to(dtype)
            batch = setting.batch(model, 2)
            split = autoparallel.autoparallelize(
                model, mesh=mesh, example_inputs=batch, sequence_parallel=sequence_parallel
            )
            kind = "sequence parallel" if sequence_parallel else "tensor parallel"
            error = _compared(model, split, batch)
            yield _row(f"{ranks} ranks, gloo, {kind}, {dtype}", error, dtype)


def families(setting: Setting, names: list[str]) -> Iterator[dict[str, Any]]:
    """Compare families of the zoo with the plain model, at 2 and 4 simulated ranks, in float64."""
    import zoo
    from families import Float64

    import autoparallel

    for name in names:
        with Float64():  # models of transformers compute norms in float32 whatever their type
            yield from _family(setting, name, zoo, autoparallel.simulate)


def _family(setting: Setting, name: str, zoo: Any, simulate: Any) -> Iterator[dict[str, Any]]:
    """Compare one family. zoo: the module of families. simulate: this project's."""
    model = zoo.build(name, layers=2).to(setting.device)
    batch = {
        key: value.to(setting.device) if isinstance(value, torch.Tensor) else value
        for key, value in zoo.inputs_for(name).items()
    }
    loss = model(**batch).loss
    loss.backward()
    for ranks in (2, 4) if setting.cuda else (2,):
        ran = simulate(model, ranks, example_inputs=batch)
        errors = [_error(ran.output.loss, loss)]
        for path, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().max() > 1e-12:
                errors.append(_error(ran.gradients[path], parameter.grad))
        yield _row(f"{name}, {ranks} simulated ranks", max(errors), torch.float64)


class _Dropped(nn.Module):
    """Two dropouts of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.first, self.second = nn.Dropout(0.1), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x * self.scale))


def masks(setting: Setting) -> Iterator[dict[str, Any]]:
    """Compare masks of dropout on the device with those on the CPU, bit for bit."""
    import autoparallel

    x = torch.ones(513, 1031) if setting.cuda else torch.ones(33, 57)
    drawn = []
    for device in ("cpu", setting.device):
        model = _Dropped().to(device)
        split = autoparallel.autoparallelize(model, 1, example_inputs=(x.to(device),))
        autoparallel.manual_seed(split, 5)
        drawn.append([split(x.to(device)).detach().cpu() for _ in range(2)])
    same = all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))
    other = not torch.equal(drawn[0][0], drawn[0][1])
    row = {"what": "dropout masks equal the CPU's bit for bit", "error": float(not same)}
    yield {**row, "allowed": 0.0, "right": same and other}


def flash(setting: Setting) -> Iterator[dict[str, Any]]:
    """See that attention runs the flash kernel that the plain model runs."""
    from torch.profiler import ProfilerActivity, profile

    import autoparallel

    model = setting.gpt(layers=2).to(torch.bfloat16)
    batch = setting.batch(model, 2)
    split = autoparallel.autoparallelize(model, 1, example_inputs=batch)
    counts = []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.cuda else [])]
    for each in (model, split):
        with profile(activities=activities) as profiler:
            each(**batch).loss.backward()
            setting.wait()
        names = [event.key for event in profiler.key_averages() if "flash" in event.key.lower()]
        counts.append(sorted(names))
    same = bool(counts[0]) and counts[0] == counts[1]
    row = {"what": f"flash attention: {len(counts[1])} kinds of calls, as the plain model's"}
    yield {**row, "error": float(not same), "allowed": 0.0, "right": same}
