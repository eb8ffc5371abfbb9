"""Tiny models that the rows of many habits use, in float64 and with fixed weights."""

from __future__ import annotations

from typing import Any

import torch
from small_classifier import Classifier, plain, rows
from torch import nn

__all__ = ["Blocks", "Classifier", "Scores", "blocks", "built", "inputs", "plain", "rows", "scores"]


class Scores(nn.Module):
    """Two products with a norm between them; it returns scores (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(torch.tanh(self.up(x))))


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.tanh(self.up(x))))


class Blocks(nn.Module):
    """A list of equal blocks, whose output goes through a head; it returns a loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(6, 5)

    def call(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Call a block; a child class does it in its own way."""
        return block(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x).square().mean()


def built(kind: Any, *args: Any, **kwargs: Any) -> Any:
    """Return a module of the class, in float64, with the same weights at every call."""
    torch.manual_seed(3)
    return kind(*args, **kwargs).double()


def scores() -> Scores:
    """Return the module of `Scores` that most rows use."""
    return built(Scores)


def blocks() -> Blocks:
    """Return the module of `Blocks` that most rows use."""
    return built(Blocks)


def inputs(count: int = 6, seed: int = 0, *, grad: bool = False) -> torch.Tensor:
    """Return inputs (count, 6) in float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return x.requires_grad_(grad)
