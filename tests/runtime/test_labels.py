"""Losses that divide by how many labels count, where none does: on a rank, or on all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.mesh import Mesh

IGNORED, CLASSES = -100, 22
WEIGHTS = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
WEIGHTS[3] = 0  # a class that does not count either


class Reader(nn.Module):
    """One embedding, one head, and a loss of (batch, length, classes) and (batch, length)."""

    def __init__(self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.loss = loss
        self.embedding, self.head = nn.Embedding(CLASSES, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.head(self.embedding(x)), labels)


def masked_mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    kept = (labels != IGNORED).flatten()
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * kept).sum() / kept.sum()


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross-entropy": lambda x, y: functional.cross_entropy(x.flatten(0, 1), y.flatten()),
    "a sum over a count": lambda x, y: (
        functional.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum")
        / (y != IGNORED).sum()
    ),
    "a masked mean": masked_mean,
    "weighted and smoothed": lambda x, y: functional.cross_entropy(
        x.transpose(1, 2), y, weight=WEIGHTS.to(x), label_smoothing=0.1
    ),
    "negative log-likelihood": lambda x, y: functional.nll_loss(
        x.log_softmax(-1).transpose(1, 2), y, weight=WEIGHTS.to(x)
    ),
}


def labels(which: str) -> torch.Tensor:
    made = torch.randint(0, CLASSES, (6, 4), generator=torch.Generator().manual_seed(0))
    if which == "none":
        made[:] = IGNORED
    elif which == "none of the first half":
        made[:3] = IGNORED
    elif which == "none of the second half":
        made[3:] = IGNORED
    else:
        made[:] = 3
        made[::2] = IGNORED
    return made


WHICH = ("none", "none of the first half", "none of the second half", "none that has a weight")


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("mesh", [Mesh(dp=2), Mesh(tp=3), Mesh(dp=2, tp=2)], ids=str)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_that_do_not_count(
    name: str, which: str, mesh: Mesh, sequence_parallel: bool
) -> None:
    """Loss and gradients are torch's: without any label a loss that is no number, and zeros."""
    x = torch.randint(0, CLASSES, (6, 4), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    model = Reader(LOSSES[name]).double()
    whole = copy.deepcopy(model)
    loss = whole(x, labels(which))
    loss.backward()
    made = autoparallel.simulate(
        model,
        mesh=mesh,
        example_inputs=(x, labels(which)),
        sequence_parallel=sequence_parallel,
        data_parallel="dp" in dict(mesh.axes),
    )
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-11, atol=0, equal_nan=True)
    for path, parameter in whole.named_parameters():
        pair = (made.gradients[path], parameter.grad)
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12, equal_nan=True)
        if which == "none" and name != "a masked mean":
            assert not pair[0].any()
