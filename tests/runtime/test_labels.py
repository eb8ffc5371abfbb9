"""Losses that divide by how many labels count, where none does: on a rank, or on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from broad_cases import broad
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.planning.search import search
from autoparallel.runtime import kernels

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


def reader(name: str) -> Reader:
    torch.manual_seed(2)
    return Reader(LOSSES[name]).double()


X = torch.randint(0, CLASSES, (6, 4), generator=torch.Generator().manual_seed(1))


@cache
def traced(name: str) -> Plan:
    """A plan whose graph is that of all: no trace sees which labels count."""
    return autoparallel.make_plan(reader(name), 1, example_inputs=(X, labels("none")))


@cache
def planned(name: str, mesh: Mesh, sequence_parallel: bool) -> Plan:
    plan = traced(name)
    assert plan.captured is not None
    options = replace(
        plan.options,
        sequence_parallel=sequence_parallel,
        data_parallel="dp" in dict(mesh.axes),
    )
    return search(plan.captured, plan.model, mesh, options)


@pytest.mark.parametrize("sequence_parallel", [True, *broad(False)])
@pytest.mark.parametrize("mesh", [*broad(Mesh(dp=2), Mesh(tp=3)), Mesh(dp=2, tp=2)], ids=str)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_that_do_not_count(
    name: str, which: str, mesh: Mesh, sequence_parallel: bool
) -> None:
    """Loss and gradients are torch's: without any label a loss that is no number, and zeros."""
    whole = reader(name)
    loss = whole(X, labels(which))
    loss.backward()
    plan = planned(name, mesh, sequence_parallel)
    made = autoparallel.simulate(reader(name), example_inputs=(X, labels(which)), plan=plan)
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-11, atol=0, equal_nan=True)
    for path, parameter in whole.named_parameters():
        pair = (made.gradients[path], parameter.grad)
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12, equal_nan=True)
        if which == "none" and name != "a masked mean":
            assert not pair[0].any()


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("last", [True, False], ids=["classes-last", "images"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_rows_is_torchs(reduction: int, last: bool, smoothing: float) -> None:
    """In both memory layouts, with ignored labels: the losses and both derivatives."""
    torch.manual_seed(0)
    weight, target = torch.rand(5).double(), torch.tensor([[0, 4, -100], [1, 2, 3]])
    whole = torch.randn(2, 3, 5, dtype=torch.float64) if last else torch.randn(2, 5, 3).double()
    outcomes = []
    for loss in (kernels.cross_entropy_rows, torch.ops.aten.cross_entropy_loss.default):
        leaf = whole.clone().requires_grad_()
        logits = leaf.permute(0, 2, 1) if last else leaf
        losses = loss(logits, target, weight, reduction, -100, smoothing)
        (first,) = torch.autograd.grad(losses.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        outcomes.append((losses, first, second))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-12, atol=1e-12)
    one, other = (losses.shape for losses, _, _ in outcomes)
    assert one == other


def test_loss_of_rows_takes_no_copy_of_logits() -> None:
    """Where the classes lie last in memory, torch's loss of rows is what runs."""
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = kernels.cross_entropy_rows(logits.permute(0, 2, 1), torch.zeros(2, 3).long())
    names: list[str] = []
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.append(node.name())
            nodes += [following for following, _ in node.next_functions]
    assert "NllLossBackward0" in names
    assert not any("Clone" in name or "Unsafe" in name for name in names)
