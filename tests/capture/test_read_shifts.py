"""Rolls by numbers that are read out of tensors, and parts at such places, are look-ups."""

from __future__ import annotations

import pytest
import torch
from families import relative_error, worst_gradient
from releases import places_of_no_dims
from torch import nn

import autoparallel
from autoparallel.capture.graph_breaks import trace
from autoparallel.errors import CaptureError
from autoparallel.rules.lookup import find_rule


class Delayed(nn.Module):
    """Sums of a series moved by the delays at which it is most like itself. form: of the move."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        alike = torch.stack([(y[:, at:] * y[:, : 9 - at]).mean() for at in range(9)])
        _, delays = alike.topk(3)
        total = torch.zeros_like(y)
        for at in range(3):
            total = total + getattr(self, self.form)(y, delays[at]) * alike[delays[at]]
        # A sum over all places would be the same if all were moved the other way.
        return (self.down(total).pow(2) * torch.arange(1.0, 10.0, dtype=x.dtype)[:, None]).sum()

    def backwards(self, y, delay):
        return y.roll(shifts=-int(delay), dims=1)

    def forwards(self, y, delay):
        return torch.roll(y, delay.item(), 1)

    def in_lists(self, y, delay):
        return torch.roll(y, (int(delay),), (1,))

    def looked_up(self, y, delay):
        """From the end, and before the place is another one."""
        place = delay - 9
        part = y[:, place]
        place.zero_()
        return y * part[:, None]

    # -- others: more is done with the number

    def kept(self, y, delay):
        number = int(delay)
        return y.roll(number, 1) if number > 2 else y

    def least(self, y, delay):
        return y.roll(min(int(delay), 3), 1)

    def doubled(self, y, delay):
        return y.roll(int(delay) * 2, 1)

    def inside(self, y, delay):
        return self.moved(int(delay), y)

    def moved(self, number, y):
        return y.roll(number, 1) if number > 2 else y

    def written(self, y, delay):
        """Torch selects a view, of a tensor too that has no gradient."""
        rows = y.detach().clone()
        rows[:, delay].mul_(2.0)
        return y * rows

    def written_around(self, y, delay):
        """And the view follows what is written to the whole."""
        rows = y.detach().clone()
        part = rows[:, delay]
        rows.mul_(2.0)
        return y + part[:, None]

    def checked(self, y, delay):
        """A check is for the user to see."""
        torch._check(delay.item() * 2 < 99)
        return y

    def flat(self, y, delay):
        return y.roll(int(delay))


def inputs(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 9, 4, dtype=torch.float64, generator=generator)


@places_of_no_dims
@pytest.mark.parametrize("form", ["backwards", "forwards", "in_lists", "looked_up"])
def test_a_roll_by_a_value_is_a_look_up(form: str) -> None:
    """Planned for inputs of some delays, it is right for others, on 2 and 3 ranks."""
    model = Delayed(form).double()
    for world_size in (2, 3):
        plan = autoparallel.make_plan(model, world_size, example_inputs=(inputs(0),))
        assert not plan.breaks
        for seed in (1, 2):
            x = inputs(seed)
            model.zero_grad()
            expected = model(x)
            expected.backward()
            run = autoparallel.simulate(model, plan=plan, example_inputs=(x,))
            assert relative_error(run.output.detach(), expected.detach()) < 1e-10
            gradients = {path: p.grad for path, p in model.named_parameters()}
            error, where = worst_gradient(run.gradients, gradients)
            assert error < 1e-10, where


@pytest.mark.parametrize("form", ["kept", "least", "doubled", "inside", "flat", "checked"])
def test_other_uses_of_a_value_are_refused(form: str) -> None:
    with pytest.raises(CaptureError):
        trace(Delayed(form).double(), (inputs(0),), {}, known=find_rule)


@places_of_no_dims
@pytest.mark.parametrize("form", ["written", "written_around"])
def test_views_that_are_written_to_are_refused(form: str) -> None:
    with pytest.raises(CaptureError, match="part whose place is read out of a tensor"):
        trace(Delayed(form).double(), (inputs(0),), {}, known=find_rule)
