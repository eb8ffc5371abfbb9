"""Gradients of several backward passes are summed over the ranks once, and are the same."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.parallel.accumulation import no_sync
from autoparallel.runtime.collective_counter import CollectiveCounter

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
        ({"dp": 2}, ("* is whole",), True),
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
    for result in run_processes(on_ranks, world, axes, demands):
        for gradients in result["gradients"]:
            for name, parameter in reference.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-12)
        always, once = result["counts"]
        assert once < always if fewer else once <= always
