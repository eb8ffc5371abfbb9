"""Every module in a split model, and its own methods, may be called as in the unsplit model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from broad_cases import broad
from processes import run_processes
from torch import nn

import autoparallel


class Autoencoder(nn.Module):
    """A model that is called whole, by a method of its own, and part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.encoder = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.decoder = nn.Linear(4, 6)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.encoder(self.table(ids))
        return hidden

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.encode(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return (self.decoder(hidden) - self.table(ids)).square().mean()


IDS = torch.tensor([[0, 3, 6], [5, 1, 3]])
HIDDEN = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4)

CALLS: dict[str, Callable[[Any], torch.Tensor]] = {
    "whole": lambda model: model(IDS),
    "method": lambda model: model.encode(IDS).square().sum(),
    "submodule": lambda model: model.encoder(model.table(IDS)).square().sum(),
    "leaf": lambda model: model.decoder(HIDDEN).square().sum(),
    "in a list": lambda model: model.blocks[1](HIDDEN).square().sum(),
    "inside of a submodule": lambda model: model.encoder[2](torch.ones(2, 12).double()).sum(),
    "both": lambda model: model(IDS) + model.decoder(model.encode(IDS)).sum(),
}


def work(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    model = Autoencoder().double()
    split = autoparallel.autoparallelize(model, world_size, example_inputs=IDS)
    assert isinstance(split.encoder[0], nn.Linear)
    assert str(split).replace("Parallel", "") == str(model)
    for name, call in CALLS.items():
        model.zero_grad()
        split.zero_grad()
        expected, loss = call(model), call(split)
        expected.backward()
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0, msg=name)
        for path, parameter in model.named_parameters():
            gradient: Any = split.get_parameter(path).grad
            if parameter.grad is None:
                assert gradient is None, (name, path)
                continue
            whole = gradient.full_tensor() if world_size > 1 else gradient
            torch.testing.assert_close(whole, parameter.grad, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("world_size", [*broad(2), 3])
def test_every_module_is_callable(world_size: int) -> None:
    run_processes(work, world_size, world_size)


def test_every_module_of_a_single_rank_is_callable() -> None:
    work(0, 1)
