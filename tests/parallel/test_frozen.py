"""Parameters that are frozen and trained later, or the other way round, as on the unsplit model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broad_cases import broad
from split_ranks import as_unsplit, programs_of
from torch import nn

import autoparallel
from autoparallel import Mesh


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
            for _ in range(3)
        )
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


class Broken(Model):
    """It stays Python, and its blocks are parts."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if int(ids.sum()) < 0:
            return ids.sum()
        return super().forward(ids)


IDS = torch.arange(12).reshape(3, 4) % 10


def script(first: dict[str, bool], *then: dict[str, bool]) -> Any:
    """Calls with other parameters trained each time. first, then: by the beginnings of paths."""

    def train(model: nn.Module, which: dict[str, bool]) -> None:
        for path, parameter in model.named_parameters():
            for prefix, trained in which.items():
                if path.startswith(prefix):
                    parameter.requires_grad_(trained)

    def run(model: Any) -> Any:
        counts = []
        for which in (first, *then):
            train(model, which)
            model.zero_grad(set_to_none=True)
            loss = model(IDS)
            loss.backward()
            yield loss
            counts.append(programs_of(model))
        return counts

    return run


@pytest.mark.parametrize("world_size", [*broad(1, 2), 3])
@pytest.mark.parametrize("model", [Model, *broad(Broken)])
def test_frozen_when_planned_and_trained_later(model: Any, world_size: int) -> None:
    frozen = model()
    frozen.blocks[0].requires_grad_(False)
    frozen.table.requires_grad_(False)
    steps = ({}, {"blocks.0": True}, {"table": True}, {"blocks": False}, {"blocks": True})
    counts = as_unsplit(frozen, world_size, (IDS,), script(*steps))
    # What was trained once has its program: no more are made.
    assert counts[2] == counts[-1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_trained_when_planned_and_frozen_later(world_size: int) -> None:
    """The program for more trained parameters is right for fewer."""
    steps = ({}, {"blocks.1": False, "table": False}, {"blocks.1": True}, {"blocks.0": False})
    assert as_unsplit(Model(), world_size, (IDS,), script(*steps)) == [1, 1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"mesh": Mesh(dp=2)}], ids=["tensors", "data"])
def test_all_frozen_first(options: dict[str, Any]) -> None:
    frozen = Model().requires_grad_(False)

    def run(model: Any) -> Any:
        yield model(IDS)
        model.requires_grad_(True)
        for _ in range(2):
            loss = model(IDS)
            loss.backward()
            yield loss

    as_unsplit(frozen, 2, (IDS,), run, **options)


def test_first_without_gradients_and_then_trained() -> None:
    """A split module that is planned, or first called, without gradients can be trained."""
    for without in (torch.no_grad, torch.inference_mode):
        plain, first, second = Model(), Model(), Model()
        with without():
            planned = autoparallel.autoparallelize(first, 1, example_inputs=(IDS,))
            waiting = autoparallel.autoparallelize(second, 1)
            for split in (planned, waiting):
                torch.testing.assert_close(split(IDS), plain(IDS), rtol=1e-12, atol=0)
        plain(IDS).backward()
        for split in (planned, waiting):
            split(IDS).backward()
            for path, parameter in plain.named_parameters():
                found = split.get_parameter(path).grad
                torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-12)
