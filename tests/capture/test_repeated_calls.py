"""A forward that is given another number in its second run is no graph, wherever that is from."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autoparallel
from autoparallel.errors import CaptureError

X = torch.ones(2, 4)
clock = functools.partial(time.perf_counter_ns)


class Scaled(nn.Module):
    """It scales its output by the number that a function finds out."""

    def __init__(self, number: Callable[[Any, torch.Tensor], Any], count: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * self.number(self, x)


def by_identity(model: Any, x: torch.Tensor) -> int:
    return sorted((model, x), key=id).index(model)


def handed_on(model: Any, x: torch.Tensor) -> float:
    return next(iter(time.perf_counter, None))


def written(x: torch.Tensor, number: int) -> torch.Tensor:
    x = torch.zeros(4)
    x[0] = number
    return x


# Asked by C's functions alone, of which no profile function is told.
HIDDEN: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "partial": lambda model, x: clock() % 1000003,
    "iter": lambda model, x: next(iter(clock, None)) % 1000003,
    "text of a tensor": lambda model, x: float(len(repr(x))),
    "kind of a tensor": lambda model, x: float(len(type(x).__name__)),
    "number of numpy's": lambda model, x: np.float64(clock() % 1000003),
    "written by index": lambda model, x: written(x, clock() % 1000003),
    "complex number": lambda model, x: complex(0.0, clock() % 1000003),
    "array": lambda model, x: torch.as_tensor(np.asarray(float(clock() % 1000003))[None]),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_another_number_is_noticed(name: str) -> None:
    plan = autoparallel.make_plan(Scaled(HIDDEN[name]), 2, example_inputs=X)
    assert "computes something else when it runs again" in plan.breaks[0].reason


@pytest.mark.parametrize("number", [by_identity, handed_on])
def test_what_asks_is_handed_on(number: Any) -> None:
    plan = autoparallel.make_plan(Scaled(number), 2, example_inputs=X)
    assert "which it hands on" in plan.breaks[0].reason


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, digits: float) -> torch.Tensor:
        return torch.round(x * digits) / digits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class Remembers(Scaled):
    """It remembers what it has returned, in a method."""

    @functools.cache  # noqa: B019
    def numbers(self, count: int) -> torch.Tensor:
        return torch.arange(count) + 1.0

    @staticmethod
    @functools.cache
    def ones(count: int) -> torch.Tensor:
        return torch.ones(count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.numbers(4) + self.ones(4)


def checkpointed(model: Any, x: torch.Tensor) -> torch.Tensor:
    run = lambda y: nn.functional.silu(y) + 1.0  # noqa: E731
    return checkpoint(run, x, use_reentrant=True)


# What both runs do alike although a trace has symbols, blocks that are copied, and ops of its own.
ALIKE: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "sizes": lambda model, x: x.shape[0] ** -0.5 + x.new_full((x.shape[0], 1), 0.5),
    "Function": lambda model, x: Rounded.apply(x, 8.0),
    "draws": lambda model, x: nn.functional.dropout(x, 0.5) + torch.rand(4),
    "numpy": lambda model, x: (
        torch.from_numpy(np.linspace(0, 1, 4, dtype=np.float32)) * np.float32(2)
    ),
    "checkpoint": checkpointed,
    "algorithm": lambda model, x: torch.pca_lowrank(x.detach(), q=2)[1].sum(),
    "device": lambda model, x: 2.0 if x.device.type == "cpu" else 3.0,
}


@pytest.mark.parametrize("name", ALIKE)
def test_two_runs_that_are_alike_are_planned(name: str) -> None:
    plan = autoparallel.make_plan(Scaled(ALIKE[name], 3), 2, example_inputs=X)
    assert plan.breaks == ()


def test_methods_remember_nothing_of_a_trace() -> None:
    """One that remembers for an object is right for it whatever becomes of it, as no graph is."""
    model = Remembers(lambda model, x: 2.0)
    (part,) = autoparallel.make_plan(model, 2, example_inputs=X).breaks
    assert "calls Remembers.numbers, which remembers" in part.reason
    assert type(model.numbers(4)) is type(model.ones(4)) is torch.Tensor


def test_the_reason_names_both_calls() -> None:
    with pytest.raises(CaptureError, match=r"mul\(Tensor, \d+\), and mul\(Tensor, \d+\) when"):
        autoparallel.make_plan(Scaled(HIDDEN["partial"]), 2, example_inputs=X, strict_capture=True)


class Padded(nn.Module):
    """Its padding is computed of sizes that are kept as tensors, as libraries for sound do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(4, 4, 3)
        self.register_buffer("total", torch.tensor(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = torch.ceil(self.total / 2).to(torch.int64)
        right = self.total - left
        if x.shape[-1] <= max(left, right):
            raise ValueError("too short")
        return self.layer(nn.functional.pad(x, (left, right), "reflect"))


def test_the_larger_of_two_tensors_is_the_same_in_the_second_run() -> None:
    """While torch exports a model, max() of two tensors is one op."""
    model, x = Padded(), torch.randn(2, 4, 9)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert not plan.breaks
    output = autoparallel.simulate(model, plan=plan, example_inputs=(x,)).output
    torch.testing.assert_close(output, model(x))
