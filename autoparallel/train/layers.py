"""The layers of the bundled models: attention, the two products, and the block of both."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoparallel.train.model_sizes import BertConfig, GPTConfig

__all__ = ["Attention", "Block", "FeedForward"]


class Attention(nn.Module):
    """Multi-head self-attention, (b, s, h) -> (b, s, h).

    The rows of the fused weight (3h, h) are all queries, then all keys, then all values.
    """

    def __init__(self, hidden: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.hidden = hidden
        self.heads = heads
        self.dropout = dropout
        self.causal = causal
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.projection = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attended values, (b, s, h).

        x: (b, s, h). mask: boolean, broadcasts to (b, heads, s, s), True where to attend.
        """
        query, key, value = self._parts(x)
        return self._attended(query, key, value, mask, self.causal)

    def go_on(
        self, x: Tensor, mask: Tensor | None = None, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the attended values, and the keys and values of x, (2, b, heads, s, h / heads).

        before: the same of the positions before x, which are attended to as well; x is then masked
        by `mask` alone, (s, all positions).
        """
        query, key, value = self._parts(x)
        own = torch.stack([key, value])
        if before is not None:
            key, value = torch.cat([before, own], dim=-2).unbind()
        causal = self.causal and before is None
        return self._attended(query, key, value, mask, causal), own

    def _parts(self, x: Tensor) -> list[Tensor]:
        """Return queries, keys and values, each (b, heads, s, h / heads)."""
        batch, sequence, _ = x.shape
        return [
            part.view(batch, sequence, self.heads, self.hidden // self.heads).transpose(1, 2)
            for part in self.query_key_value(x).split(self.hidden, dim=-1)
        ]

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        """Return the projected sums of values."""
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        batch, _, sequence, _ = query.shape
        return self.projection(context.transpose(1, 2).reshape(batch, sequence, self.hidden))


class FeedForward(nn.Module):
    """The two products of a block, (b, s, h) -> (b, s, 4h) -> (b, s, h).

    gelu: "tanh" (GPT-2) or "none" (exact, BERT).
    """

    def __init__(self, hidden: int, gelu: str) -> None:
        super().__init__()
        self.gelu = gelu
        self.expand = nn.Linear(hidden, 4 * hidden)
        self.contract = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result for x of shape (b, s, h), in the same shape."""
        return self.contract(F.gelu(self.expand(x), approximate=self.gelu))


class Block(nn.Module):
    """Transformer block, (b, s, h) -> (b, s, h). Its norms come before each branch, or after it."""

    def __init__(self, config: GPTConfig | BertConfig, causal: bool, gelu: str) -> None:
        super().__init__()
        self.norm_last = isinstance(config, BertConfig) and config.norm == "post"
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.attention = Attention(config.hidden, config.heads, config.dropout, causal)
        self.attention_dropout = nn.Dropout(config.dropout)
        self.feed_forward_norm = nn.LayerNorm(config.hidden)
        self.feed_forward = FeedForward(config.hidden, gelu)
        self.feed_forward_dropout = nn.Dropout(config.dropout)
        for last in (self.attention.projection, self.feed_forward.contract):
            last.__dict__["initial_scale"] = 1 / math.sqrt(2 * config.layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return x plus attention plus feed-forward, all (b, s, h). mask: see Attention."""
        if self.norm_last:
            x = self.attention_norm(x + self.attention_dropout(self.attention(x, mask)))
            return self.feed_forward_norm(x + self.feed_forward_dropout(self.feed_forward(x)))
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), mask))
        return x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)))

    def go_on(self, x: Tensor, before: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the same of positions that come after others, and their keys and values.

        before, mask: see Attention.go_on. For norms that come first, without dropout.
        """
        attended, own = self.attention.go_on(self.attention_norm(x), mask, before)
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x)), own
