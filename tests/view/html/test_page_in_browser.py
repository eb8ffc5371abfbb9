"""A browser shows the page: search, clicks, keys, filters and views work at three sizes.

Needs node, what `npm ci` in web/ brings, and Chromium; `make page-test` runs it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import more_families
import pytest
import torch
import zoo

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.train.models import GPT, GPTConfig

WEB = Path(__file__).parents[3] / "web"
HAS_ALL = shutil.which("node") is not None and (WEB / "node_modules" / "playwright-core").is_dir()
pytestmark = [
    pytest.mark.optional,
    pytest.mark.skipif(not HAS_ALL, reason="no node, or `npm ci` was not run in web/"),
]

MEBIBYTE = 2**20
PAGES = ("gpt-block", "gpt-3", "bert", "mixtral", "mamba2")
SIZES = ("1440", "1024", "390")


def gpt(layers: int, hidden: int, heads: int, tokens: tuple[int, int], **options: Any) -> Plan:
    with torch.device("meta"):
        model = GPT(GPTConfig(layers, hidden, heads, 51200, 2048, 0.0)).to(torch.bfloat16)
        inputs = torch.zeros(*tokens, dtype=torch.long)
    return autoparallel.make_plan(
        model,
        example_inputs=(inputs, inputs),
        hardware="dgx-a100",
        optimizer="mixed_adam",
        **options,
    )


def plan_of(name: str) -> Plan:
    if name == "gpt-block":
        return gpt(1, 768, 12, (8, 512), world_size=8)
    if name == "gpt-3":
        return gpt(96, 12288, 96, (64, 2048), mesh=Mesh(dp=8, tp=8), memory_limit="76GiB")
    family = more_families if name == "mamba2" else zoo
    return autoparallel.make_plan(family.build(name), 4, example_inputs=family.inputs_for(name))


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one plan, as a file."""
    path = tmp_path_factory.mktemp("pages") / f"{request.param}.html"
    autoparallel.write_html(plan_of(request.param), path)
    return path


@cache
def seen(path: Path) -> dict[str, Any]:
    """What drive.mjs tells of a page."""
    run = subprocess.run(
        ["node", "drive.mjs", str(path)], cwd=WEB, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    told: dict[str, Any] = json.loads(run.stdout)
    return told


def test_nothing_is_asked_for_and_nothing_goes_wrong(page: Path) -> None:
    """No request leaves the page, no error or warning is logged; the file is small."""
    assert seen(page)["requests"] == []
    assert seen(page)["errors"] == []
    assert page.stat().st_size < 3 * MEBIBYTE


def test_it_opens_at_once(page: Path) -> None:
    """In processor time, which other work on the machine does not lengthen."""
    assert max(told["seconds"] for told in seen(page)["sizes"].values()) < 2


@pytest.mark.parametrize("size", SIZES)
def test_it_can_be_read_at_each_size(page: Path, size: str) -> None:
    """Nothing sticks out sideways, and every control has a name."""
    told = seen(page)["sizes"][size]
    assert not told["sideways"]
    assert told["nameless"] == 0
    assert told["first"] > 5


@pytest.mark.parametrize("size", SIZES)
def test_search_finds_and_shows(page: Path, size: str) -> None:
    """By keys alone: what is found is opened, chosen in the graph, and told of."""
    told = seen(page)["sizes"][size]
    assert told["focus"] == "search"
    assert told["found"] > 0
    assert told["status"].startswith(str(told["found"])) or told["found"] == 60
    assert told["selected"] == 1


@pytest.mark.parametrize("size", SIZES)
def test_a_click_tells_of_an_op(page: Path, size: str) -> None:
    """Its tensors and threads, in the panel beside the graph."""
    told = seen(page)["sizes"][size]
    assert told["clicked"][0], told["clicked"]
    assert {"Reads", "Makes", "What it does with its threads"} <= set(told["facts"])


@pytest.mark.parametrize("size", SIZES)
def test_a_click_tells_of_a_collective(page: Path, size: str) -> None:
    """Why it is there, what it sends, and what doing without it would cost. Of a model that is
    split although it is too small to gain, costs are no seconds, and none are told.
    """
    told = seen(page)["sizes"][size]
    assert {"Why", "What crosses the links"} <= set(told["collective"])
    if page.stem.startswith("gpt"):
        assert "Alternatives" in told["collective"]


@pytest.mark.parametrize("size", SIZES)
def test_keys_are_enough(page: Path, size: str) -> None:
    """In the tree, in the graph, and among the views."""
    told = seen(page)["sizes"][size]
    names = ("down", "folded", "zoomed", "panned", "escaped", "threads", "timeline", "memory")
    assert {name: told[name] for name in names} == dict.fromkeys(names, True)
    assert told["next"]
    assert told["lanes"] > 4


@pytest.mark.parametrize("size", SIZES)
def test_filters_and_colours(page: Path, size: str) -> None:
    """A phase dims what is not in it, and the dress changes."""
    told = seen(page)["sizes"][size]
    assert told["dimmed"]
    assert told["bright"]
    assert told["dressed"]


@pytest.mark.parametrize("size", SIZES[:2])
def test_everything_opens_and_closes(page: Path, size: str) -> None:
    """Of equal modules the first is opened for all, so that many are no burden."""
    told = seen(page)["sizes"][size]
    assert told["closed"] < told["opened"] < 800
