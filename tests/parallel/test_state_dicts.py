"""Torch's own recipes for state dicts and checkpoints give and take the unsplit model's values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from broad_cases import broad
from processes import run_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.state_dicts import full_state_dict
from autoparallel.placement import Invariant, Shard

pytestmark = pytest.mark.usefixtures("one_trace")

WHOLE = StateDictOptions(full_state_dict=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class Attention(nn.Module):
    """q, k and v in one weight, which is split in three blocks; three heads divide by no two."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(heads * width, 3 * heads * width)
        self.out = nn.Linear(heads * width, heads * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, size = x.shape
        packed = self.qkv(x).view(rows, length, 3, self.heads, size // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(rows, length, size))


class Model(nn.Module):
    """Fused weights, tied weights, a buffer, a frozen parameter, and a size that divides by none.

    gate and up are one weight in two blocks of 35 rows each.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        size = heads * 4
        self.embed = nn.Embedding(22, size)
        self.attention = Attention(heads, 4)
        self.gate_up = nn.Linear(size, 70)
        self.down = nn.Linear(35, size)
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, 22, bias=False)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([1.5, 2.5]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.attention(self.embed(ids))
        gate, up = self.gate_up(x).chunk(2, -1)
        x = self.norm(x + self.down(nn.functional.silu(gate) * up)) * self.scale.sum()
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.roll(-1, 1).flatten())


def plain(heads: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Model(heads).double()


def trained(model: Any, steps: int, optimizer: Any = None) -> Any:
    """Make some steps, which depend on the number of steps alone; return the optimizer."""
    if optimizer is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        # The keys' bias has no gradient but rounding, which a small epsilon would blow up.
        optimizer = torch.optim.AdamW(trainable, lr=0.01, eps=0.01, foreach=steps % 2 == 0)
    for step in range(steps):
        ids = torch.randint(22, (2, 8), generator=torch.Generator().manual_seed(step))
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def values(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors in nested dicts by their paths; whole, as the user gets them of DTensors."""
    if isinstance(tree, dict):
        parts = [values(value, f"{path}/{key}") for key, value in tree.items()]
        return {name: value for part in parts for name, value in part.items()}
    if isinstance(tree, DTensor):
        return {path: tree.full_tensor()}
    return {path: tree} if isinstance(tree, torch.Tensor) else {}


def require_same(got: Any, expected: Any, tolerance: float = 0.0) -> None:
    ours, theirs = values(got), values(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def every_recipe(rank: int, heads: int, mesh: Mesh, folder: Path) -> set[str]:
    """Load and save in every way; return the kinds of layouts that the parameters had."""
    model, other = plain(heads), plain(heads, seed=1)
    example = (torch.zeros(2, 8, dtype=torch.long),)
    # Heads stay whole; where their number divides by the ranks, that says nothing.
    blocks = Shard(0, 3, 4 if heads % mesh.axes[-1][1] else 1)
    outer = (Invariant(),) * (len(mesh.axes) - 1)
    pins = {"attention.qkv.weight": (*outer, blocks), "gate_up.weight": (*outer, Shard(0, 2))}

    plan = autoparallel.make_plan(model, mesh=mesh, example_inputs=example, pins=pins)
    split, fresh = autoparallel.apply_plan(model, plan), autoparallel.apply_plan(other, plan)
    layouts = state_of(split).layouts.values()
    # The weights of the unsplit model, in what torch gives for a state dict.
    require_same(split.state_dict(), model.state_dict())
    require_same(get_model_state_dict(split, options=WHOLE), model.state_dict())
    offloaded = StateDictOptions(full_state_dict=True, cpu_offload=True)
    on_first = get_model_state_dict(split, options=offloaded)
    require_same(on_first, model.state_dict() if rank == 0 else {})

    # Weights and the optimizer's state of an unsplit training are taken, and gone on with.
    optimizer, split_optimizer = trained(model, 3), trained(split, 1)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=WHOLE))
    for options in (FROM_FIRST, WHOLE):
        given = model.state_dict() if rank == 0 or options is WHOLE else {}
        set_model_state_dict(split, dict(given), options=options)
        require_same(full_state_dict(split), model.state_dict())
        given = copy.deepcopy(state) if rank == 0 or options is WHOLE else {}
        set_optimizer_state_dict(split, split_optimizer, given, options=options)
        got = get_optimizer_state_dict(split, split_optimizer, options=WHOLE)
        require_same(got["state"], state["state"])
        with torch.no_grad():
            for parameter in split.parameters():
                parameter.mul_(0)
            for entries in split_optimizer.state.values():
                entries["exp_avg"].mul_(0)
    set_model_state_dict(split, model.state_dict(), options=WHOLE)
    set_optimizer_state_dict(split, split_optimizer, state, options=WHOLE)

    # A checkpoint of torch's: all ranks write their parts, others read them, also the plain model.
    dcp.save(
        {
            "model": split.state_dict(),
            "optimizer": get_optimizer_state_dict(split, split_optimizer),
        },
        checkpoint_id=folder,
    )
    fresh_optimizer = trained(fresh, 1)
    held = {
        "model": fresh.state_dict(),
        "optimizer": get_optimizer_state_dict(fresh, fresh_optimizer),
    }
    dcp.load(held, checkpoint_id=folder)
    fresh.load_state_dict(held["model"])
    set_optimizer_state_dict(fresh, fresh_optimizer, held["optimizer"])
    require_same(full_state_dict(fresh), model.state_dict())
    read = {"model": {name: torch.zeros_like(v) for name, v in model.state_dict().items()}}
    dcp.load(read, checkpoint_id=folder)
    require_same(read["model"], model.state_dict())
    trained(model, 2, optimizer)
    for module, its_optimizer in ((split, split_optimizer), (fresh, fresh_optimizer)):
        trained(module, 2, its_optimizer)
        require_same(full_state_dict(module), model.state_dict(), 1e-12)

    # Torch's other ways to load: within another module, parts of a dict, new parameters, misfits.
    nn.ModuleDict({"inner": split}).load_state_dict(nn.ModuleDict({"inner": model}).state_dict())
    require_same(full_state_dict(split), model.state_dict())
    few = {"gate_up.weight": other.gate_up.weight, "unknown": torch.ones(1)}
    keys = split.load_state_dict(few, strict=False)
    assert keys.unexpected_keys == ["unknown"]
    assert len(keys.missing_keys) == len(model.state_dict()) - 1
    changed = {**model.state_dict(), "gate_up.weight": other.gate_up.weight}
    require_same(full_state_dict(split), changed)
    split.load_state_dict(model.state_dict(), assign=True)
    require_same(full_state_dict(split), model.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for attention.qkv.weight"):
        split.load_state_dict({"attention.qkv.weight": torch.ones(7, 4)}, strict=False)
    return {str(cut) for layout in layouts for cut in layout}


@pytest.mark.parametrize(
    ("heads", "mesh", "kinds"),
    [
        *broad((4, Mesh(tp=2), ["S(0, blocks=2)", "S(0, blocks=3)"])),
        # The heads do not divide: the user and the optimizer have equal parts.
        (5, Mesh(tp=3), ["S(0)", "S(0, blocks=2)"]),
        pytest.param(
            4,
            Mesh(dp=2, tp=2),
            ["S(0, blocks=2)", "S(0, blocks=3)"],
            marks=pytest.mark.broad,
        ),
    ],
    ids=str,
)
def test_torchs_recipes(heads: int, mesh: Mesh, kinds: list[str], tmp_path: Path) -> None:
    for seen in run_processes(every_recipe, mesh.world_size, heads, mesh, tmp_path):
        assert set(kinds) <= seen
