"""Hooks on the modules of a split model run as on the unsplit one, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broad_cases import broad, share_of
from split_ranks import as_unsplit
from torch import nn

import autoparallel


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
        return x + self.outer(torch.tanh(self.inner(x))) * factor


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(3)), nn.Linear(8, 5)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, factor=0.5)
        return self.head(x).square().mean()


class Broken(Model):
    """It stays Python, and its layers are parts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) > 1e9:
            return x.sum()
        return super().forward(x)


def doubled(log: list[Any]) -> Any:
    def hook(module: nn.Module, *arguments: Any) -> Any:
        log.append(type(module).__name__)
        return arguments[-1] * 2

    return hook


def with_kwargs(log: list[Any]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        log.append(sorted(kwargs))
        return args, {key: value * 3 for key, value in kwargs.items()}

    return hook


def first_doubled(log: list[Any]) -> Any:
    def hook(module: nn.Module, *arguments: Any) -> Any:
        log.append(len(arguments))
        return (arguments[0][0] * 2, *arguments[0][1:])

    return hook


def keeps(log: list[Any]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        log.append(output.detach().mean())

    return hook


HOOKS: dict[str, Any] = {
    "forward": lambda m, log: m.register_forward_hook(doubled(log)),
    "forward that keeps": lambda m, log: m.register_forward_hook(keeps(log)),
    "before": lambda m, log: m.register_forward_pre_hook(first_doubled(log)),
    "before, with kwargs": lambda m, log: m.register_forward_pre_hook(
        with_kwargs(log), with_kwargs=True
    ),
    "backward": lambda m, log: m.register_full_backward_hook(first_doubled(log)),
    "before backward": lambda m, log: m.register_full_backward_pre_hook(first_doubled(log)),
}
PLACES = {"layer": lambda m: m.layers[1], "leaf": lambda m: m.layers[1].inner}


def script(kind: str, place: str) -> Any:
    def run(model: Any) -> Any:
        log: list[Any] = []
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)
        handle: Any = None
        for round in range(3):
            if round == 1:
                handle = HOOKS[kind](PLACES[place](model), log)
            if round == 2:
                handle.remove()
            for training in (True, False):
                model.train(training).zero_grad(set_to_none=True)
                loss = model(x)
                loss.backward()
                yield [loss, *(item for item in log if isinstance(item, torch.Tensor)), len(log)]

    return run


@pytest.mark.parametrize(
    ("kind", "place"),
    share_of([*((kind, "layer") for kind in HOOKS), ("forward", "leaf"), ("backward", "leaf")], 4),
)
def test_registered_after_planning(kind: str, place: str) -> None:
    as_unsplit(Model(), 2, (torch.ones(3, 8, dtype=torch.float64),), script(kind, place))


@pytest.mark.parametrize("kind", ["forward that keeps", *broad("before, with kwargs", "backward")])
def test_in_parts(kind: str) -> None:
    as_unsplit(Broken(), 3, (torch.ones(3, 8, dtype=torch.float64),), script(kind, "layer"))


class Recorder:
    """A hook that is an object, and keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.seen.append(output.detach().mean())


def hook_of(kind: str) -> tuple[Any, list[Any]]:
    """A hook, and the list to which it appends."""
    log: list[Any] = []
    if kind == "a closure":
        return keeps(log), log
    if kind == "an object":
        recorder = Recorder()
        return recorder, recorder.seen

    def hook(module: nn.Module, args: Any, output: Any, kept: Any = log) -> None:
        kept.append(output.detach().mean())

    return hook, log


@pytest.mark.parametrize("kind", ["a closure", *broad("an object", "a default")])
def test_what_a_hook_keeps_is_not_lost(kind: str) -> None:
    """A hook that is there before planning, and writes to an object of its own, is in no graph."""
    model, (hook, log) = Model(), hook_of(kind)
    model.layers[1].inner.register_forward_hook(hook)
    x = torch.ones(3, 8, dtype=torch.float64)
    split = autoparallel.autoparallelize(model, 1, example_inputs=x)
    for count in range(1, 3):
        split(x * count)
        assert len(log) == count
