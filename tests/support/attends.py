"""A small model of attention in several forms: causal, with a mask of padding, with a bias."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Attends(nn.Module):
    """Two products around attention with half as many heads of keys as of queries."""

    def __init__(self, kind: str, heads: int = 4, width: int = 4) -> None:
        super().__init__()
        self.kind, self.heads, self.width = kind, heads, width
        self.up = nn.Linear(8, 2 * heads * width)
        self.down = nn.Linear(heads * width, 8)
        self.bias = nn.Parameter(torch.randn(heads, 1, 1)) if kind == "bias" else None

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        half = self.heads // 2 * self.width
        q, k, v = self.up(x).split((2 * half, half, half), -1)
        q, k, v = (t.view(batch, length, -1, self.width).transpose(1, 2) for t in (q, k, v))
        mask = None
        if self.kind == "padding":
            mask = seen[:, None, None]
        elif self.kind == "bias":
            place = torch.arange(length)
            mask = self.bias * (place - place[:, None])
        y = functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.kind == "causal", enable_gqa=True
        )
        return self.down(y.transpose(1, 2).flatten(2)).square().sum()


def case(kind: str, length: int = 11) -> tuple[Attends, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Attends(kind).double()
    x = torch.randn(2, length, 8, dtype=torch.float64)
    seen = torch.arange(length) < torch.tensor([[length], [length - 3]])
    return model, {"x": x, "seen": seen}
