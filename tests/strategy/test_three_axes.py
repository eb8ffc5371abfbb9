"""A dim that three axes split divides by all of their ranks at once, not by each two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh


class Rows(nn.Module):
    """Merges a dim of 4 with one of 2, whose product divides by all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(4, 2, 8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear((self.p + x).reshape(-1, 8)).square().sum()


def test_a_dim_is_split_over_as_many_ranks_as_divide_it() -> None:
    torch.manual_seed(0)
    model, x, mesh = Rows().double(), torch.randn(4, 2, 8).double(), Mesh(a=2, b=2, c=2)
    demands = [f"p on {axis} is split 0" for axis in "abc"]
    with pytest.raises(PlanError, match=r"p cannot be as"):
        autoparallel.make_plan(model, mesh=mesh, example_inputs=x, constraints=demands)
    plan = autoparallel.make_plan(
        model, mesh=mesh, example_inputs=x, constraints=demands[:2], product_weight=1e5
    )
    made = autoparallel.simulate(model, plan=plan, example_inputs=x)
    loss = model(x)
    loss.backward()
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-12, atol=1e-12)
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(made.gradients[path], parameter.grad, rtol=1e-12, atol=1e-12)
    assert made.apart == 0
