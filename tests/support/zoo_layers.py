"""The zoo's models in torch alone: nn.Transformer, recurrent networks, convolutions, graphs.

Each takes (layers, dropout) and returns {"loss", "logits"}.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

HIDDEN, HEADS, VOCABULARY, CLASSES = 64, 8, 211, 7
Output = dict[str, torch.Tensor]


def judged(logits: torch.Tensor, labels: torch.Tensor) -> Output:
    """Return loss and logits. logits: (..., classes). labels: (...), -100 where there is none."""
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    return {"loss": loss, "logits": logits}


class Translator(nn.Module):
    """A Translator is an `nn.Transformer` between embeddings and a head, with a causal target."""

    def __init__(self, layers: int, dropout: float) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, HIDDEN)
        self.target = nn.Embedding(VOCABULARY, HIDDEN)
        self.body = nn.Transformer(
            HIDDEN, HEADS, layers, layers, 4 * HIDDEN, dropout, batch_first=True
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> Output:
        """input_ids, attention_mask: (b, s), 0 at padding. labels: (b, t)."""
        before = F.pad(labels.clamp(min=0), (1, -1))
        length = labels.size(1)
        later = torch.ones(length, length, dtype=torch.bool, device=labels.device).triu(1)
        padding = attention_mask == 0
        hidden = self.body(
            self.source(input_ids),
            self.target(before),
            tgt_mask=later,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return judged(self.head(hidden), labels)


class Recurrent(nn.Module):
    """A Recurrent is a language model of recurrent layers. kind: nn.LSTM or nn.GRU."""

    def __init__(self, kind: type[nn.RNNBase], layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.body = kind(HIDDEN, 2 * HIDDEN, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(2 * HIDDEN, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Output:
        """input_ids, labels: (b, s); the label is the next token."""
        hidden, _ = self.body(self.embedding(input_ids))
        return judged(self.head(hidden[:, :-1]), labels[:, 1:])


class MixerBlock(nn.Module):
    """A MixerBlock mixes the patches, then the channels."""

    def __init__(self, patches: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)])

        def mlp(features: int, inner: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(features, inner),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(inner, features),
                nn.Dropout(dropout),
            )

        self.patches = mlp(patches, 2 * patches)
        self.channels = mlp(HIDDEN, 4 * HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, patches, channels)."""
        x = x + self.patches(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class Mixer(nn.Module):
    """A Mixer is an MLP-mixer (arXiv:2105.01601) on 16 patches of an image of 32 x 32."""

    def __init__(self, layers: int, dropout: float) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, HIDDEN, 8, 8)
        self.blocks = nn.Sequential(*(MixerBlock(16, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Output:
        """pixel_values: (b, 3, 32, 32). labels: (b,)."""
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        return judged(self.head(self.norm(self.blocks(x)).mean(1)), labels)


def double_convolution(before: int, after: int, dropout: float) -> nn.Sequential:
    """Return two convolutions with batch norm."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """A UNet (arXiv:1505.04597) has `layers` halvings, and returns a class for every pixel."""

    def __init__(self, layers: int, dropout: float) -> None:
        super().__init__()
        widths = [16 * 2**index for index in range(layers + 1)]
        self.first = double_convolution(3, widths[0], dropout)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(double_convolution(a, b, dropout) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairs[::-1])
        self.merge = nn.ModuleList(double_convolution(b, a, dropout) for a, b in pairs[::-1])
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Output:
        """pixel_values: (b, 3, h, w). labels: (b, h, w)."""
        kept = [self.first(pixel_values)]
        for down in self.down:
            kept.append(down(F.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class GraphConvolution(nn.Module):
    """It has graph convolutions (arXiv:1609.02907) on a dense adjacency: a class for every node."""

    def __init__(self, layers: int, dropout: float) -> None:
        super().__init__()
        sizes = [24, *[HIDDEN] * (layers - 1), CLASSES]
        self.products = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor, labels: torch.Tensor) -> Output:
        """x: (nodes, 24). adjacency: (nodes, nodes), rows summing to one. labels: (nodes,)."""
        for product in self.products[:-1]:
            x = self.dropout(F.relu(adjacency @ product(x)))
        return judged(adjacency @ self.products[-1](x), labels)
