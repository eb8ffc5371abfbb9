"""Models whose forwards do what no op of a trace tells of, each with a script that calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from split_ranks import as_unsplit
from torch import nn
from torch.distributed.tensor import DTensor

import autoparallel

__all__ = ["Base", "Case", "X", "after_backward", "differences", "follows"]

X = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(6, 8)
# A model, and a generator function that yields what its calls return.
Case = tuple[nn.Module, Callable[[Any], Any]]


class Base(nn.Module):
    """Two products; `kept` is whatever a test puts there."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.kept = nn.Linear(8, 12), nn.Linear(12, 8), kept
        self.double()

    def out(self, hidden: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.b(hidden).square().mean()
        return loss


def after_backward(model: Any, *inputs: Any) -> torch.Tensor:
    """Call the model anew and differentiate what it returns."""
    model.zero_grad()
    loss: torch.Tensor = model(*(inputs or (X,)))
    loss.backward()
    return loss


def follows(case: Callable[[], Case], world_size: int) -> None:
    """Require that the split model of a case is like the unsplit one, in numbers and gradients."""
    model, script = case()
    as_unsplit(model, world_size, (X,), script)


def differences(rank: int, cases: Mapping[str, Callable[[], Case]]) -> dict[str, str]:
    """Return where split models differ from unsplit ones, on real processes, by name."""
    world_size, found = torch.distributed.get_world_size(), {}
    for name, case in cases.items():
        model, script = case()
        expected = [_values(step) for step in script(copy.deepcopy(model))]
        model, script = case()
        split = autoparallel.autoparallelize(model, world_size, example_inputs=X)
        steps = [_values(step) for step in script(split)]
        try:
            torch.testing.assert_close(steps, expected, rtol=1e-10, atol=1e-12)
        except AssertionError as error:
            found[name] = str(error)
    return found


def _values(step: Any) -> Any:
    if isinstance(step, (list, tuple)):
        return [_values(item) for item in step]
    if isinstance(step, DTensor):
        step = step.full_tensor()
    return step.detach().clone() if isinstance(step, torch.Tensor) else step
