"""The commands in README and the documents are commands that there are, and they run.

Those of README and docs/command_line.md that need no launcher are run, at a small size, by
tests/commands/test_commands.py.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_documentation import DOCUMENTS, README, ROOT, blocks, prose

from autoparallel.cli import _parser

PROGRAMS = ("autoparallel", "make", "pip", "python", "torchrun")
# A module that the commands are about, small enough for a laptop.
MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu()).square().mean()

def build():
    return Net(), torch.ones(8, 16)
"""
LANGUAGE_MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(1024, 32), torch.nn.Linear(32, 1024)

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids).relu())
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

def build():
    return Net()
"""


def lines(path: Path) -> list[str]:
    """The commands in the blocks of a document, without comments, in their order."""
    told = [line for language, text in blocks(path) if not language for line in text.splitlines()]
    return [shlex.join(shlex.split(line, comments=True)) for line in told if is_command(line)]


def is_command(text: str) -> bool:
    """Whether a text begins with a program that the documents tell to run; a sentence may begin
    with "make", and goes on in words.
    """
    if text.startswith("make "):
        return re.fullmatch(r"make [a-z-]+( [A-Z]+=.*)?", text) is not None
    return text.partition(" ")[0] in PROGRAMS and " " in text


def commands(path: Path) -> list[str]:
    """All commands of a document, those within its sentences too."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))]
    return [*lines(path), *filter(is_command, spans)]


def refused(line: str) -> str:
    """What is wrong with a command, "" for nothing."""
    program, *words = shlex.split(line)
    if program in ("python", "torchrun") and "-m" in words:
        program, *words = words[words.index("-m") + 1 :]
    if program == "autoparallel" and words:
        parser = _parser()
        assert parser._subparsers is not None
        known = parser._subparsers._group_actions[0].choices
        assert known is not None
        if words[0].startswith("-"):
            return "" if words == ["--help"] else "no such option"
        if words[0] not in known:
            return "no such command"
        if words[1:] and "--help" not in words:
            try:
                parser.parse_args(words)
            except (SystemExit, Exception) as error:
                return repr(error)
    if program == "make":
        phony = " ".join(re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M))
        return "" if words[0] in phony.split() else "no such target"
    if program == "python":
        return "" if (ROOT / words[0]).is_file() else "no such file"
    if program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\[([\w,-]+)\]", line)
        missing = {*extras} - {*project["optional-dependencies"]}
        return f"no such extra: {missing}" if missing else ""
    return ""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_those_there_are(path: Path) -> None:
    """Programs, targets, files, extras, options: nothing is told that would be refused at once."""
    assert {line: why for line in commands(path) if (why := refused(line))} == {}


def test_what_would_be_refused_is_seen() -> None:
    """Or the test above would pass whatever is written."""
    wrong = ("make nothing", "python examples/nothing.py", "autoparallel paln gpt2",
             "autoparallel plan gpt2 --wrold-size 2", 'pip install -e ".[nothing]"',
             "torchrun --nproc-per-node 2 -m autoparallel measure plan.json --twice")  # fmt: skip
    assert all(refused(line) for line in wrong)


def run(folder: Path, *command: str) -> None:
    """Run a command in a folder. It must succeed."""
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, (command, result.stderr)


COMMAND_LINE = ROOT / "docs" / "command_line.md"
GUIDES = [path for path in DOCUMENTS if path not in (README, COMMAND_LINE) and lines(path)]


@pytest.mark.broad
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_the_commands_of_the_guides_run(guide: Path, tmp_path: Path) -> None:
    """In the order in which they are written, in one folder, on two processes where they are
    launched; pip is left alone.
    """
    (tmp_path / "my_module.py").write_text(MODULE)
    if not any(line.startswith("autoparallel plan") for line in lines(guide)):
        run(tmp_path, *"-m autoparallel plan my_module:build --world-size 2 -o plan.json".split())
    for line in lines(guide):
        launch(tmp_path, line)


@pytest.mark.broad
def test_the_launched_commands_of_the_command_line_run(tmp_path: Path) -> None:
    """On two processes, of a small model, and for two steps where they train."""
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "my_text.txt").write_text("def forward(self, x):\n    return x\n" * 2000)
    run(tmp_path, *"-m autoparallel plan my_module:build --world-size 2 -o plan.json".split())
    launched = [line for line in lines(COMMAND_LINE) if line.startswith("torchrun")]
    assert launched
    assert not [line for line in lines(README) if line.startswith("torchrun")]
    for line in launched:
        small = ["--training.steps=2", "--model.layers=1", "--data.source=my_text.txt"]
        launch(tmp_path, line, *(small if " train " in line else []))


@pytest.mark.broad
def test_the_readmes_program_trains(tmp_path: Path) -> None:
    """With its imports, as a file of its own, on two processes; the model is small."""
    first, training, *_ = [text for language, text in blocks(README) if language == "python"]
    imports = [line for line in first.splitlines() if line.startswith(("import", "from"))]
    code = "\n".join([*imports, training])
    for large, small in (("GPT2Config()", "GPT2Config(n_layer=1, n_embd=32, n_head=2)"),
                         ("(10, 8, 128)", "(3, 2, 16)")):  # fmt: skip
        assert large in code
        code = code.replace(large, small)
    (tmp_path / "train.py").write_text(code)
    launch(tmp_path, "torchrun --nproc-per-node 2 train.py")


@pytest.mark.broad
def test_the_configuration_of_the_guide_trains(tmp_path: Path) -> None:
    """On the processes that it is told to be for, two of them data parallel; for two steps."""
    guide = ROOT / "docs" / "training.md"
    (settings,) = [text for language, text in blocks(guide) if language == "toml"]
    (tmp_path / "mine.toml").write_text(settings)
    (tmp_path / "my_module.py").write_text(LANGUAGE_MODEL)
    (tmp_path / "my_text.txt").write_text("def forward(self, x):\n    return x\n" * 2000)
    (line,) = [line for line in commands(guide) if "mine.toml" in line]
    small = ["--training.steps=2", "--training.batch=4", "--data.sequence=16"]
    launch(tmp_path, line, *small)


def launch(folder: Path, line: str, *more: str) -> None:
    """Run a line of a document, on two processes where it is for several."""
    program, *words = shlex.split(line)
    if program == "torchrun":
        words[words.index("--nproc-per-node") + 1] = "2"
        run(folder, "-m", "torch.distributed.run", *words, *more)
    elif program == "autoparallel":
        run(folder, "-m", program, *words, *more)
    else:
        assert program in ("make", "pip"), line
