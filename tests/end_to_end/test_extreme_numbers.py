"""Numbers at the ends of their ranges: empty batches, and dropout that keeps next to nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.mesh import Mesh

TOLERANCE = 1e-12


class Attends(nn.Module):
    """Merges batch and positions, and heads and their width, as attention and losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(tokens)
        heads = self.mix(x).unflatten(-1, (2, 4)).transpose(1, 2)
        scores = torch.softmax(heads @ heads.transpose(-1, -2), -1)
        x = x + (scores @ heads).transpose(1, 2).flatten(2)
        logits = self.head(x.reshape(-1, 8))
        loss = nn.functional.cross_entropy(logits, tokens.flatten(), reduction="sum")
        return loss, logits.view(*tokens.shape, 10)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0), (1, 4)], ids=str)
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=3), Mesh(dp=2, tp=2)], ids=str)
def test_an_empty_batch_has_a_plan(shape: tuple[int, int], mesh: Mesh) -> None:
    torch.manual_seed(0)
    model, tokens = Attends().double(), torch.ones(shape, dtype=torch.long)
    loss, logits = model(tokens)
    loss.backward()
    plan = autoparallel.make_plan(model, mesh=mesh, example_inputs=tokens, product_weight=1e6)
    made = autoparallel.simulate(model, plan=plan, example_inputs=tokens)
    torch.testing.assert_close(made.output[0], loss.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(made.output[1], logits.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            made.gradients[path], parameter.grad, rtol=TOLERANCE, atol=TOLERANCE
        )


@pytest.mark.parametrize(
    ("probability", "kept"), [(1 - 1e-10, 0), (1 - 2**-34, 0), (1.0, 0), (1e-10, 512), (0.0, 512)]
)
def test_dropout_at_both_ends(probability: float, kept: int) -> None:
    """The share that is dropped is a number of 32-bit words, and all of them are one too many."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(probability)).double()
    made = autoparallel.simulate(
        model, 2, example_inputs=torch.randn(64, 8).double(), backward=lambda y: y.sum()
    )
    assert int((made.output != 0).sum()) == kept
