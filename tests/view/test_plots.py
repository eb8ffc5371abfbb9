"""Plots are files of the asked kind, the same for the same figures, and show what they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from autoparallel import make_plan
from autoparallel.errors import PlanError
from autoparallel.plan import Plan
from autoparallel.view.plots import plot_measured, plot_steps, plot_variants

ROWS = [("gpt2", 0.08, 0.09), ("bert", 0.02, 0.018)]


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    """A small model's plans for two and four ranks, one of them without its graph."""
    model, inputs = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)), torch.ones(32, 64)
    made = [make_plan(model, size, example_inputs=inputs, hardware="dgx-a100") for size in (2, 4)]
    return [made[0], Plan.from_json(made[1].to_json())]


def test_steps_are_broken_down(plans: list[Plan], tmp_path: Path) -> None:
    """By name, as vectors; the same bytes every time."""
    files = [tmp_path / name for name in ("one.svg", "other.svg")]
    for file in files:
        plot_steps(plans, ["planned", "published"], file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "</svg>" in files[0].read_text()


@pytest.mark.parametrize("varied", ["world_size", "memory_limit", "hardware"])
def test_what_varies_is_drawn(varied: str, plans: list[Plan], tmp_path: Path) -> None:
    """What has no plan is left out, or marked as not fitting."""
    labels = ["10MiB", "20MiB", "1MiB"] if varied == "memory_limit" else ["2", "4", "8"]
    file = tmp_path / "plot.png"
    plot_variants(plans[0], [*plans, None], labels, varied, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PlanError, match="no plan to be drawn"):
        plot_variants(plans[0], [None], ["8"], varied, file)


def test_predicted_against_measured(tmp_path: Path) -> None:
    """Each row is named."""
    plot_measured(ROWS, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    with pytest.raises(PlanError, match=r"end in \.svg or \.png"):
        plot_measured(ROWS, tmp_path / "plot.pdf")
    with pytest.raises(PlanError, match="nothing was measured"):
        plot_measured([], tmp_path / "plot.svg")
