"""Outputs that stay split, in a first call and in further ones, which are made like the first."""

from typing import Any

import pytest
import torch
from processes import run_processes
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

import autoparallel


class Two(nn.Module):
    """A column-parallel product, the result of which is returned with a number that it leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(6, 12), nn.Linear(12, 30, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.out(self.up(x).tanh())
        return out.square().sum(), out


INPUT = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def plain() -> Two:
    torch.manual_seed(1)
    return Two().double()


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def steps(module: nn.Module) -> list[torch.Tensor]:
    """Losses and gradients of three calls: as it comes, again, and moved to other placements."""
    found = []
    for call in range(3):
        number, output = module(INPUT)
        if call == 2 and isinstance(output, DTensor):
            output = DTensor.redistribute(output, placements=[Replicate()])
        loss = number + whole(output).pow(3).sum()
        parameters = list(module.parameters())
        found += [loss.detach(), *map(whole, torch.autograd.grad(loss, parameters))]
    return found


def on_ranks(rank: int) -> tuple[str, list[torch.Tensor]]:
    world_size = torch.distributed.get_world_size()
    module = autoparallel.autoparallelize(
        plain(), world_size, example_inputs=INPUT, constraints=("out.weight is split 0",)
    )
    kinds = [type(module(INPUT)[1]).__name__ for _ in range(2)]
    return ", ".join(kinds), steps(module)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_come_back_through_outputs_of_every_call(world_size: int) -> None:
    expected = steps(plain())
    for kinds, found in run_processes(on_ranks, world_size):
        assert kinds == "SplitTensor, SplitTensor"
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
