"""Attributes and buffers that a forward writes are those of the unsplit model, call after call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broad_cases import broad, share_of
from split_ranks import as_unsplit, programs_of
from torch import nn


class Model(nn.Module):
    """Two layers; a kind of side effect is what its children differ in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        self.step, self.log = 0, []
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.double()

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))

    def seen(self) -> list[Any]:
        return [self.mean, self.calls, self.step]


class Counts(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return self.hidden(x).square().mean()


class CountsAndReads(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return (self.hidden(x) * min(1.0, self.step / 3)).square().mean()


class CountsInTraining(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.step += 1
        return self.hidden(x).square().mean() / max(self.step, 1)


class LeavesLoss(Model):
    aux: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(x)
        self.aux = hidden.abs().mean()
        return hidden.square().mean()

    def seen(self) -> list[Any]:
        return [self.aux]


class Appends(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(x)
        self.log.append(hidden.detach().mean())
        return hidden.square().mean()

    def seen(self) -> list[Any]:
        return [len(self.log), *self.log]


class AppendsNumbers(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(len(self.log))
        return self.hidden(x).square().mean() * len(self.log)

    def seen(self) -> list[Any]:
        return list(self.log)


class AssignsBuffer(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(x)
        with torch.no_grad():
            self.mean = self.mean * 0.9 + hidden.mean(0)
        return (hidden - self.mean).square().mean()


class WritesBuffer(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(x)
        self.mean.mul_(0.9).add_(hidden.detach().mean(0))
        self.calls += 1
        return (hidden - self.mean).square().mean() * self.calls


class AssignsInTraining(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(x)
        if self.training:
            self.calls = self.calls + 1
        return hidden.square().mean() * self.calls


class WritesData(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(x)
        self.mean.data = self.mean.data * 0.5 + hidden.detach().mean(0)
        return (hidden - self.mean).square().mean()


class SetsUp(Model):
    scale: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            self.scale = 0.5
        return self.hidden(x).square().mean() * self.scale

    def seen(self) -> list[Any]:
        return [self.scale]


class KeepsAcross(Model):
    last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(x)
        before, self.last = self.last, hidden.detach()
        return (hidden - (0 if before is None else before)).square().mean()

    def seen(self) -> list[Any]:
        return [self.last]


class Exchanges(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("other", torch.ones(8, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean, self.other = self.other * 0.5, self.mean
        return (self.hidden(x) - self.mean).square().mean()

    def seen(self) -> list[Any]:
        return [self.mean, self.other]


class KeepsTheOldOne(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(x)
        self.before, self.mean = self.mean, hidden.detach().mean(0)
        return (hidden - self.before).square().mean()

    def seen(self) -> list[Any]:
        return [self.before, self.mean]


class AssignsWithGradient(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(x)
        self.mean = hidden.mean(0)
        return (hidden - self.mean).square().mean()

    def seen(self) -> list[Any]:
        return [self.mean, torch.tensor(self.mean.requires_grad)]


class OnAnObject(Model):
    def __init__(self) -> None:
        super().__init__()
        self.stats = {"calls": 0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stats["calls"] += 1
        return self.hidden(x).square().mean() / self.stats["calls"]

    def seen(self) -> list[Any]:
        return [self.stats["calls"]]


KINDS = [
    *(Counts, CountsAndReads, CountsInTraining, LeavesLoss, Appends, AppendsNumbers),
    *(AssignsBuffer, WritesBuffer, AssignsInTraining, WritesData, SetsUp, KeepsAcross, OnAnObject),
    *(Exchanges, KeepsTheOldOne, AssignsWithGradient),
]

# A graph says what these do: they have a program for training and one for evaluation.
TRACED = (LeavesLoss, AssignsBuffer, WritesBuffer, AssignsInTraining, Exchanges)


def script(model: Any) -> Any:
    for round in range(4):
        x = torch.linspace(-1, 1 + round, 24, dtype=torch.float64).view(3, 8)
        model.train(round != 2)
        model.zero_grad(set_to_none=True)
        loss = model(x)
        loss.backward()
        yield [loss, *model.seen()]
    if isinstance(model, SetsUp):
        model.scale = 3.0
        yield model(x)
    return programs_of(model)


@pytest.mark.parametrize("world_size", [*broad(1), 2])
@pytest.mark.parametrize("kind", share_of(KINDS, 3))
def test_it_is_written_as_by_the_unsplit_model(kind: Any, world_size: int) -> None:
    made = as_unsplit(kind(), world_size, (torch.ones(3, 8, dtype=torch.float64),), script)
    assert kind not in TRACED or made == 2
