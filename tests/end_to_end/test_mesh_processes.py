"""Training on a real mesh of two axes: optimizers, clipping, checkpoints, DTensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from broad_cases import broad
from changed_plans import copies_again, spread
from processes import run_processes
from torch import nn
from torch.distributed.tensor import DTensor
from traces import traced_once

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.parallel.checkpoint import load_checkpoint, save_checkpoint
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.parameters import as_distributed
from autoparallel.parallel.state_dicts import full_state_dict
from autoparallel.placement import Shard
from autoparallel.plan import Plan
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.train.models import GPT, GPTConfig

SIZES = GPTConfig(layers=1, hidden=40, heads=10, vocabulary=31, positions=16, dropout=0.2)
TOLERANCE = 1e-11
# Gradients are reduced to parts when they are all there, or each as soon as it is.
WAYS = ("as planned", "at the end", "at once")
Steps = list[tuple[float, float]]


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(31, (4, 13), generator=generator)
    return {"input_ids": tokens, "labels": tokens.roll(-1, 1)}


def plain() -> nn.Module:
    torch.manual_seed(8)
    model: nn.Module = GPT(SIZES).double()
    return model


@cache
def planned(mesh: Mesh) -> Plan:
    return autoparallel.make_plan(plain(), mesh=mesh, example_inputs=batch(0))


def made(mesh: Mesh, way: str = "as planned") -> tuple[nn.Module, torch.optim.Optimizer]:
    model, plan = plain(), planned(mesh)
    if way != "as planned":
        plan = spread(plan, at_once=way == "at once")
        plan = copies_again(plan) if way == "at once" else plan
    parallel = autoparallel.apply_plan(model, plan)
    autoparallel.manual_seed(parallel, 5)
    return parallel, torch.optim.AdamW(parallel.parameters(), lr=1e-2)


def three_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> Steps:
    """Losses and norms of the gradients; each step's gradient comes from two halves."""
    found = []
    for step in range(first, first + 3):
        total = 0.0
        for half in (0, 1):
            loss = model(**batch(2 * step + half)).loss / 2
            loss.backward()
            total += float(loss.detach())
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        found.append((total, float(norm)))
    return found


def plan_all() -> None:
    with traced_once():
        for mesh in (Mesh(dp=2, tp=2), Mesh(tp=4)):
            planned(mesh)


def on_the_mesh(rank: int, folder: Path, ways: tuple[str, ...]) -> dict[str, Any]:
    """In each way: three steps, a checkpoint, and three more on one axis; weights whole."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for way in ways:
        model, optimizer = made(Mesh(dp=2, tp=2), way)
        steps = three_steps(model, optimizer, 0)
        weights = full_state_dict(model)
        save_checkpoint(folder / way, model, optimizer)
        shares = [p.to_local().numel() / p.numel() for p in model.parameters()]  # type: ignore[attr-defined]
        other, its_optimizer = made(Mesh(tp=4))
        load_checkpoint(folder / way, other, its_optimizer)
        more = three_steps(other, its_optimizer, 3)

        found[way] = (steps, weights, more, min(shares))
    model, _ = made(Mesh(dp=2, tp=2))
    state = state_of(model)
    assert state.mesh is not None
    blocks, whole = Shard(0, blocks=3), torch.arange(96.0).view(24, 4)
    for layout in (
        (Shard(0), Shard(0)),
        (Shard(1), Shard(0)),
        (blocks, blocks),
        (blocks, Shard(1)),
    ):
        part = take_layout_part(whole, layout, state.ranks.sizes, state.ranks.coordinates)
        full = as_distributed(part.contiguous(), layout, (24, 4), state.mesh).full_tensor()
        found[str(layout)] = torch.equal(full, whole)
    return found


@pytest.mark.parametrize("ways", [WAYS[::2], *broad((WAYS,))], ids=len)
def test_training_is_that_of_one_process(ways: tuple[str, ...], tmp_path: Path) -> None:
    model, optimizer = made(Mesh(tp=1))
    expected = three_steps(model, optimizer, 0)
    weights = {path: value.clone() for path, value in model.state_dict().items()}
    after = three_steps(model, optimizer, 3)
    for found in run_processes(on_the_mesh, 4, tmp_path, ways, before=plan_all):
        for way in ways:
            steps, whole, more, share = found.pop(way)
            torch.testing.assert_close(steps, expected, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(more, after, rtol=0, atol=TOLERANCE)
            for path, value in weights.items():
                torch.testing.assert_close(whole[path], value, rtol=0, atol=TOLERANCE)
            assert way == "as planned" or share < 0.27
        assert all(found.values()), found
    for way in ("as planned", "at once"):
        alone, its_optimizer = made(Mesh(tp=1))
        load_checkpoint(tmp_path / way, alone, its_optimizer)
        more = three_steps(alone, its_optimizer, 3)
        torch.testing.assert_close(more, after, rtol=0, atol=TOLERANCE)
