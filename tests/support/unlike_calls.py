"""Calls of a split model in which the last rank differs from the others, and what is said of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError

__all__ = ["calls"]


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(6, 12), nn.Linear(12, 6), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))) * self.scale


def calls(rank: int, world_size: int) -> dict[str, str]:
    """Return the errors of calls in which the last rank differs, after four in which none does."""
    torch.manual_seed(0)
    x, last = torch.randn(4, 6), rank == world_size - 1
    model: Any = autoparallel.autoparallelize(Scores(), world_size, example_inputs=(x,))
    for _ in range(2):
        model.eval()(x)
        model.train()(x)
    said = {}

    def tried(name: str, *args: Any) -> None:
        try:
            model(*args)
            said[name] = ""
        except AutoParallelError as error:
            said[name] = str(error)

    tried("values", x + last)
    tried("one value", x.index_fill(1, torch.tensor(2), 0) if last else x)
    tried("sizes", x[: 3 if last else 4])
    model.train(not last)
    tried("modes", x)
    model.train()
    model.up.weight.requires_grad_(not last)
    tried("frozen", x)
    model.up.weight.requires_grad_()
    model.scale = 2.0 if last else 1.0
    tried("attributes", x)
    model.scale = 1.0
    with torch.set_grad_enabled(not last):
        tried("gradients", x)
    hook = model.up.register_forward_hook(lambda *_: None) if last else None
    tried("hooks", x)
    if hook is not None:
        hook.remove()
    tried("none", x)
    return said
