"""The command line tells mistakes in one message, on stderr, with a status of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autoparallel.cli import main

pytestmark = pytest.mark.usefixtures("one_trace")
SMALL = ["--layers", "1", "--batch", "2", "--sequence", "16", "--hardware", "dgx-a100"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["plan", "gpt-2", "--world-size", "2"], "did you mean gpt2"),
        (["plan", "gpt2", *SMALL], "over how many ranks?"),
        (["plan", "gpt2", "--nodes", "2", "--world-size", "4", *SMALL], "has 8 devices"),
        (["plan", "gpt2", "--mesh", "4x2", *SMALL], "is no mesh"),
        (["plan", "gpt2", "--world-size", "2", "--sequence", "4096"], "1024 positions"),
        (["plan", "nowhere_at_all:build", "--world-size", "2"], "is no function"),
        (["plan", "hf:nowhere", "--world-size", "2"], "there is no file"),
        (["plan", "gpt2", "--world-size", "2", "--dtype", "fp8", *SMALL], "no dtype 'fp8'"),
        (["show", "nowhere.json"], "no plan can be read"),
        (["show", "nowhere.json", "-o", "plan.docx"], "no ending that is known"),
        (["compare", "gpt2"], "what is it to be compared with"),
        (["compare", "gpt2", "--what-if", "weather=good"], "changes nothing that is known"),
        (["compare", "gpt2", "--what-if", "world-size=4,0"], "no positive whole number"),
        (["compare", "gpt2", "--with", "megatron", "--plot", "two.pdf"], "no picture"),
        (["explain", "nowhere.json", "--why-not", "fc1"], "names no choice"),
        (["plan", "gpt2", "--mesh", "tp=2,tp=4", *SMALL], "names an axis twice"),
        (["plan", "gpt2", "--mesh", "tp=2", "--world-size", "4", *SMALL], "the mesh has 2"),
        (["plan", "gpt2", "--mesh", "auto", *SMALL], "over how many ranks?"),
        # Before anything is read or planned.
        (["plan", "nowhere", "-o", "nowhere/plan.json"], "there is no folder"),
        (["show", "nowhere.json", "-o", "nowhere/plan.svg"], "there is no folder"),
        (["compare", "nowhere", "--with", "megatron", "--plot", "nowhere/a.svg"], "is no folder"),
        (["emit", "nowhere.json", "-o", "nowhere/plan.py"], "there is no folder"),
        (["calibrate", "--output", "nowhere/my.json"], "there is no folder"),
    ],
)
def test_mistakes_are_told_in_words(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, with status 2, and with nothing on stdout."""
    assert main(command) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.splitlines()[-1].strip()
    assert told.out == ""


@pytest.mark.parametrize("option", ["--batch", "--sequence", "--layers", "--world-size", "--nodes"])
@pytest.mark.parametrize("number", ["0", "-3", "two"])
def test_what_counts_something_is_positive(
    option: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zero layers are not taken for those of the whole model, nor is a negative batch."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", "gpt2", option, number])
    assert ended.value.code == 2
    assert f"{option}: '{number}' is no positive whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ("def build():\n    raise RuntimeError('no disk')", ("RuntimeError: no disk", ".py:2")),
        ("def build(size):\n    pass", ("failed: TypeError", "without arguments")),
        ("import nowhere_at_all", ("No module named 'nowhere_at_all'", ".py:1")),
        ("x = {}['key']", ("failed: KeyError", ".py:1")),
        ("def build(:", ("failed: SyntaxError", ".py:1")),
        ("def build():\n    return 3", ("gives no model", "type int")),
        (
            "import torch\ndef build():\n    return torch.nn.ReLU()",
            ("no example inputs", "let the function return (model, example_inputs)"),
        ),
    ],
)
def test_what_the_users_function_does_wrong_is_told(
    body: str,
    messages: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one message, with the line of the user's."""
    name = f"wrong_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["plan", f"{name}:build", "--world-size", "2"]) == 2
    told = capsys.readouterr().err
    assert all(message in told for message in messages), told


def test_the_status_tells_a_no_from_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that does not fit was asked for well, and the answer is no."""
    assert main(["plan", "gpt2", "--world-size", "2", *SMALL, "--memory-limit", "1MiB"]) == 1
    assert "does not fit" in capsys.readouterr().err
