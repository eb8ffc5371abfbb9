"""The benchmarks that many processes take part in run; how quick they are is no matter of a test.

A small part of each: training steps of several libraries side by side, and the GPU kit on a CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# What a bare GPU image lacks of this project's dependencies.
LACKING = ("graphviz", "pygraphviz", "highspy", "spmd_types", "rich", "matplotlib")
BLOCK = f"""
import sys

class Lacking:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING}:
            return None  # as of what is not installed: torch asks importlib whether there is some
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Lacking, sys.meta_path)
"""


def run(*command: str, path: str = "") -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.broad
@pytest.mark.parametrize("more", [(), ("ours-1",)], ids=str)
def test_contenders_train_side_by_side(
    tmp_path: Path, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have the plain model's losses, ours sends what hand-written layers send, and the figures
    become a document."""
    file, names = tmp_path / "steps.json", ("plain", *more, "ours-tp", "hand-tp")
    options = ("--workloads", "gpt-16", "--contenders", ",".join(names), "--rounds", "2")
    options += ("--seconds", "0", "--json", str(file), "--document", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from benchmarks import steps

    monkeypatch.setattr(sys, "argv", ["steps.py", *options])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    steps.main()
    rows = {row["contender"]: row for row in json.loads(file.read_text())["rows"]}
    assert {name: row["absent"] for name, row in rows.items()} == dict.fromkeys(names, "")
    assert all(row["cpu"] > 0 and row["peak"] > 0 for row in rows.values())
    assert not any(rows[name]["collectives"] for name in ("plain", *more))
    assert rows["ours-tp"]["collectives"] <= rows["hand-tp"]["collectives"]
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| ours against hand-written |" in text
    assert "| hand-written |" in text
    assert "<svg" in (tmp_path / "benchmarks.svg").read_text()


def test_a_contender_that_computes_something_else_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from benchmarks import steps

    class Answers:
        def __init__(self, losses: list[float]) -> None:
            self.losses = losses

        def do(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
            return [{"losses": self.losses}]

    expected: list[float] = []

    def place(losses: list[float]) -> Any:
        return steps.Place("one", "one", Answers(losses))  # type: ignore[arg-type]

    assert steps._make("gpt-16", place([3.0, 2.0]), expected) == ""
    assert steps._make("gpt-16", place([3.0, 2.0001]), expected) == ""
    assert "not the plain model's" in steps._make("gpt-16", place([3.0, 2.1]), expected)


def test_the_gpu_kit_runs_where_smaller_dependencies_are_missing(tmp_path: Path) -> None:
    """A part of it, on the CPU: planning, splitting and training import none of them."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    out = run("benchmarks/gpu.py", "--only", "masks", "--out", str(tmp_path), path=str(tmp_path))
    assert "no GPU is here" in out
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert results["gpu"] is False
    (row,) = results["parts"]["masks"]["rows"]
    assert row["right"] is True
