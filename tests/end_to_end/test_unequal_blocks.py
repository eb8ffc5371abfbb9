"""Weights of parts of unequal size, and heads that several ranks share: split without moving them.

Loss and every gradient are those of the unsplit model, simulated and on processes, in training, in
state dicts and from checkpoints.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from broad_cases import broad, share_of
from families import relative_error
from processes import run_processes
from quick_links import QUICK_LINKS
from torch import nn
from torch.nn import functional
from traces import trace_ahead

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.parallel.checkpoint import load_checkpoint, save_checkpoint
from autoparallel.parallel.state_dicts import full_state_dict
from autoparallel.placement import Shard
from autoparallel.plan import Plan

pytestmark = pytest.mark.usefixtures("one_trace")
TOLERANCE = 1e-12
WIDTH, HEADS = 6, 8


class Grouped(nn.Module):
    """Attention whose query, key and value are one weight, with fewer heads of keys than queries.

    keys: their heads. own: query, key and value are weights of their own. grouped: torch repeats
    the heads of keys, not the model.
    """

    def __init__(self, keys: int, own: bool = False, grouped: bool = False) -> None:
        super().__init__()
        self.keys, self.grouped = keys, grouped
        sizes = [WIDTH * HEADS, WIDTH * keys, WIDTH * keys]
        self.sizes = sizes
        outputs = sizes if own else [sum(sizes)]
        self.inner = nn.ModuleList(nn.Linear(16, size) for size in outputs)
        self.out = nn.Linear(WIDTH * HEADS, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        parts = [layer(x) for layer in self.inner]
        q, k, v = parts if len(parts) > 1 else parts[0].split(self.sizes, -1)
        q = q.view(rows, length, HEADS, WIDTH).transpose(1, 2)
        k, v = (part.view(rows, length, self.keys, WIDTH).transpose(1, 2) for part in (k, v))
        k = functional.normalize(k, dim=-1)
        if not self.grouped and self.keys < HEADS:
            times = HEADS // self.keys
            shape = (rows, self.keys, times, length, WIDTH)
            k, v = (
                part[:, :, None].expand(shape).reshape(rows, HEADS, length, WIDTH)
                for part in (k, v)
            )
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.grouped
        )
        return self.out(mixed.transpose(1, 2).reshape(rows, length, -1))


class Scan(nn.Module):
    """As in Mamba-2: one weight of a gate, a state, two projections in groups, and a step each."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups, state, size = groups, 4, HEADS * WIDTH
        self.sizes = [size, size + 2 * groups * state, HEADS]
        self.mixed = [size, groups * state, groups * state]
        self.inner = nn.Linear(16, sum(self.sizes), bias=False)
        channels = self.sizes[1]
        self.conv = nn.Conv1d(channels, channels, 3, groups=channels, padding=2)
        self.rate = nn.Parameter(torch.linspace(0.5, 1.5, HEADS))
        self.out = nn.Linear(size, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        gate, mixed, step = self.inner(x).split(self.sizes, -1)
        mixed = functional.silu(self.conv(mixed.transpose(1, 2))[..., :length]).transpose(1, 2)
        value, b, c = mixed.split(self.mixed, -1)
        value = value.view(rows, length, HEADS, WIDTH)
        value = value * functional.softplus(step * self.rate)[..., None]
        b, c = (
            part.view(rows, length, self.groups, -1).repeat_interleave(HEADS // self.groups, 2)
            for part in (b, c)
        )
        state = torch.einsum("blhn,blhd->bhnd", b, value)
        read = torch.einsum("blhn,bhnd->blhd", c, state).reshape(rows, length, -1)
        return self.out(read * functional.silu(gate))


class Model(nn.Module):
    """Two layers of one kind between an embedding and a loss."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 16), nn.Linear(16, 24)
        self.layers = nn.ModuleList(layers)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(functional.rms_norm(x, (16,)))
        return functional.cross_entropy(self.head(x).flatten(0, 1), ids.roll(-1, 1).flatten())


KINDS: dict[str, Any] = {
    "fused, a head of keys for each two of queries": lambda: Grouped(4),
    "fused, heads of keys repeated by attention": lambda: Grouped(2, grouped=True),
    "weights of their own": lambda: Grouped(2, own=True),
    "weights of their own, repeated by attention": lambda: Grouped(4, own=True, grouped=True),
    "a scan in groups": lambda: Scan(4),
}


# Those that are split in one of the two ways at four ranks already, each in another one.
TRAINED: dict[str, set[str]] = {
    "fused, heads of keys repeated by attention": {"unequal", "shared"},
    "weights of their own": {"shared"},
    "a scan in groups": {"unequal"},
}


def build(kind: str, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return Model(KINDS[kind](), KINDS[kind]()).double()


def tokens(step: int = 0) -> torch.Tensor:
    return torch.randint(24, (2, 9), generator=torch.Generator().manual_seed(step))


def split_ways(plan: Plan) -> set[str]:
    """How the weights are split: in unequal blocks, in parts that several ranks hold."""
    shards = [p for layout in plan.storage.values() for p in layout if isinstance(p, Shard)]
    ways = {"unequal" for shard in shards if isinstance(shard.blocks, tuple)}
    return ways | {"shared" for shard in shards if shard.repeat != 1}


@pytest.mark.parametrize("kind", share_of(KINDS, 2))
def test_gradients_are_those_of_one_device_and_nothing_is_exchanged(kind: str) -> None:
    """At 2 to 8 ranks, and at 3, which divide by no number of heads."""
    model, ids = build(kind), tokens()
    model(ids).backward()
    seen: set[str] = set()
    for world_size in (2, 3, 4, 8):
        plan = autoparallel.make_plan(
            build(kind), world_size, example_inputs=(ids,), hardware=QUICK_LINKS
        )
        assert Plan.from_json(plan.to_json()).storage == plan.storage
        made = autoparallel.simulate(build(kind), plan=plan, example_inputs=(ids,))
        for path, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert relative_error(made.gradients[path], parameter.grad, 1e-3) < TOLERANCE, path
        seen |= split_ways(plan)
        if world_size != 3:
            # Two around the embedding, and one for the gradients of all weights that several ranks
            # hold: none in the layers.
            once = "shared" in split_ways(plan)
            assert made.collectives.get("all_to_all", 0) <= 2 + once, world_size
    assert seen == {"shared"} | ({"unequal"} if "fused" in kind or "scan" in kind else set())


def trained(model: Any, steps: range, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.01)
    for step in steps:
        model(tokens(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def run(rank: int, kinds: tuple[str, ...], folder: Path) -> list[tuple[set[str], float]]:
    """Four ranks train two steps, save, are read by other modules and go on there."""
    torch.set_num_threads(1)
    found = []
    for number, kind in enumerate(kinds):
        plain, model = build(kind), build(kind)
        options: dict[str, Any] = {"example_inputs": (tokens(),), "hardware": QUICK_LINKS}
        model = autoparallel.autoparallelize(model, 4, **options)
        optimizer = trained(model, range(2))
        kept = trained(plain, range(2))
        save_checkpoint(folder / f"{number}", model, optimizer)
        again = build(kind, seed=5)
        mesh = Mesh(dp=2, tp=2) if number % 2 else Mesh(tp=4)
        again = autoparallel.autoparallelize(again, mesh=mesh, **options)
        other = torch.optim.AdamW(again.parameters(), lr=0.01, eps=0.01)
        load_checkpoint(folder / f"{number}", again, other)
        trained(again, range(2, 4), other)
        trained(plain, range(2, 4), kept)
        state = full_state_dict(again)
        apart = max(relative_error(state[path], p) for path, p in plain.state_dict().items())
        found.append((split_ways(model.plan), apart))
    return found


def traced(kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        autoparallel.make_plan(build(kind), 4, example_inputs=(tokens(),), hardware=QUICK_LINKS)


@pytest.mark.parametrize("kinds", [tuple(TRAINED)[::2], *broad((tuple(TRAINED),))], ids=len)
def test_training_and_checkpoints(kinds: tuple[str, ...], tmp_path: Path) -> None:
    for found in run_processes(run, 4, kinds, tmp_path, before=partial(trace_ahead, traced, kinds)):
        assert [ways for ways, _ in found] == [TRAINED[kind] for kind in kinds]
        assert max(apart for _, apart in found) < 1e-10
