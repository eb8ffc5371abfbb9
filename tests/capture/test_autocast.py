"""Autocast inside a model: the casts are written out, and the rest is as without it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoparallel
from autoparallel.errors import CaptureError


class Model(nn.Module):
    """Ops that autocast runs in low precision, in float32, in the widest type of all, or as is."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.second = nn.Linear(12, 12)
        self.head = nn.Linear(12, 9)
        self.device = device

    def forward(self, x, labels):
        with torch.autocast(self.device, dtype=torch.bfloat16):
            hidden = self.norm(F.gelu(self.first(x)))
            query = hidden.reshape(hidden.shape[0], 2, 6)
            mixed = F.scaled_dot_product_attention(query, query, query).flatten(1)
            joined = torch.cat([mixed, x[:, :4]], -1)[:, :12]
            with torch.autocast(self.device, enabled=False):
                plain = self.second(joined.float())
            logits = self.head(plain) + hidden[:, :9]
            return F.cross_entropy(logits, labels) + torch.pow(logits, 2).sum() / 100


def sample():
    torch.manual_seed(0)
    return torch.randn(6, 8), torch.randint(0, 9, (6,))


@pytest.mark.parametrize("world_size", [1, 2])
def test_split_equals_whole(world_size):
    inputs = sample()
    model = Model()
    whole = copy.deepcopy(model)
    loss = whole(*inputs)
    loss.backward()
    split = autoparallel.simulate(model, world_size, example_inputs=inputs)
    close = {"rtol": 0, "atol": 0} if world_size == 1 else {"rtol": 0.02, "atol": 0.02}
    assert split.output.dtype == loss.dtype
    assert torch.allclose(split.output, loss, **close)
    for path, parameter in whole.named_parameters():
        assert torch.allclose(split.gradients[path], parameter.grad, **close), path


def test_casts_are_in_the_program():
    plan = autoparallel.make_plan(Model(), 2, example_inputs=sample())
    casts = [op for op in plan.ops if op.target == "aten.to.dtype"]
    assert len(casts) >= 6


def test_a_model_without_memory_is_refused():
    """On the meta device autocast does nothing, so what it would do cannot be seen."""
    with torch.device("meta"):
        model = Model()
    with pytest.raises(CaptureError, match="the region is for cpu, and the model is on meta"):
        autoparallel.make_plan(model, 2, example_inputs=sample())
