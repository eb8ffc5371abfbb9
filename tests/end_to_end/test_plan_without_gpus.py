"""The example that plans for machines which are not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from autoparallel.plan import Plan

pytestmark = pytest.mark.usefixtures("one_trace")

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--layers", "2", "--hidden", "256", "--heads", "4", "--batch", "16", "--sequence", "256"]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["plan_without_gpus.py", *SMALL, *arguments])
    import plan_without_gpus

    return plan_without_gpus.main()


def test_answers_in_short_and_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--mesh", "dp=2,tp=4", "--world-size", "8", "--memory", "8GiB"]
    assert run([*arguments, "--output", str(tmp_path)], monkeypatch) == 0
    text = capsys.readouterr().out
    rows = {line[:12].strip(): line[13:] for line in text.split("\n\n")[0].splitlines()}
    assert rows["batch"].startswith("16 x 256 = ")
    assert rows["machines"] == "8 devices of dgx-a100, 1 node"
    assert rows["arranged"] == "Mesh(dp=2, tp=4)"
    assert "of 8.0 GiB on each device" in rows["fits"]
    for title in ("Parameters", "Collectives in one step", "Closed forms of GPT"):
        assert title in text
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.world_size == 8
    assert json.loads((tmp_path / "step.trace.json").read_text())["traceEvents"]
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")


def test_says_that_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--mesh", "tp=2", "--world-size", "2", "--memory", "20MiB"]
    assert run(arguments, monkeypatch) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "20.0 MiB" in printed.err
