"""Equal modules anywhere in a model: one of them is traced, and none that is not equal."""

from __future__ import annotations

import pytest
import torch
from families import relative_error, worst_gradient
from torch import nn

import autoparallel
from autoparallel.capture.equal_modules import EqualModules

WIDTH = 8


class Scaled(nn.Module):
    """A projection that is scaled by the block's number."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.project, self.index = nn.Linear(WIDTH, WIDTH), index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.project(x)) * (1 + self.index)


class Block(nn.Module):
    """Leaves torch for a number of the data, so that its submodules are parts."""

    def __init__(self, index: int, slope: float) -> None:
        super().__init__()
        self.scaled, self.slope = Scaled(index), slope
        self.inner = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(16, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x) + self.inner(x) * self.slope / (1 + int((x > 0).sum()))


class Stacks(nn.Module):
    """One block, then three others whose numbers count on: only in these a number counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.ModuleList([Block(0, 0.5)])
        self.second = nn.ModuleList(Block(index, 0.25) for index in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.first, *self.second):
            x = x + block(x)
        return x.square().mean()


def test_modules_are_equal_wherever_they_stand() -> None:
    alike = EqualModules(Stacks())
    assert alike.canonical("first.0.inner") == "first.0.inner"
    assert alike.canonical("second.2.inner") == "first.0.inner"
    assert alike.canonical("second.2") == "second.0"
    assert alike.canonical("") == ""
    # Of these, the numbers are watched in the second stack alone.
    assert alike.canonical("first.0.scaled") == "first.0.scaled"
    assert alike.canonical("second.2.scaled") == "second.0.scaled"


def test_two_equal_blocks_are_enough() -> None:
    alike = EqualModules(nn.Sequential(Block(0, 0.5), Block(1, 0.5)))
    assert alike.canonical("1.scaled") == "0.scaled"
    assert alike.counters("0") == (("scaled", "index"),)


def test_other_settings_make_modules_unlike() -> None:
    one = EqualModules(nn.ModuleDict({"a": nn.Dropout(0.1), "b": nn.Dropout(0.2)}))
    assert [one.canonical(name) for name in "ab"] == ["a", "b"]
    shared = nn.Linear(2, 2)
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": shared, "d": shared})
    tied["b"].weight = shared.weight
    two = EqualModules(tied)
    assert [two.canonical(name) for name in "abc"] == ["a", "b", "c"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_equal_parts_of_unlike_blocks_are_traced_once(world_size: int) -> None:
    model = Stacks().double()
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    plan = autoparallel.make_plan(model, world_size, example_inputs=(x,))
    assert len(plan.breaks) == 5
    inner = ("first.0.inner", *(f"second.{index}.inner" for index in range(3)))
    assert inner in [part.paths for part in plan.parts]
    made = autoparallel.simulate(model, example_inputs=(x,), plan=plan)
    loss = model(x)
    loss.backward()
    assert relative_error(made.output.detach(), loss.detach()) < 1e-13
    gradients = {path: parameter.grad for path, parameter in model.named_parameters()}
    assert worst_gradient(dict(made.gradients), gradients)[0] < 1e-12
