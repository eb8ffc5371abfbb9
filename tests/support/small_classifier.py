"""A small model with a mean loss that skips some rows, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Classifier", "plain", "rows"]


class Classifier(nn.Module):
    """Two products and a mean loss, in which rows with the label -100 do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, scale: Any = 1.0) -> torch.Tensor:
        logits = self.down(torch.tanh(self.up(x))) * scale
        return F.cross_entropy(logits, labels)


def plain() -> Classifier:
    torch.manual_seed(3)
    return Classifier().double()


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (count,), generator=generator)
    labels[::3] = -100
    return x, labels
