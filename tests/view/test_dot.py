"""The picture of a plan as a file: its ending says what is written."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.plan import Plan
from autoparallel.view.dot import to_dot


@pytest.fixture(scope="module")
def plan() -> Plan:
    model = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32))
    return autoparallel.make_plan(model, 2, example_inputs=torch.ones(4, 32))


def test_a_png_is_a_picture_in_colour(plan: Plan, tmp_path: Path) -> None:
    """It can be read as an image, and is no blank one."""
    from matplotlib import image

    autoparallel.write_svg(plan, tmp_path / "plan.PNG")
    assert (tmp_path / "plan.PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(tmp_path / "plan.PNG", format="png")
    assert min(pixels.shape[:2]) > 100
    assert pixels[..., :3].std() > 0.01


def test_the_dot_text_is_written_as_it_is(plan: Plan, tmp_path: Path) -> None:
    """For other tools of graphviz."""
    autoparallel.write_svg(plan, tmp_path / "plan.dot")
    assert (tmp_path / "plan.dot").read_text() == to_dot(plan)


@pytest.mark.parametrize("name", ["plan.jpg", "plan", "plan.svgz", ".svg"])
def test_other_endings_are_refused_and_nothing_is_written(
    plan: Plan, tmp_path: Path, name: str
) -> None:
    """With the endings that there are, and a name that would do."""
    with pytest.raises(AutoParallelError) as caught:
        autoparallel.write_svg(plan, tmp_path / name)
    assert ".svg, .png, .dot" in caught.value.why
    assert ".svg'" in caught.value.fix
    assert not (tmp_path / name).exists()


def test_titles_of_frames_lie_above_the_arrows(tmp_path: Path) -> None:
    """All of them are there, once, behind the last arrow."""
    layers = [nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))) for _ in range(2)]
    model = nn.Sequential(*layers)
    plan = autoparallel.make_plan(model, 2, example_inputs=torch.ones(4, 8))
    autoparallel.write_svg(plan, tmp_path / "plan.svg", layers="all")
    svg = (tmp_path / "plan.svg").read_text()
    titles = list(re.finditer(r"<text paint-order[^>]*>(\d)</text>", svg))
    assert [title[1] for title in titles] == ["0", "1"]
    assert all(title.start() > svg.rindex('class="edge"') for title in titles)


class Masked(nn.Module):
    """A product with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12, bias=False)
        self.register_buffer("mask", torch.ones(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, 8). The result is (b, 12)."""
        y: torch.Tensor = self.linear(x) * self.mask
        return y


def test_buffers_and_inputs_are_told_apart() -> None:
    """By the caller's names; a plan that was read tells the same."""
    plan = autoparallel.make_plan(Masked(), 2, example_inputs=torch.ones(4, 8))
    source = to_dot(plan)
    assert '"buffer mask"' in source
    assert '"input x"' in source
    assert to_dot(Plan.from_json(plan.to_json())) == source


def test_shares_that_are_not_even_are_those_of_the_busiest_rank(plan: Plan) -> None:
    """12 heads on 8 ranks are 2 on some: 16.7 %, not 12.5 %."""
    assert "50% of the FLOPs on each rank" in to_dot(plan)
    uneven = tuple(replace(op, flops=op.whole_flops * 2 / 3) for op in plan.ops)
    assert "66.7% of the FLOPs on the busiest rank" in to_dot(replace(plan, ops=uneven))
