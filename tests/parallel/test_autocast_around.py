"""Autocast around the calls of a split module: types and values as of the unsplit one."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from broad_cases import broad
from releases import tried_under_autocast
from split_ranks import as_unsplit, programs_of
from torch import nn
from torch.nn import functional as F

import autoparallel
from autoparallel.support.torch_versions import RELEASE


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        query = hidden.view(*hidden.shape[:2], 2, 4).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        x = x + mixed.transpose(1, 2).flatten(2)
        return x + self.outer(F.gelu(self.inner(x)))


class Model(nn.Module):
    """A transformer whose loss autocast takes in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        with torch.autocast("cpu", enabled=False):
            penalty = self.head(x.float()).square().mean()
        # Made without a device, and without saying of which type.
        weights = torch.linspace(0.5, 1.5, logits.shape[-1])
        total = (logits * weights).softmax(-1).pow(2).sum()
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
        return loss + penalty + total / 100, logits


class Broken(Model):
    """It stays Python, and its blocks are parts, which Python calls under autocast."""

    def forward(self, ids: torch.Tensor) -> Any:
        if int(ids.sum()) < 0:
            return ids.sum()
        return super().forward(ids)


IDS = torch.arange(15).reshape(3, 5) % 11


def script(*kinds: torch.dtype | None) -> Any:
    """Calls under autocast to one type after another, None for without."""

    def run(model: Any) -> Any:
        for kind in kinds:
            model.zero_grad(set_to_none=True)
            around = torch.autocast("cpu", kind) if kind else contextlib.nullcontext()
            with around:
                loss, logits = model(IDS)
            loss.backward()
            yield loss, torch.empty(0, dtype=logits.dtype)
        return programs_of(model)

    return run


@pytest.mark.parametrize(
    ("model", "world_size"), [*broad((Model, 1)), (Model, 3), *broad((Broken, 2))]
)
def test_it_is_as_unsplit(model: Any, world_size: int) -> None:
    kinds = (torch.bfloat16, None, torch.bfloat16, torch.float16)
    # Sums of rounded numbers are added in another order: some units in the last place of bfloat16.
    close = {"rtol": 2e-2, "atol": 2e-2} if world_size > 1 else {"rtol": 1e-6, "atol": 1e-7}
    made = as_unsplit(model(), world_size, (IDS,), script(*kinds), close=close)
    # Torch 2.11 cannot try a product of symbolic sizes under autocast: then it stays Python.
    assert model is Broken or RELEASE < (2, 13) or made == 3


class Decorated(Model):
    """It enters autocast by a decorator, which holds the context for all calls."""

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, ids: torch.Tensor) -> Any:
        return super().forward(ids)


@tried_under_autocast
def test_a_decorated_forward_is_traced_whole() -> None:
    """The context notes at each entry what was set before, which is no effect of the model's."""
    module = autoparallel.autoparallelize(Decorated(), 1, example_inputs=IDS)
    assert programs_of(module) == 1
    expected, _ = Decorated()(IDS)
    torch.testing.assert_close(module(IDS)[0], expected)
