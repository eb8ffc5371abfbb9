"""Losses of a batch that comes in parts: sums over rows are, whatever they are written as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from broad_cases import share_of
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.errors import CoupledBatchError
from autoparallel.mesh import Mesh
from autoparallel.support.pytree import flatten

CLASSES, WIDTH, ROWS, LENGTH = 7, 6, 5, 4
TOLERANCE = 1e-12
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]


class Scored(nn.Module):
    """A model with a loss of logits, hidden rows, labels and a mask."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.up, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.loss = loss

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> Any:
        hidden = functional.gelu(self.up(self.embedding(tokens)))
        return self.loss(self.head(hidden), hidden, labels, mask)


def per_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return functional.one_hot(labels.clamp(min=0), CLASSES).double()


def chosen(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    likely = logits.log_softmax(-1)
    return likely.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def kinds_of_sums() -> dict[str, Loss]:

    return {
        "mean of losses of flat tokens": lambda x, h, y, m: per_token(x, y).mean(),
        "masked sum over a count": lambda x, h, y, m: (
            (per_token(x, y) * m.flatten()).sum() / m.sum().clamp(min=1)
        ),
        "mean of masked means of rows": lambda x, h, y, m: (
            (per_token(x, y).view(y.shape) * m).sum(1) / m.sum(1)
        ).mean(),
        "focal": lambda x, h, y, m: (
            (1 - torch.exp(-per_token(x, y))) ** 2 * per_token(x, y)
        ).mean(),
        "likelihoods of flat tokens": lambda x, h, y, m: functional.nll_loss(
            x.log_softmax(-1).flatten(0, 1), y.flatten()
        ),
        "gathered likelihoods": lambda x, h, y, m: -(chosen(x, y) * m).sum() / m.sum(),
        "binary": lambda x, h, y, m: functional.binary_cross_entropy_with_logits(x, one_hot(y)),
        "flat squares": lambda x, h, y, m: functional.mse_loss(
            x.flatten(0, 1), one_hot(y).flatten(0, 1)
        ),
        "divergence": lambda x, h, y, m: functional.kl_div(
            x.log_softmax(-1), one_hot(y).softmax(-1), reduction="batchmean"
        ),
        "two losses, one of fixed sizes": lambda x, h, y, m: (
            functional.cross_entropy(x.transpose(1, 2), y)
            + 0.3 * functional.smooth_l1_loss(x, one_hot(y))
        ),
        "and a mean for the log": lambda x, h, y, m: {
            "loss": per_token(x, y).mean(),
            "right": (x.argmax(-1) == y).double().mean(),
        },
    }


# What is no sum over rows, with the op that needs all of them.
COUPLED: dict[str, tuple[Loss, str]] = {
    "load of experts": (
        lambda x, h, y, m: (one_hot(x.argmax(-1)).mean((0, 1)) * x.softmax(-1).mean((0, 1))).sum(),
        "aten.mul",
    ),
    "perplexity": (lambda x, h, y, m: per_token(x, y).mean().exp(), "aten.exp"),
    "overlap": (
        lambda x, h, y, m: (x.sigmoid() * one_hot(y)).sum() / x.sigmoid().sum(),
        "aten.div",
    ),
    "worst token": (lambda x, h, y, m: per_token(x, y).max(), "aten.max"),
    "pairs of rows": (
        lambda x, h, y, m: functional.logsigmoid(h[0:4:2].sum(-1) - h[1:4:2].sum(-1)).mean(),
        "aten.log_sigmoid",
    ),
}


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CLASSES, (ROWS, LENGTH), generator=generator)
    labels, mask = tokens.roll(-1, 1), torch.ones(ROWS, LENGTH, dtype=torch.float64)
    # Unevenly over the rows: no mean of means is the mean.
    labels[0, :3] = labels[3] = -100
    mask[0, :3] = mask[3, 1:] = 0
    return {"tokens": tokens, "labels": labels, "mask": mask}


def model_of(loss: Loss) -> nn.Module:
    torch.manual_seed(4)
    return Scored(loss).double()


@pytest.mark.parametrize("kind", share_of(kinds_of_sums(), 2))
def test_sums_over_rows_are_computed_in_parts(kind: str) -> None:
    """Of micro-batches of unlike size: two rows, two, and one."""
    loss = kinds_of_sums()[kind]
    options: dict[str, Any] = {"example_inputs": batch()}
    plan = autoparallel.make_plan(model_of(loss), mesh=Mesh(pp=2), microbatches=3, **options)
    split = autoparallel.simulate(model_of(loss), plan=plan, **options)
    whole = autoparallel.simulate(model_of(loss), 1, **options)
    pairs = zip(flatten(split.output)[0], flatten(whole.output)[0], strict=True)
    gradients = [(split.gradients[path], value) for path, value in whole.gradients.items()]
    for one, other in (*pairs, *gradients):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", COUPLED)
def test_the_op_that_needs_the_whole_batch_is_named(kind: str) -> None:
    loss, op = COUPLED[kind]
    with pytest.raises(CoupledBatchError, match=rf"(?s){op}.*test_losses_in_parts"):
        autoparallel.make_plan(
            model_of(loss), mesh=Mesh(pp=2), microbatches=3, example_inputs=batch()
        )
