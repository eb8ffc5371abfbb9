"""Gradients of several backward passes are summed over the ranks once, and are the same."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from broad_cases import broad
from processes import run_processes
from quick_links import QUICK_LINKS
from torch import nn
from traces import trace_ahead

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.parallel.accumulation import no_sync
from autoparallel.runtime.collective_counter import CollectiveCounter

pytestmark = pytest.mark.usefixtures("one_trace")

CUT = (0, 3, 4, 8)  # rows of the passes, not equally many


class Two(nn.Module):
    """Two products and a norm, and a branch that only some passes take."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 4)
        self.rare = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, rare: bool = False) -> torch.Tensor:
        y = self.last(torch.tanh(self.first(self.norm(x))))
        return (y + self.rare(x) if rare else y).square().sum()


def plain() -> Two:
    torch.manual_seed(0)
    return Two().double()


def rows() -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def accumulated(module: nn.Module, held: bool) -> None:
    for number, (start, end) in enumerate(pairwise(CUT)):
        last = number == len(CUT) - 2
        with no_sync(module) if held and not last else nullcontext():
            module(rows()[start:end], rare=number == 1).backward()


def prepare() -> None:
    """Trace all calls of the ranks, which a module of one rank makes, too."""
    accumulated(autoparallel.autoparallelize(plain(), 1, example_inputs=(rows(),)), False)


def on_ranks(rank: int, axes: dict[str, int], demands: tuple[str, ...]) -> dict[str, Any]:
    counts, gradients = [], []
    for held in (False, True):
        module = autoparallel.autoparallelize(
            plain(), mesh=Mesh(**axes), example_inputs=(rows(),), constraints=demands
        )
        accumulated(module, held)  # plans of other calls are made here
        module.zero_grad()
        with CollectiveCounter() as counter:
            accumulated(module, held)
        counts.append(sum(counter.counts.values()))
        gradients.append({n: p.grad.full_tensor() for n, p in module.named_parameters()})
    return {"counts": counts, "gradients": gradients}


@pytest.mark.parametrize(
    ("axes", "demands", "fewer"),
    [
        *broad(({"dp": 2}, ("* is whole",), True)),
        ({"dp": 3}, ("first.weight is split", "last.weight is split"), False),
        ({"dp": 2, "tp": 2}, ("* on dp is whole", "first.weight on tp is split 0"), True),
    ],
    ids=["whole", "parts", "dp-tp"],
)
def test_gradients_are_summed_once(axes, demands, fewer):
    """On every rank each gradient is that of the unsplit model; sums come in the last pass only."""
    reference = plain()
    for number, (start, end) in enumerate(pairwise(CUT)):
        reference(rows()[start:end], rare=number == 1).backward()
    world = 1
    for size in axes.values():
        world *= size
    before = partial(trace_ahead, prepare)
    for result in run_processes(on_ranks, world, axes, demands, before=before):
        for gradients in result["gradients"]:
            for name, parameter in reference.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-12)
        always, once = result["counts"]
        assert once < always if fewer else once <= always


def complete(module: nn.Module, first: int = 4) -> None:
    module(rows()[:first]).backward()


def put_off(module: nn.Module, split: bool) -> None:
    with no_sync(module) if split else nullcontext():
        module(rows()).backward()


def scaled(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad / 3


def values(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone()
        for name, each in tensors.items()
    }


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    named = module.named_parameters()
    return values({name: each.grad for name, each in named if each.grad is not None})


def touched(module: nn.Module, split: bool) -> dict[str, dict[str, torch.Tensor]]:
    """What a user does with gradients whose sum is put off, before a pass that completes them."""
    found = {}
    for name, act in {
        "cleared": module.zero_grad,
        "set to zero": lambda: module.zero_grad(set_to_none=False),
        "read": lambda: gradients_of(module),
        "scaled": lambda: scaled(module),
        "clipped": lambda: nn.utils.clip_grad_norm_(module.parameters(), 1.0),
        "frozen": lambda: module.first.weight.requires_grad_(False),
    }.items():
        for earlier in (False, True):
            if earlier:
                complete(module, 2)
            put_off(module, split)
            act()
            found[f"{name}, {earlier}, before"] = gradients_of(module)
            complete(module)
            found[f"{name}, {earlier}"] = gradients_of(module)
            module.first.weight.requires_grad_(True)
            module.zero_grad()
    put_off(module, split)
    twin = copy.deepcopy(module)
    complete(twin)
    found["twin"] = gradients_of(twin)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    found["stepped"] = values(dict(module.named_parameters()))
    return found


def on_ranks_touched(rank: int, demands: tuple[str, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {"constraints": demands, "hardware": QUICK_LINKS}
    module = autoparallel.autoparallelize(
        plain(), mesh=Mesh(dp=2), example_inputs=(rows(),), **options
    )
    found: dict[str, Any] = touched(module, split=True)
    put_off(module, split=True)
    try:
        autoparallel.clip_grad_norm_(module.parameters(), 1.0)
    except AutoParallelError as error:
        found["refused"] = str(error)
    return found


@pytest.mark.parametrize(
    "demands",
    [*broad((("* is whole",),)), ("first.weight is split",)],
    ids=["whole", "parts"],
)
def test_gradients_that_are_put_off_are_the_users(demands):
    """They are cleared, read, scaled, clipped, copied and stepped with as those of one device."""
    reference = touched(plain(), split=False)
    for found in run_processes(on_ranks_touched, 2, demands):
        assert "outside of no_sync()" in found.pop("refused")
        torch.testing.assert_close(found, reference, rtol=1e-11, atol=1e-11)
