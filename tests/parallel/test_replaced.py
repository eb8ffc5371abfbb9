"""Modules and parameters that are exchanged after planning: as on the unsplit model, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from broad_cases import broad, share_of
from split_ranks import as_unsplit
from torch import nn

import autoparallel


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 6)
        self.register_buffer("shift", torch.zeros(6))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return (self.head(x) + self.shift).square().mean()


class Broken(Model):
    """It stays Python, and its blocks are parts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) > 1e9:
            return x.sum()
        return super().forward(x)


def head(model: Any) -> None:
    torch.manual_seed(3)
    model.head = nn.Linear(8, 4).double()
    model.shift = torch.ones(4, dtype=torch.float64)


def weight(model: Any) -> None:
    torch.manual_seed(3)
    model.head.weight = nn.Parameter(torch.randn(6, 8, dtype=torch.float64))


def added(model: Any) -> None:
    torch.manual_seed(3)
    model.blocks.append(Block().double())
    model.head = nn.Sequential(model.head, nn.Linear(6, 6).double())


def deleted(model: Any) -> None:
    del model.blocks[1]


def tied(model: Any) -> None:
    model.blocks[1].inner.weight = model.blocks[0].inner.weight
    model.blocks[2] = model.blocks[0]


def no_bias(model: Any) -> None:
    model.head.bias = None


def converted(model: Any) -> None:
    model.float()


def back(model: Any) -> None:
    before = model.head
    head(model)
    model.head, model.shift = before, torch.full((6,), 2.0, dtype=torch.float64)


CHANGES = [head, weight, added, deleted, tied, no_bias, converted, back]


def script(change: Any) -> Any:
    def run(model: Any) -> Any:
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)
        for round in range(2):
            if round:
                change(model)
            x = x.to(next(model.parameters()).dtype)
            for _ in range(2):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                optimizer.zero_grad()
                loss = model(x)
                loss.backward()
                yield loss.double()
                optimizer.step()

    return run


@pytest.mark.parametrize("world_size", [*broad(1), 2])
@pytest.mark.parametrize("change", share_of(CHANGES, 2), ids=lambda change: change.__name__)
def test_it_is_as_on_the_unsplit_model(change: Any, world_size: int) -> None:
    x = torch.ones(3, 8, dtype=torch.float64)
    close = {"rtol": 1e-5, "atol": 1e-6} if change is converted else {"rtol": 1e-10, "atol": 1e-12}
    as_unsplit(Model(), world_size, (x,), script(change), close=close)


@pytest.mark.parametrize("world_size", [*broad(1), 3])
@pytest.mark.parametrize("change", [head, *broad(added, deleted)])
def test_in_parts(change: Any, world_size: int) -> None:
    x = torch.ones(3, 8, dtype=torch.float64)
    as_unsplit(Broken(), world_size, (x,), script(change))


def test_parameters_of_the_same_kind_need_no_other_program() -> None:
    """As those are that `model.to(device)` puts in place of split ones."""
    model, x = Model(), torch.ones(3, 8, dtype=torch.float64)
    split: Any = autoparallel.autoparallelize(model, 1, example_inputs=x)
    split(x)
    ((entry,),) = split._autoparallel.entries.values()
    with torch.no_grad():
        for module in split.modules():
            for name, parameter in list(module._parameters.items()):
                module._parameters[name] = nn.Parameter(parameter * 2)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(split(x), expected(x), rtol=1e-12, atol=0)
    split(x).backward()
    expected(x).backward()
    for path, parameter in expected.named_parameters():
        torch.testing.assert_close(split.get_parameter(path).grad, parameter.grad)
    assert list(split._autoparallel.entries.values()) == [[entry]]


@pytest.mark.parametrize("change", [head, added, deleted, tied], ids=lambda change: change.__name__)
def test_before_the_first_call(change: Any) -> None:
    """A module that waits for its first call is split as it is by then."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)
    plain = Model()
    waiting = autoparallel.autoparallelize(copy.deepcopy(plain), 1)
    for module in (plain, waiting):
        change(module)
        module(x).backward()
    for path, parameter in plain.named_parameters():
        torch.testing.assert_close(waiting.get_parameter(path).grad, parameter.grad)
