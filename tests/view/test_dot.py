"""The picture of a plan as a file: its ending says what is written."""

from __future__ import annotations

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
