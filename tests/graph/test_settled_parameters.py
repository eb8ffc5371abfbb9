"""Writes to parameters before a forward reads them: which are taken out, and which are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.errors import PlanError

WIDTH = 6


def by_data(weight: nn.Parameter) -> None:
    weight.data.clamp_(-0.1, 0.2)


def by_detached(weight: nn.Parameter) -> None:
    weight.detach().clamp_(min=-0.1).clamp_(max=0.2)


def without_gradient(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.relu_()


def by_half(weight: nn.Parameter) -> None:
    weight.data.mul_(0.5)


def back_and_forth(weight: nn.Parameter) -> None:
    """The second write undoes the first, which then comes again."""
    weight.data.clamp_(-0.1, 0.2)
    weight.data.clamp_(0.3, 0.4)
    weight.data.clamp_(-0.1, 0.2)


def in_part(weight: nn.Parameter) -> None:
    weight.data[:2].clamp_(-0.1, 0.2)


def by_another(weight: nn.Parameter) -> None:
    weight.data.clamp_(max=weight.data.mean())


Write = Callable[[nn.Parameter], None]


class Clipped(nn.Module):
    """Writes to its weight before it reads it, or between two reads."""

    def __init__(self, write: Write, late: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.write, self.late = write, late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift = self.up.weight.sum() if self.late else 0.0
        self.write(self.up.weight)
        return self.down(torch.relu(self.up(x) + shift))


class Net(nn.Module):
    """Calls each of its blocks twice where it writes by `data`, which autograd does not see."""

    def __init__(self, write: Write, late: bool = False) -> None:
        super().__init__()
        self.turns = 1 + (write is by_data)
        self.blocks = nn.ModuleList(Clipped(write, late) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks] * self.turns:
            x = x + block(x)
        return x.square().mean()


def build(write: Write, late: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(write, late).double()


X = torch.linspace(-1, 1, 5 * WIDTH, dtype=torch.float64).reshape(5, WIDTH)


@pytest.mark.parametrize("write", [by_data, by_detached, without_gradient, back_and_forth])
def test_a_write_that_comes_first_is_made_in_each_part(write: Write) -> None:
    """As often as blocks are called, and no block is left to Python for it."""
    plan = autoparallel.make_plan(build(write), 3, example_inputs=X)
    assert not plan.breaks
    split = autoparallel.simulate(build(write), plan=plan, example_inputs=X)
    model = build(write)
    loss = model(X)
    loss.backward()
    torch.testing.assert_close(split.output, loss, rtol=1e-12, atol=1e-12)
    for path, own in model.named_parameters():
        torch.testing.assert_close(split.gradients[path], own.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("write", "late"), [(by_data, True), (by_half, False), (in_part, False), (by_another, False)]
)
def test_other_writes_leave_the_module_to_python(write: Write, late: bool) -> None:
    """Something has read the weight before, it matters how often, or where in the weight."""
    plan = autoparallel.make_plan(build(write, late), 2, example_inputs=X)
    assert [item.path for item in plan.breaks] == ["", "blocks.0", "blocks.1"]


def test_exports_refuse_what_they_cannot_write() -> None:
    plan = autoparallel.make_plan(build(by_data), 2, example_inputs=X)
    with pytest.raises(PlanError, match=r"writes to blocks\.0\.up\.weight"):
        autoparallel.to_fx(plan, build(by_data), rank=0)


class Chosen(nn.Module):
    """Writes to its weight where numbers of its input say so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, 4 * WIDTH).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            self.layer.weight.data.clamp_(-0.1, 0.2)
        return self.layer(x).square().mean()


def test_a_write_that_is_not_made_in_each_call_leaves_the_weight_alone() -> None:
    """A program is for calls in which it is made, and ends in others after nothing was written."""
    model = Chosen()
    split = autoparallel.autoparallelize(Chosen(), 1, example_inputs=X + 1)
    for x in (X - 1, X + 1, X - 1):
        torch.testing.assert_close(split(x), model(x))
        torch.testing.assert_close(split.layer.weight, model.layer.weight)
