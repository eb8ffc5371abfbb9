"""Loops over experts that read vectors and numbers of their own, and looked-up matrices."""

from __future__ import annotations

from collections.abc import Callable

import expert_families
import pytest
import torch
from broad_cases import broad
from families import relative_error, worst_gradient
from torch import nn

import autoparallel
from autoparallel.graph.row_program import ROUTED

TOLERANCE = 1e-10
Made = Callable[["Expert", torch.Tensor], torch.Tensor]


class Expert(nn.Module):
    """An expert with a product, and parameters of few dims. made: what it makes of its rows."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self.made = made
        self.up, self.inner = nn.Linear(4, 6), nn.Linear(3, 3)
        self.down = nn.Linear(6, 4)
        self.number = nn.Parameter(torch.randn(()))
        self.one, self.three = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(3))
        self.row = nn.Parameter(torch.randn(1, 4))
        self.norm = nn.LayerNorm(4)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.made(self, x)


class Routed(nn.Module):
    """A loop over experts, each with the tokens that chose it; and a loss."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(4, 4)
        self.experts = nn.ModuleList(Expert(made) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == number)
            y.index_add_(0, token, expert(x[token]) * weights[token, choice, None])
        return y.pow(2).sum()


def headed(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    heads = expert.up(x).reshape(-1, 2, 3) * expert.three
    return expert.down(heads.reshape(-1, 6))


def gated(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    return expert.down(expert.up(x)) * torch.sigmoid(x.sum(-1) + expert.one).unsqueeze(-1)


def scaled(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    return expert.down(expert.up(x) * expert.number)


def shifted(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    # The row is read in two ways: by rows, and as a matrix.
    return torch.tanh(x * expert.row) * nn.functional.linear(x, expert.row)


def normed(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    return expert.down(expert.up(expert.norm(x)))


def inner(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    return expert.down(expert.inner(expert.up(x).reshape(-1, 2, 3)).reshape(-1, 6))


@pytest.mark.parametrize(
    ("made", "joined"),
    [(headed, 1), *broad((gated, 1), (scaled, 1), (shifted, 1)), (normed, 0), *broad((inner, 0))],
)
def test_experts_with_parameters_of_few_dims(made: Made, joined: int) -> None:
    """Split as one op, or left as they are where an op reads more than rows by rows."""
    model = Routed(made).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = model(x)
    expected.backward()
    gradients = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    with expert_families.only("experts_summed"):
        plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert sum(op.target == ROUTED for op in plan.ops) == joined
    run = autoparallel.simulate(model, plan=plan, example_inputs=(x,))
    assert relative_error(run.output.detach(), expected.detach()) < TOLERANCE
    made_gradients = {path: run.gradients[path] for path in gradients}
    error, where = worst_gradient(made_gradients, gradients)
    assert error < TOLERANCE, where


class Looked(nn.Module):
    """Experts' matrices that are looked up for each row. below: how far choices are below 0, .."""

    def __init__(self, below: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.below = nn.Linear(4, 4), below
        self.table = nn.Parameter(torch.randn(4, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        chosen = chosen - self.below if self.below else chosen
        rows = x.repeat_interleave(2, 0).unsqueeze(1)
        made = torch.bmm(rows, self.table[chosen.reshape(-1)]).squeeze(1)
        made = made * weights.reshape(-1).unsqueeze(-1)
        return made.view(x.shape[0], 2, -1).sum(1).pow(2).sum()


@pytest.mark.parametrize(("below", "joined"), [(0, 1), (4, 0)])
def test_multiple_choice_that_count_from_the_end(below: int, joined: int) -> None:
    """An index takes them; routed experts would take them for nobody's."""
    model, x = Looked(below).double(), torch.randn(6, 4, dtype=torch.float64)
    with expert_families.only("experts_summed"):
        plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert sum(op.target == ROUTED for op in plan.ops) == joined
    run = autoparallel.simulate(model, plan=plan, example_inputs=(x,))
    assert relative_error(run.output.detach(), model(x).detach()) < TOLERANCE
