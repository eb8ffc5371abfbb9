"""Labels of all sequences in one row: a speech model's loss of them is split by sequences."""

from __future__ import annotations

import pytest
import torch
from families import relative_error, worst_gradient
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.capture.graph_breaks import trace
from autoparallel.errors import CaptureError
from autoparallel.mesh import Mesh
from autoparallel.placement import Shard
from autoparallel.rules.lookup import find_rule


class Speech(nn.Module):
    """Scores of letters at each time, and their CTC loss. form: of the labels in one row."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.head = nn.Linear(8, 6)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = labels >= 0
        counts = kept.sum(-1)
        row = labels[kept] if self.form == "index" else labels.masked_select(kept)
        if self.form == "other counts":
            counts = (labels >= 1).sum(-1)
        scores = self.head(x)
        losses = functional.ctc_loss(
            functional.log_softmax(scores, dim=-1).transpose(0, 1),
            row,
            mask.sum(-1),
            counts,
            reduction="none" if self.form == "none" else "mean",
            zero_infinity=True,
        )
        return losses.sum(), scores


LABELS = torch.tensor([[1, 2, -1], [3, -1, -1], [1, 1, 2], [-1, -1, -1], [-1, 2, 3]])


def inputs(seed: int) -> tuple[torch.Tensor, ...]:
    """Sequences of several lengths, of which one has no label and one has them at its end."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 9, 8, dtype=torch.float64, generator=generator)
    lengths = torch.randint(7, 10, (5, 1), generator=generator)
    return x, (torch.arange(9) < lengths).long(), LABELS.roll(seed, 0)


@pytest.mark.parametrize("form", ["select", "index", "none"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_each_sequence_has_its_own_labels(form: str, world_size: int) -> None:
    model = Speech(form).double()
    mesh = Mesh(dp=world_size)
    plan = autoparallel.make_plan(
        model, mesh=mesh, example_inputs=inputs(0), constraints=["batch on dp"]
    )
    assert not plan.breaks
    (loss,) = (op for op in plan.ops if "ctc_loss" in op.target)
    assert isinstance(loss.results[0][0], Shard)
    expected, _ = model(*inputs(1))
    expected.backward()
    run = autoparallel.simulate(model, plan=plan, example_inputs=inputs(1), backward=lambda y: y[0])
    assert relative_error(run.output[0].detach(), expected.detach()) < 1e-10
    gradients = {path: p.grad for path, p in model.named_parameters()}
    error, where = worst_gradient(run.gradients, gradients)
    assert error < 1e-10, where


def test_a_row_that_is_counted_otherwise_is_refused() -> None:
    with pytest.raises(CaptureError, match="depends on the values"):
        trace(Speech("other counts").double(), inputs(0), {}, known=find_rule)


class Given(nn.Module):
    """A loss of labels that are in one row as they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, row: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        scores = functional.log_softmax(self.head(x), dim=-1).transpose(0, 1)
        return functional.ctc_loss(scores, row, torch.full_like(counts, 9), counts)


def test_a_row_that_is_given_stays_whole() -> None:
    torch.manual_seed(0)
    model, (x, _, _) = Given().double(), inputs(0)
    given = (x, torch.tensor([1, 2, 3, 4, 5, 1, 2]), torch.tensor([2, 1, 0, 3, 1]))
    expected = model(*given)
    expected.backward()
    plan = autoparallel.make_plan(model, 3, example_inputs=given)
    assert not plan.breaks
    run = autoparallel.simulate(model, plan=plan, example_inputs=given)
    assert relative_error(run.output.detach(), expected.detach()) < 1e-10
    gradients = {path: p.grad for path, p in model.named_parameters()}
    error, where = worst_gradient(run.gradients, gradients)
    assert error < 1e-10, where
