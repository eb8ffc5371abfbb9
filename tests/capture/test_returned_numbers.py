"""Numbers that a model returns beside tensors: sizes of its inputs, and what follows from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.errors import CaptureError


class Sizes(nn.Module):
    """It returns sizes, and numbers computed from them, in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.second(self.first(x))
        rows = x.shape[0]
        return {
            "loss": y.square().mean(),
            "rows": rows,
            "shape": y.shape,
            "numbers": [rows / 2, rows > 5, x.shape[1], 2 * rows + 1, "text"],
        }


@pytest.mark.parametrize("rows", [4, 7])
def test_sizes_are_those_of_the_call(rows: int) -> None:
    model, x = Sizes(), torch.randn(rows, 6)
    split = autoparallel.autoparallelize(model, 1, example_inputs=torch.randn(4, 6))
    expected = model(x)
    for output in (split(x), autoparallel.simulate(model, 2, example_inputs=x).output):
        assert type(output["rows"]) is int
        assert type(output["numbers"][0]) is float
        assert type(output["numbers"][1]) is bool
        assert {**output, "loss": 0} == {**expected, "loss": 0}
        torch.testing.assert_close(output["loss"].detach(), expected["loss"].detach())


class Router(nn.Module):
    """It returns tensors, and the experts' loads as Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        scores = self.gate(x)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(1)[1], 1)
        return scores, chosen.long().sum(0).tolist()


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, loads = self.router(x)
        parts = x[scores.argmax(-1).argsort()].split(loads)
        alike = zip(self.experts, parts, loads, strict=True)
        outputs = [expert(part) / (1 + load) for expert, part, load in alike]
        return torch.cat(outputs).square().sum() + scores.square().sum()


def test_numbers_read_from_data_are_no_part_of_a_graph() -> None:
    """The module that returns them stays Python, and what it calls is split."""
    torch.manual_seed(0)
    model = Routed().double()
    with pytest.raises(CaptureError, match=r"number|value"):
        autoparallel.make_plan(
            model.router, 2, example_inputs=torch.ones(6, 8).double(), strict_capture=True
        )
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(12, 8, dtype=torch.float64)
        plan = autoparallel.make_plan(model, 2, example_inputs=x)
        assert ("router.gate",) in [part.paths for part in plan.parts]
        split = autoparallel.simulate(model, plan=plan, example_inputs=x)
        torch.testing.assert_close(split.output, model(x).detach(), rtol=1e-12, atol=0)
