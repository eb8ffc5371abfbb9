"""Blocks that keep their modules and weights in plain lists, dicts, closures and buffers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

__all__ = [
    "INNER",
    "WIDTH",
    "Block",
    "Head",
    "Listed",
    "Plain",
    "Sequence",
    "Tracks",
    "WithParameters",
    "both",
    "down",
    "pair",
    "up",
]

WIDTH, INNER = 6, 10
Tensor = torch.Tensor


def up() -> nn.Linear:
    return nn.Linear(WIDTH, INNER)


def down() -> nn.Linear:
    return nn.Linear(INNER, WIDTH)


def pair() -> list[nn.Module]:
    return [up(), down()]


def both(x: Tensor, first: Any, second: Any) -> Tensor:
    return x + second(torch.relu(first(x)))


class Block(nn.Module):
    """A Block can be called by another method than forward as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = up(), down()

    def forward(self, x: Tensor) -> Tensor:
        return both(x, self.first, self.second)

    def other(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Sequence(nn.Module):
    """A Sequence has its own way to be iterated, indexed and counted."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        for number, part in enumerate(parts):
            self.add_module(f"part{number}", part)
        self.count = len(parts)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> nn.Module:
        if index >= self.count:
            raise IndexError(index)
        return self.get_submodule(f"part{index}")

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(self.count))

    def forward(self, x: Tensor) -> Tensor:
        return both(x, *self)


class Listed(nn.ModuleList):
    """A Listed is a list with a forward, which the model does not call."""

    def forward(self, x: Tensor) -> Tensor:
        return both(x, *self)


class Plain(Block):
    """It keeps its modules a second time, in plain containers, functions and objects."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = [self.first, (self.second,)]
        self.table = {"first": self.first, "second": self.second}
        self.partial = functools.partial(both, first=self.first, second=self.second)
        self.method = self.other
        self.inner = (self.first.forward, self.second.forward)
        self.object = SimpleNamespace(first=self.first, second=self.second)
        self.raw = [self.first.weight, self.first.bias]
        self.parameters_too = {"weight": self.second.weight, "kept": [self.second.bias]}


class WithParameters(nn.Module):
    """It has parameters in lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([up().weight, down().weight])
        self.biases = nn.ParameterDict({"first": up().bias, "second": down().bias})

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(nn.functional.linear(x, self.weights[0], self.biases["first"]))
        return x + nn.functional.linear(hidden, self.weights[1], self.biases["second"])


class Tracks(Block):
    """It has a buffer that every call writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))
        self.kept = [self.scale]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))
