"""Slices that together are all of a value become one split, and only those."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from split_models import split_as_whole
from torch import nn

from autoparallel.api import make_plan

Tensor = torch.Tensor


class Cut(nn.Module):
    """Twelve features, cut by slices between two products."""

    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cut = cut
        self.first, self.last = nn.Linear(8, 12), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cut(self.first(x))).square().sum()


def fused(x: Tensor) -> Tensor:
    return x[..., :4] * x[..., 4:8].sigmoid() + x[..., 8:]


def backwards(x: Tensor) -> Tensor:
    return x[:, -4:] + x[:, 4:-4].relu() * x[:, 0:4] + x[:, 4:8]


def unequal(x: Tensor) -> Tensor:
    return (x[:, :8].reshape(-1, 2, 4) * x[:, 8:].unsqueeze(1)).sum(1)


def overlapping(x: Tensor) -> Tensor:
    return x[:, :4] + x[:, 3:7] * x[:, 8:]


def with_a_gap(x: Tensor) -> Tensor:
    return x[:, :4] + x[:, 8:]


def stepping(x: Tensor) -> Tensor:
    return (x[:, ::2] * x[:, 1::2])[:, :4]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("cut", "sizes"),
    [
        (fused, (4, 4, 4)),
        (backwards, (4, 4, 4)),
        (unequal, (8, 4)),
        (overlapping, None),
        (with_a_gap, None),
        (stepping, None),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_slices_laid_end_to_end(
    cut: Callable[[Tensor], Tensor], sizes: tuple[int, ...] | None, world_size: int
) -> None:
    """The graph has one split, and the split model the loss and gradients of the original."""
    torch.manual_seed(0)
    model = Cut(cut).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    plan = make_plan(model, world_size, example_inputs=x)
    assert plan.captured is not None
    splits = [n.args[1] for n in plan.captured.graph.calls if "split_with_sizes" in n.target]
    assert splits == ([sizes] if sizes else [])
    split_as_whole(model, world_size, x, plan=plan)
