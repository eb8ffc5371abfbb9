"""Functions that a program puts where torch's own layers find them, which no code of its names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from unseen import Base, X, after_backward, follows

import autoparallel

SETTINGS = {"scale": 1.0}
SCALE = 1.0
_LINEAR, _LAYER_NORM = F.linear, F.layer_norm


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    return _LINEAR(x, weight, bias) * SCALE * SETTINGS["scale"]


def layer_norm(x: torch.Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> torch.Tensor:
    """It takes the place of torch's, as a fused one does, and does not call it."""
    return (x - x.mean(-1, keepdim=True)) * weight * SCALE + bias + eps


def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight, self.bias)


class Normed(Base):
    """A forward of torch's layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(self.a.out_features, dtype=X.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.a(x)))


PLACES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a function that calls torch's": (F, "linear", linear),
    "a function instead of torch's": (F, "layer_norm", layer_norm),
    "a method of a layer": (nn.Linear, "forward", forward),
}


def script(model: Any) -> Iterator[torch.Tensor]:
    global SCALE
    yield after_backward(model)
    for scale in (2.0, 3.0):
        SCALE = SETTINGS["scale"] = scale
        yield after_backward(model)
    SCALE = SETTINGS["scale"] = 1.0
    yield after_backward(model)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_what_they_read_is_followed(
    place: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*PLACES[place])
    follows(lambda: (Normed(), script), world_size)


def test_what_they_count_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(*args: Any) -> torch.Tensor:
        calls.append(len(calls))
        return _LINEAR(*args)

    monkeypatch.setattr(F, "linear", counting)
    split = autoparallel.autoparallelize(Normed(), 1, example_inputs=X)
    assert split.plan.breaks
    before = len(calls)
    split(X)
    assert len(calls) == before + 2
