"""Batches of each rank's own, and torch's DeviceMesh: parity with the unsplit model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_processes
from small_classifier import plain, rows
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import autoparallel
from autoparallel.errors import InputMismatchError, PlanError, WorldSizeError
from autoparallel.mesh import Mesh
from autoparallel.parallel.local_inputs import LocalInputs
from autoparallel.parallel.state_dicts import full_state_dict


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        path: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for path, p in model.named_parameters()
        if p.grad is not None
    }


def agree(model: nn.Module, local: Any, whole: Any) -> None:
    """Loss, every gradient and the inputs' gradients are those of the whole batch, unsplit."""
    reference = plain()
    start = sum(len(x) for x, _ in whole[0])
    x, labels = (torch.cat(parts) for parts in zip(*whole[1], strict=True))
    x.requires_grad_()
    expected = reference(x, labels)
    expected.backward()
    own = local[0].clone().requires_grad_()
    model.zero_grad()
    loss = model(own, local[1])
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for path, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(reference)[path], rtol=1e-10, atol=1e-13)
    assert x.grad is not None
    assert own.grad is not None
    torch.testing.assert_close(own.grad, x.grad[start : start + len(own)], rtol=1e-10, atol=1e-13)


def agree_twice(model: nn.Module, local: Any, whole: Any) -> None:
    """So it is with a penalty on the gradients of the inputs, to which each rank adds its rows."""

    def penalized(module: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> None:
        module.zero_grad()
        loss = module(x, labels)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + 100 * first.square().sum()).backward()

    reference = plain()
    start = sum(len(x) for x, _ in whole[0])
    x, labels = (torch.cat(parts) for parts in zip(*whole[1], strict=True))
    penalized(reference, x.requires_grad_(), labels)
    own = local[0].clone().requires_grad_()
    penalized(model, own, local[1])
    for path, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(reference)[path], rtol=1e-10, atol=1e-13)
    assert x.grad is not None
    assert own.grad is not None
    torch.testing.assert_close(own.grad, x.grad[start : start + len(own)], rtol=1e-10, atol=1e-13)


def work_with_local_batches(rank: int) -> None:
    """On 2 x 2 ranks each of two batches goes to two ranks; lengths differ, and one is empty."""
    mesh = Mesh(dp=2, tp=2)
    row = rank // 2
    first = [rows(4, 0), rows(4, 1)]
    model = autoparallel.autoparallelize(
        plain(), mesh=mesh, example_inputs=first[row], local_inputs="dp"
    )
    for lengths in ((4, 4), (5, 3), (0, 7)):
        batches = [rows(count, seed) for seed, count in enumerate(lengths)]
        agree(model, batches[row], (batches[:row], batches))
        agree_twice(model, batches[row], (batches[:row], batches))
    # As training scripts have it; the last batches have two rows and one.
    data = TensorDataset(*rows(11, 9))
    sampler: Any = DistributedSampler(data, 2, row, shuffle=True, seed=1)
    others = [DistributedSampler(data, 2, each, shuffle=True, seed=1) for each in range(2)]
    loaders = [DataLoader(data, 4, sampler=other) for other in others]
    for local, *all_of_them in zip(DataLoader(data, 4, sampler=sampler), *loaders, strict=True):
        agree(model, local, (all_of_them[:row], all_of_them))
    # Told before any tensor is exchanged: the ranks would wait for each other for ever.
    x, labels = rows(4, 0)
    with pytest.raises(InputMismatchError, match="called in different ways"):
        model(x if row else x.float(), labels)
    with pytest.raises(InputMismatchError, match="called in different ways"):
        model(x, labels, *([torch.ones(())] if row else []))
    # Planned at the first call; only some of the arguments are local.
    later = autoparallel.autoparallelize(
        plain(), mesh=mesh, local_inputs={"x": "dp", "labels": "dp"}
    )
    agree(later, first[row], (first[:row], first))
    scale = torch.full((1, 5), 2.0, dtype=torch.float64)
    whole = [torch.cat(parts) for parts in zip(*first, strict=True)]
    torch.testing.assert_close(later(*first[row], scale), plain()(*whole, scale))


def test_each_rank_brings_its_own_batch() -> None:
    run_processes(work_with_local_batches, 4)


def work_on_a_part(rank: int) -> None:
    """Two models, each split over two of four ranks, see batches of their own."""
    devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    row = rank // 2
    batch = rows(4, row)
    reference = plain()
    reference(*batch).backward()
    model: Any = autoparallel.autoparallelize(
        plain(), mesh=devices["tp"], example_inputs=batch, local_inputs=()
    )
    assert model.plan.mesh == Mesh(tp=2)
    assert model.plan.split_flops == 1.0
    loss = model(*batch)
    loss.backward()
    torch.testing.assert_close(loss, reference(*batch), rtol=1e-12, atol=0)
    for path, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(reference)[path], rtol=1e-10, atol=1e-13)
    assert full_state_dict(model)["up.weight"].equal(reference.up.weight)
    # All of it, and the plan of another run.
    plan = autoparallel.make_plan(plain(), mesh=devices, example_inputs=batch)
    whole = autoparallel.apply_plan(plain(), plan, mesh=devices, local_inputs="dp")
    batches = [rows(4, 0), rows(4, 1)]
    agree(whole, batch, (batches[:row], batches))
    with pytest.raises(PlanError, match="the DeviceMesh is"):
        autoparallel.apply_plan(plain(), plan, mesh=devices["tp"])
    # Four ranks that know of no part: two are too few.
    with pytest.raises(WorldSizeError, match="DeviceMesh"):
        autoparallel.autoparallelize(plain(), 2, example_inputs=batch)


def test_a_part_of_a_device_mesh() -> None:
    run_processes(work_on_a_part, 4)


def work_on_two_axes_of_three(rank: int) -> None:
    """A part of several axes has a group of its own."""
    devices = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pp", "dp", "tp"))
    batch = rows(4, 0)
    part: Any = devices["dp", "tp"]
    model: Any = autoparallel.autoparallelize(plain(), mesh=part, example_inputs=batch)
    assert model.plan.mesh == Mesh(dp=2, tp=1)
    reference = plain()
    torch.testing.assert_close(model(*batch), reference(*batch), rtol=1e-12, atol=0)
    nameless = init_device_mesh("cpu", (4,))
    with pytest.raises(PlanError, match="no names"):
        autoparallel.autoparallelize(plain(), mesh=nameless, example_inputs=batch)


def test_several_axes_of_a_device_mesh() -> None:
    run_processes(work_on_two_axes_of_three, 4)


def test_requests_that_no_mesh_has() -> None:
    with pytest.raises(PlanError, match="no axis of"):
        LocalInputs.of("data", Mesh(dp=2))
    with pytest.raises(PlanError, match="not chosen yet"):
        autoparallel.autoparallelize(plain(), 4, mesh="auto", local_inputs="dp")
