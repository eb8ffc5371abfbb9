"""Small models of unlike form, for pipelines: what crosses from stage to stage differs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["MODELS", "Contrastive", "Language", "Normalized", "batch_of"]

VOCABULARY, WIDTH, LENGTH = 41, 16, 11


class Block(nn.Module):
    """A transformer block with dropout."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        rows, length, _ = x.shape
        parts = self.qkv(self.before(x)).chunk(3, -1)
        q, k, v = (part.view(rows, length, 4, -1).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal
        )
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH)))
        return x + self.drop(self.down(functional.gelu(self.up(self.between(x)))))


class Language(nn.Module):
    """A language model whose head is its embedding, and whose loss ignores some labels."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


class Masked(nn.Module):
    """An encoder with a padding mask, and a trained bias of attention that all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.bias = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(2 * LENGTH, 4)
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        places = torch.arange(length)
        bias = self.bias(places[:, None] - places[None, :] + length).permute(2, 0, 1)[None]
        seen = (tokens != 0)[:, None, None, :]
        mask = bias.masked_fill(~seen, -1e9)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(x)
        return functional.cross_entropy(logits.transpose(1, 2), labels)


class Skips(nn.Module):
    """A U-Net: what early stages make, late ones read. Its loss is a mean over elements."""

    def __init__(self) -> None:
        super().__init__()
        channels = [(3, 8), (8, 8), (8, 8), (16, 8), (16, 8)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(one, two, 3, padding=1), nn.GroupNorm(2, two), nn.SiLU())
            for one, two in channels
        )
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        one = self.layers[0](tokens)
        two = self.layers[1](functional.avg_pool2d(one, 2))
        low = self.layers[2](functional.avg_pool2d(two, 2))
        low = self.layers[3](torch.cat([functional.interpolate(low, scale_factor=2), two], 1))
        top = self.layers[4](torch.cat([functional.interpolate(low, scale_factor=2), one], 1))
        return functional.mse_loss(self.out(top), labels)


class Normalized(nn.Module):
    """Batch norm, which needs the whole batch in training, and writes to buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.last(self.norm(self.first(tokens)).relu()), labels)


class Contrastive(nn.Module):
    """Each row is compared with all others: every micro-batch has one side of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        one, two = (self.last(self.first(side).relu()) for side in (tokens, labels))
        return functional.cross_entropy(one @ two.T, torch.arange(tokens.shape[0]))


class Frozen(Language):
    """A language model of which the first stages are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())
        for part in (self.embedding, self.positions, self.blocks[0], self.blocks[1]):
            part.requires_grad_(False)


MODELS = {
    each.__name__: each for each in (Language, Masked, Skips, Normalized, Contrastive, Frozen)
}


def batch_of(kind: str, step: int = 0, rows: int = 6) -> dict[str, Any]:
    """Return a batch for a model of MODELS, in float64 where it is not of tokens."""
    generator = torch.Generator().manual_seed(step)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    if kind == "Skips":
        images = [torch.randn(rows, 3, 8, 8, **options) for _ in range(2)]
        return dict(zip(("tokens", "labels"), images, strict=True))
    if kind == "Normalized":
        labels = torch.randint(4, (rows,), generator=generator)
        return {"tokens": torch.randn(rows, 6, **options), "labels": labels}
    if kind == "Contrastive":
        return {name: torch.randn(rows, 6, **options) for name in ("tokens", "labels")}
    tokens = torch.randint(1, VOCABULARY, (rows, LENGTH), generator=generator)
    labels = tokens.roll(-1, 1)
    # Unevenly over the rows: no mean of means is the mean.
    labels[0, :7] = labels[3] = -100
    tokens[1, 6:] = 0
    return {"tokens": tokens, "labels": labels}
