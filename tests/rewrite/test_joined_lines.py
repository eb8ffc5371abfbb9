"""Conversions and products that become one statement: which do, and that numbers stay the same."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional

import autoparallel


class Attention(nn.Module):
    """Two heads of queries read each head of keys; then a gated product. A norm is before each."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(24, 1e-6) for _ in range(2))
        self.queries, self.keys = nn.Linear(24, 24, bias=False), nn.Linear(24, 12, bias=False)
        self.values, self.back = nn.Linear(24, 12, bias=False), nn.Linear(24, 24, bias=False)
        self.gate, self.up, self.down = nn.Linear(24, 36), nn.Linear(24, 36), nn.Linear(36, 24)
        self.start, self.head = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a number of a batch of sequences, (b, s, 24)."""
        x = self.start(x)
        y = self.norms[0](x)
        query, key, value = (
            layer(y).unflatten(-1, (-1, 6)).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        key, value = (each.repeat_interleave(2, 1) for each in (key, value))
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.back(seen.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.head(x).pow(2).sum(-1).sin().cos().exp().tanh().sum()


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "tp"])
def test_products_of_one_converted_tensor_are_one_statement(sequence_parallel: bool) -> None:
    """Also where others come between them in the model."""
    torch.manual_seed(1)
    model, x = Attention().double(), torch.randn(3, 8, 24, dtype=torch.float64)
    plan = autoparallel.make_plan(model, 2, example_inputs=x, sequence_parallel=sequence_parallel)
    lines = autoparallel.emitted_program(plan).splitlines()
    several = [
        line for line in lines if re.search(r"overlap\.convert_then_linear\(.*, [23]\)$", line)
    ]
    assert [line.count("_weight") for line in several if "queries" in line] == [3]
    assert any("gate_weight" in line and "up_weight" in line for line in several)
    for ranks in (2, 3):
        found = autoparallel.simulate(
            model, ranks, example_inputs=x, sequence_parallel=sequence_parallel
        )
        model.zero_grad()
        loss = model(x)
        loss.backward()
        torch.testing.assert_close(found.output, loss.detach(), rtol=1e-12, atol=1e-12)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(
                found.gradients[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name
            )
