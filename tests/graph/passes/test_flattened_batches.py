"""Products over a merged batch of examples and heads are split by heads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import autoparallel


class MergedHeads(nn.Module):
    """Attention with batch and heads in one dim: a bias in the product, positions, a look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(12, 24) for _ in range(3))
        self.places = nn.Parameter(torch.randn(7, 12))
        self.norm = nn.LayerNorm(12)
        self.bias = nn.Parameter(torch.randn(6, 1, 5))
        self.out = nn.Linear(24, 12)

    def merged(self, x: torch.Tensor) -> torch.Tensor:
        """(b, s, 24) to (b * 6, s, 4)."""
        return x.unflatten(-1, (6, 4)).transpose(1, 2).reshape(-1, x.size(1), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, 5, 12)."""
        batch = x.size(0)
        query, key, value = (self.merged(f(x)) for f in (self.query, self.key, self.value))
        places = self.merged(self.query(self.norm(self.places).unsqueeze(0))).repeat(batch, 1, 1)
        bias = self.bias.repeat(batch, 1, 1)
        scores = torch.baddbmm(bias, query, key.transpose(-1, -2), beta=0.5, alpha=0.7)
        index = (torch.arange(5).unsqueeze(0) + torch.arange(5).unsqueeze(1)) % 7
        near = torch.bmm(query, places.transpose(-1, -2) / 3)
        scores = scores + torch.gather(near, -1, index.expand(batch * 6, -1, -1))
        later = torch.ones(5, 5, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf")).view(batch, 6, 5, 5)
        weights = scores.softmax(-1).view(-1, 5, 5)[:, :, 1:]
        mixed = torch.bmm(weights, value[:, 1:])
        mixed = torch.baddbmm(mixed, weights, value[:, :4], beta=2)
        return self.out(mixed.view(batch, 6, 5, 4).transpose(1, 2).flatten(2)).square().mean()


@pytest.mark.parametrize("world_size", [2, 3])
def test_heads_are_split(world_size: int) -> None:
    """All products are, those of positions with a weight that others use too.

    The loss and every gradient are those of the whole.
    """
    torch.manual_seed(3)
    model = MergedHeads().double()
    x = torch.randn(3, 5, 12).double()
    whole = copy.deepcopy(model)
    loss = whole(x)
    loss.backward()
    plan = autoparallel.make_plan(model, world_size, example_inputs=x)
    assert not [op.target for op in plan.ops if "bmm" in op.target]
    assert plan.split_flops == 1
    assert {p.path for p in plan.parameters if p.reason and len(p.shape) > 1} <= {"places"}
    split = autoparallel.simulate(model, world_size, example_inputs=x, plan=plan)
    assert torch.allclose(split.output, loss, rtol=1e-12, atol=1e-12)
    for path, parameter in whole.named_parameters():
        found = split.gradients[path]
        assert torch.allclose(found, parameter.grad, rtol=1e-11, atol=1e-12), path
