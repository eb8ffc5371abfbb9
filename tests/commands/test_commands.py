"""The command line as a user has it: one plan is made, and every command reads it or makes one."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from race_questions import write_passages, write_weights

from autoparallel.cli import _parser, main
from autoparallel.commands.bundled_models import BUNDLED
from autoparallel.commands.export_command import NAMES
from autoparallel.commands.model_names import named_model
from autoparallel.errors import PlanError
from autoparallel.exports.targets import TARGETS
from autoparallel.plan import Plan

pytestmark = pytest.mark.usefixtures("one_trace")
SMALL = ["--layers", "1", "--batch", "2", "--sequence", "16", "--hardware", "dgx-a100"]
ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

    def forward(self, x):
        return self.down(self.up(x).relu()).square().mean()

def build():
    return Net(), torch.ones(8, 16)

def sized():
    model = Net()
    model.example_inputs = lambda batch=4: (torch.ones(batch, 16),)
    return model
"""


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that `autoparallel plan` has written."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    assert main(["plan", "gpt2", "--world-size", "2", *SMALL, "-o", str(path)]) == 0
    return path


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's, in the current folder."""
    name = f"their_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(BUILD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def test_help_is_quick_and_begins_with_an_example() -> None:
    """Of the program and of each command; nothing of it imports torch."""
    code = (
        "import sys\n"
        "import autoparallel\n"
        "from autoparallel.cli import _parser\n"
        "parser = _parser()\n"
        "texts = [parser.format_help()]\n"
        "parsers = parser._subparsers._group_actions[0].choices\n"
        "texts += [parsers[command.name].format_help() for command in parser.commands]\n"
        "assert all(text.startswith('example:\\n  ') for text in texts), texts\n"
        "print(len(texts), *(m for m in ('torch', 'numpy', 'rich') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    count, *imported = done.stdout.split()
    assert int(count) > 9
    assert imported == []


def test_a_plan_is_written_and_read(plan_file: Path) -> None:
    """It says what it was asked for with, so that its model can be built again."""
    plan = Plan.from_json(plan_file.read_text())
    assert dict(plan.request) == {
        "model": "gpt2", "batch": "2", "sequence": "16", "layers": "1",
    }  # fmt: skip
    assert plan.world_size == 2
    assert plan.options.optimizer == "mixed_adam"


@pytest.mark.parametrize(
    "name", ["gpt2", "bert-large", "llama-3-8b", "mixtral-8x7b", "opt-175b", "bloom-176b"]
)
def test_bundled_models_are_built_without_memory(name: str) -> None:
    """On the meta device, of one layer; each is its source's size but for the layers."""
    named = named_model(name, layers=1, batch=2, sequence=8, dtype="bfloat16")
    assert all(parameter.is_meta for parameter in named.model.parameters())
    assert named.inputs["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("gpt2-xl", 1.56), ("gpt3-175b", 174.6), ("llama-3-70b", 70.6), ("megatron-8.3b", 8.3),
     ("mixtral-8x7b", 46.7), ("qwen2.5-7b", 7.6), ("qwen3-30b-a3b", 30.5), ("gpt-oss-20b", 20.9),
     ("gpt-oss-120b", 116.8), ("deepseek-v3", 671.0)],
)  # fmt: skip
def test_bundled_models_have_the_published_sizes(name: str, billions: float) -> None:
    """The parameters of the whole model, in billions, as the sources say."""
    named = named_model(name, batch=1, sequence=8, dtype="bfloat16")
    count = sum(parameter.numel() for parameter in named.model.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_every_bundled_model_has_a_source() -> None:
    """And a sequence to plan for."""
    assert all(model.source and model.sequence for model in BUNDLED.values())


def test_configurations_of_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's config.json, and what lacks a class."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**sizes, "architectures": ["LlamaForCausalLM"]}))
    command = ["plan", f"hf:{tmp_path}", "--world-size", "2", "--sequence", "8", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "LlamaForCausalLM"
    path.write_text(json.dumps(sizes))
    assert main(command) == 2
    assert "does not say which class" in capsys.readouterr().err


def test_a_function_of_the_users(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned, explained and simulated, from the current folder."""
    assert main(["plan", f"{module}:build", "--world-size", "2", "-o", "plan.json"]) == 0
    capsys.readouterr()
    assert main(["explain", "plan.json", "up.weight", "--why-not", "down: whole", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["kind"] for answer in answers] == ["parameter", "op"]
    assert answers[1]["asked"]["added_cost"] >= 0
    assert main(["simulate", "plan.json"]) == 0
    assert "the same, but for rounding" in capsys.readouterr().out
    assert main(["simulate", f"{module}:build", "--world-size", "3", "--json"]) == 0
    ran = json.loads(capsys.readouterr().out)
    assert ran["output_error"] < 1e-12
    assert ran["gradient_error"] < 1e-12
    assert main(["plan", f"{module}:sized", "--world-size", "2", "--batch", "6", "--json"]) == 0
    with pytest.raises(PlanError, match="its function decides on the inputs"):
        named_model(f"{module}:build", batch=6)


def test_a_plan_is_written_as_what_its_files_are_called(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, with no second command; a name that says nothing is refused before planning."""
    asked = ["plan", f"{module}:build", "--world-size", "2"]
    names = ("plan.json", "plan.html", "step.trace.json", "plan.txt")
    assert main([*asked, *(word for name in names for word in ("-o", name))]) == 0
    told = capsys.readouterr().err
    assert all(f"written to {name}" in told for name in names)
    assert json.loads(Path("plan.json").read_text())["model"] == "Net"
    assert Path("plan.html").read_text().startswith("<!doctype html>")
    assert "traceEvents" in json.loads(Path("step.trace.json").read_text())
    assert "up.weight" in Path("plan.txt").read_text()
    assert main([*asked, "-o", "plan.doc"]) == 2
    assert "plan.doc has no ending that is known" in capsys.readouterr().err
    assert not Path("plan.doc").exists()


def test_measure_puts_a_step_beside_the_prediction(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one rank in this process; other numbers of ranks are told how to begin."""
    for ranks in ("1", "2"):
        assert main(["plan", f"{module}:build", "--world-size", ranks, "-o", f"{ranks}.json"]) == 0
    assert main(["measure", "1.json", "-o", "step.trace.json"]) == 0
    told = capsys.readouterr()
    assert "furthest apart" in told.out
    assert "written to step.trace.json" in told.err
    assert "measured on" in Path("step.trace.json").read_text()
    assert main(["measure", "2.json"]) == 2
    assert "--nproc-per-node 2 -m autoparallel measure 2.json" in capsys.readouterr().err
    assert main(["measure", "1.json", "-o", "step.png"]) == 2
    assert "end in .trace.json" in capsys.readouterr().err


def test_show_prints_the_report_and_writes_files(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report needs no model; pictures and traces build it again."""
    assert main(["show", str(plan_file)]) == 0
    assert "token_embedding.weight" in capsys.readouterr().out
    files = [tmp_path / name for name in ("plan.svg", "step.trace.json", "plan.txt")]
    given = [part for file in files for part in ("-o", str(file))]
    assert main(["show", str(plan_file), "--formulas", *given]) == 0
    out = capsys.readouterr()
    assert all(f"written to {file}" in out.err for file in files)
    assert "traceEvents" in json.loads(files[1].read_text())
    assert out.out


def test_explain_says_what_costs_most(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a question, the dearest redistributions; progress is not among the results."""
    assert main(["explain", str(plan_file)]) == 0
    told = capsys.readouterr()
    assert "with all else planned anew" in told.out
    assert "tracing" not in told.out


def test_export_prints_the_text_and_tells_what_is_not_in_it(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text on stdout, the rest on stderr."""
    assert main(["export", str(plan_file), "--to", "megatron"]) == 0
    out = capsys.readouterr()
    assert "--tensor-model-parallel-size 2" in out.out
    assert "not in it: parameters in blocks" in out.err


def test_the_names_of_exports_are_those_there_are() -> None:
    """The command line names them without importing torch."""
    assert tuple(TARGETS) == NAMES


def test_emit_writes_a_program(plan_file: Path, tmp_path: Path) -> None:
    """With the name that it was given."""
    file = tmp_path / "sharded_gpt.py"
    assert main(["emit", str(plan_file), "-o", str(file)]) == 0
    assert "from sharded_gpt import sharded_model" in file.read_text()


def test_compare_with_megatron(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Side by side, by what each decision adds; never better than what was proven optimal."""
    plot = tmp_path / "steps.svg"
    command = ["compare", str(plan_file), "--with", "megatron", "--json", "--plot", str(plot)]
    assert main(command) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["Megatron's"]["cost"] >= both["planned"]["cost"] * (1 - 1e-9)
    apart = sum(row["seconds"] for row in both["differences"])
    seconds = both["Megatron's"]["seconds"] - both["planned"]["seconds"]
    assert apart == pytest.approx(seconds, abs=1e-12)
    assert "</svg>" in plot.read_text()


def test_what_if(plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several values give a table and a plot; one, a comparison of decisions."""
    plot = tmp_path / "scaling.png"
    file = str(plan_file)
    assert main(["compare", file, "--what-if", "world-size=4,8", "--plot", str(plot)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["world_size", "mesh"]
    assert [line.split()[0] for line in table[2:]] == ["4", "8"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", file, "--what-if", "links=0.1"]) == 0
    assert "dgx-a100, links x0.1" in capsys.readouterr().out
    # What does not fit has no row of figures.
    limits = ["compare", file, "--what-if", "memory-limit=1MiB,400MiB", "--json"]
    assert main(limits) == 0
    rows = json.loads(capsys.readouterr().out)["variants"]
    assert [row["plan"] is None for row in rows] == [True, False]


def test_plans_are_compared(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan does not differ from itself."""
    assert main(["compare", str(plan_file), str(plan_file)]) == 0
    assert "no decision differs" in capsys.readouterr().out


def test_stages_are_planned_shown_and_simulated(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipeline's plan is one for every command that its figures are told to."""
    plan = ["plan", f"{module}:build", "--mesh", "pp=2,tp=2", "--hardware", "cpu"]
    assert main([*plan, "--microbatches", "4", "--schedule", "gpipe", "-o", "plan.json"]) == 0
    assert "2 stages, 4 micro-batches, gpipe" in capsys.readouterr().out
    assert main([*plan, "--microbatches", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["mesh"], answer["pipeline"]["microbatches"]) == ({"pp": 2, "tp": 2}, 2)
    assert main(["simulate", "plan.json"]) == 0
    assert "the same, but for rounding" in capsys.readouterr().out
    assert main(["compare", "plan.json", "--what-if", "microbatches=2,8"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:4]] == ["as", "2", "8"]
    assert "no plan" not in "".join(rows)
    assert main(["show", "plan.json", "--formulas"]) == 0
    assert "bytes sent to the next stage: 64 b/tp" in capsys.readouterr().out


def test_a_comparison_tells_the_step_that_the_plan_told(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step in which parts overlap, and not the sum of its parts."""
    from autoparallel.support.units import seconds_text

    plan = Plan.from_json(plan_file.read_text())
    assert main(["compare", str(plan_file), str(plan_file)]) == 0
    row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("step, predicted"))
    assert row.split("  ")[1].strip() == seconds_text(plan.step)
    assert seconds_text(plan.step) != seconds_text(plan.seconds)


def test_a_plan_of_python_says_how_to_ask(tmp_path: Path) -> None:
    """It does not say how its model is built."""
    import torch

    import autoparallel

    plan = autoparallel.make_plan(torch.nn.Linear(8, 8), 2, example_inputs=torch.ones(4, 8))
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert main(["explain", str(tmp_path / "plan.json"), "weight"]) == 2


def test_every_command_has_a_row_in_the_documents() -> None:
    """And no row is of a command that there is not."""
    text = (ROOT / "docs" / "command_line.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    (commands,) = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert rows == list(commands.choices)


def test_the_shell_completes_words(tmp_path: Path) -> None:
    """Commands, options and models, by argcomplete, which asks the program itself."""
    pytest.importorskip("argcomplete")
    code = (
        "import os, sys\n"
        "line = sys.argv[1]\n"
        "os.environ.update(_ARGCOMPLETE='1', COMP_LINE=line, COMP_POINT=str(len(line)),"
        " _ARGCOMPLETE_STDOUT_FILENAME=sys.argv[2], _ARGCOMPLETE_IFS=' ')\n"
        "from autoparallel.cli import main\n"
        "main([])\n"
    )
    for line, wanted in (("autoparallel pl", "plan"), ("autoparallel plan gpt3-17", "gpt3-175b")):
        out = tmp_path / "words"
        subprocess.run([sys.executable, "-c", code, line, str(out)], cwd=ROOT, check=True)
        assert wanted in out.read_text()


def test_examples_are_arguments_that_commands_take() -> None:
    """Of every command's help."""
    parser = _parser()
    for command in parser.commands:
        for example in command.examples:
            words = shlex.split(example)
            start = words.index("autoparallel") + 1
            assert parser.parse_args(words[start:]).command == command.name


def test_the_documents_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in a folder with my_module.py; bundled models have one layer here, and what
    is trained is so for two steps. README's are some of those of the page about them.
    """
    shown, lines = (
        re.findall(r"^autoparallel (.*?)(?:\s+#.*)?$", (ROOT / name).read_text(), re.MULTILINE)
        for name in ("README.md", "docs/command_line.md")
    )
    assert len(shown) > 4
    assert set(shown) <= set(lines)
    (tmp_path / "my_module.py").write_text(BUILD.replace("self.up", "self.fc1"))
    (tmp_path / "my_text.txt").write_text("def forward(self, x):\n    return x\n" * 500)
    for part in ("train", "dev", "test"):
        write_passages(tmp_path / "RACE" / part, 8)
    write_weights(tmp_path / "weights")
    sizes = ["--model.hidden=24", "--model.heads=3", "--data.sequence=16", "--data.vocabulary=16"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for line in lines:
        words = shlex.split(line)
        if words[1] in BUNDLED:
            words += ["--layers", "1", "--batch", "2", "--sequence", "32"]
        if words[0] == "train":
            words += ["--model.layers=1"]
        if words[0] == "train" and "--dry-run" not in words:
            words += ["--training.steps=2"]
            words += sizes if "RACE" in line else ["--data.source=my_text.txt"]
        assert main(words) == 0, line


def test_dims_are_printed_by_the_names_that_demands_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each name once, with its size; a layout of them is a plan's demand."""
    assert main(["dims", "gpt2", "--json", *SMALL[:-2]]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["heads"]["sizes"] == [12]
    assert rows["feed-forward"]["sizes"] == [3072]
    assert rows["heads"]["whole_in"] == [] != rows["hidden"]["whole_in"]
    assert rows["batch"]["of_inputs"] > rows["heads"]["of_inputs"]
    assert main(["dims", "gpt2", *SMALL[:-2]]) == 0
    assert "d_ff (feed-forward)" in capsys.readouterr().out
    layout = ["--layout", "heads:tp, d_ff:tp", "--world-size", "2", "--json"]
    assert main(["plan", "gpt2", *SMALL, *layout]) == 0
    assert "tp" in json.loads(capsys.readouterr().out)["mesh"]
    assert main(["plan", "gpt2", *SMALL, "--layout", "hedas:tp", "--world-size", "2"]) == 2
    assert "did you mean heads" in capsys.readouterr().err
