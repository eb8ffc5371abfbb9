"""Models that cannot be captured whole: their largest parts that can are split, the rest runs."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import nn

from autoparallel.errors import CaptureError
from autoparallel.graph.capture import capture

WIDTH = 12


class Drops(nn.Module):
    """Two products; a draw compared with a number decides whether the second one is left out."""

    def __init__(self, compare: Any, one: Any = lambda: torch.rand([])) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.compare, self.one = compare, one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.compare(self.one()):
            return x
        return self.second(x)


@pytest.mark.parametrize(
    ("compare", "dropped"),
    [
        (lambda draw: draw < 0.0, False),
        (lambda draw: draw <= -1, False),
        (lambda draw: draw < 1, True),
        (lambda draw: draw >= 0.0, True),
        (lambda draw: operator.gt(1.0, draw), True),
        (lambda draw: draw == 2, False),
        (lambda draw: (draw < 0.0).any(), False),
    ],
)
@pytest.mark.parametrize("one", [lambda: torch.rand([]), lambda: torch.rand(1)])
def test_draws_know_their_range(compare: Any, dropped: bool, one: Any) -> None:
    """Layer-drop at probability 0 or 1 is no choice: the graph has the path taken always."""
    captured = capture(Drops(compare, one), (torch.randn(3, WIDTH),), {})
    products = [node for node in captured.graph.calls if node.target == "aten.linear.default"]
    assert len(products) == (1 if dropped else 2)


@pytest.mark.parametrize(
    "compare",
    [
        lambda draw: draw < 0.5,
        lambda draw: draw <= 0.0,
        lambda draw: draw * 2 < 0.0,
        lambda draw: draw < torch.zeros(()),
        lambda draw: -draw > 0.5,
    ],
)
def test_draws_within_their_range_decide_nothing(compare: Any) -> None:
    """And what is computed from a draw has another range."""
    with pytest.raises(CaptureError, match="branches on the values"):
        capture(Drops(compare), (torch.randn(3, WIDTH),), {})
