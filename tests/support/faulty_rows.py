"""Rows and a model for runs in which something goes wrong on the way."""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor, nn

# The batch on which something happens.
BAD = 4


class Regression(nn.Module):
    """Two products, whose loss is the mean square of what they miss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.last(torch.tanh(self.first(x))) - y).square().mean()


def regression() -> nn.Module:
    return Regression()


def good(part: str, number: int, first: int, count: int) -> dict[str, Tensor]:
    """Rows that follow from their numbers."""
    places = torch.arange(first, first + count, dtype=torch.float64)[:, None]
    x = torch.sin(places + 10 * number + torch.arange(4) + 100 * (part == "train"))
    return {"x": x, "y": x[:, :2] * 2}


def with_nan(part: str, number: int, first: int, count: int) -> dict[str, Tensor]:
    """The same, but for one batch."""
    batch = good(part, number, first, count)
    if part == "train" and number == BAD:
        batch["x"][0, 0] = float("nan")
    return batch


def without(part: str, number: int, first: int, count: int) -> dict[str, Tensor]:
    """The same, without that batch."""
    return good(part, number + (part == "train" and number >= BAD), first, count)


def with_signal(part: str, number: int, first: int, count: int) -> dict[str, Tensor]:
    """The same; the last rank is asked to end while it reads that batch."""
    from autoparallel.train.preflight import rank_and_world

    rank, world_size = rank_and_world()
    if part == "train" and number == BAD and first + count and rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return good(part, number, first, count)
