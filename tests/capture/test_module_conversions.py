"""A forward that converts a module: nothing is done where nothing is to be done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import relative_error, worst_gradient
from torch import nn

import autoparallel
from autoparallel.capture.module_conversions import idle_conversions
from autoparallel.errors import CaptureError


class Converts(nn.Module):
    """Its forward converts the head, as models do that keep a router in float32."""

    def __init__(self, method: str, *args: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = (
            nn.Linear(6, 8),
            nn.Sequential(nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5)),
        )
        self.method, self.args = method, args

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.head = getattr(self.head, self.method)(*self.args)
        out: torch.Tensor = self.head(torch.tanh(self.body(x)))
        return out.sin().mul(torch.arange(5)).mean()


@pytest.mark.parametrize(
    ("method", "arguments"), [("to", (torch.float64,)), ("double", ()), ("to", ("cpu",))]
)
def test_a_conversion_that_changes_nothing_is_none(method: str, arguments: tuple[Any, ...]) -> None:
    model = Converts(method, *arguments).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert not plan.breaks
    made = autoparallel.simulate(model, example_inputs=(x,), plan=plan)
    loss = model(x)
    loss.backward()
    assert relative_error(made.output.detach(), loss.detach()) < 1e-14
    gradients = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    assert worst_gradient(dict(made.gradients), gradients)[0] < 1e-12


@pytest.mark.parametrize(("method", "arguments"), [("to", (torch.float32,)), ("share_memory", ())])
def test_any_other_is_refused(method: str, arguments: tuple[Any, ...]) -> None:
    model, x = Converts(method, *arguments).double(), torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(CaptureError, match=r"converts 0\.weight of a Sequential"):
        autoparallel.make_plan(model, 2, example_inputs=(x,), strict_capture=True)


def test_what_others_put_in_the_place_of_torchs_conversion_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library may watch conversions, too, also one that is imported later."""
    seen = []
    torchs = nn.Module._apply

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        seen.append(type(self))
        return torchs(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "_apply", watched)
    with idle_conversions():
        nn.ReLU().to(torch.float32)
    assert not seen
    assert nn.Module._apply is watched
