"""What cannot be run is told in one error, before anything is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import write_text

from autoparallel.errors import AutoParallelError
from autoparallel.train import train_command as train_commands
from autoparallel.train.train_command import train_command


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and files that are none of what they are named as."""
    folder = tmp_path_factory.mktemp("bad")
    write_text(folder)
    bare = (
        f'folder = "{folder}/run"\n[data]\nsource = "{folder}/text"\ncache = "{folder}/cache"\n'
        "vocabulary = 300\nsequence = 16\n[training]\nsteps = 2\n"
    )
    (folder / "bare.toml").write_text(bare)
    (folder / "good.toml").write_text(bare + "[model]\nlayers = 1\nhidden = 8\nheads = 2\n")
    (folder / "broken.toml").write_text("[training\nsteps = 1")
    (folder / "flat.toml").write_text("training = 3")
    (folder / "empty").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "rows.jsonl").write_text('{"body": "no text"}\n')
    (folder / "file").write_text("a file")
    return folder


BAD = {
    "no file": (["absent.toml"], "no configuration 'absent.toml'"),
    "nearly shipped": (["gpt-tinny"], "do you mean 'gpt-tiny'"),
    "no TOML": (["{}/broken.toml"], "is no TOML"),
    "section is a number": (["{}/flat.toml"], "training is a section"),
    "two files": (["gpt-tiny", "bert-tiny"], "two configurations"),
    "nothing": ([], "no configuration"),
    "unknown key": (["--training.stpes=3"], "do you mean training.steps"),
    "wrong section": (["--model.learning_rate=3"], "do you mean optimizer.learning_rate"),
    "no value": (["--training.steps"], "write --section.key=value"),
    "text for number": (["--training.steps=many"], "the key takes a whole number"),
    "number for text": (["--data.source=3"], "the key takes a text"),
    "below the least": (["--training.batch=0"], "training.batch = 0"),
    "not a number": (["--optimizer.learning_rate=nan"], "optimizer.learning_rate = nan"),
    "no such choice": (["--training.precision=fp8"], "float32, bf16, float64"),
    "passes do not divide": (["--training.accumulate=3"], "no multiple of accumulate"),
    "heads do not divide": (["--model.heads=3"], "no multiple of heads"),
    "no such model": (["--model=gtp"], "there is no such model"),
    "sizes of another's": (["--model=hf:LlamaForCausalLM"], "into [model.options]"),
    "mesh is no mesh": (["--parallel.mesh=dp,tp"], "one of which may be without a size"),
    "mesh of other ranks": (["--parallel.mesh=dp=2,tp=2"], "on 1 ranks"),
    "no text there": (["--data.source={}/absent"], "no such file or folder"),
    "no text in it": (["--data.source={}/empty"], "no text in"),
    "field is missing": (["--data.source={}/rows.jsonl"], "no text in the field 'text'"),
    "too little text": (["--data.sequence=100000"], "too little text"),
    "vocabulary too small": (["--data.vocabulary=10"], "at least 258"),
    "no tokenizer": (["--data.tokenizer={}/file"], "no tokenizer in"),
    "embedding too small": (["--model.vocabulary=20"], "model.vocabulary = 20"),
    "no function": (["--model=json:nothing"], "cannot be imported"),
    "other arguments": (["--model=torch.nn:Flatten"], "does not take input_ids and labels"),
    "no such class": (["--model=hf:LlamaForCasualLM"], "do you mean LlamaForCausalLM"),
    "no such argument": (
        ["--model=hf:LlamaForCausalLM", "--model.options.hiden_size=8"],
        "do you mean hidden_size",
    ),
    "no model in it": (["--model=hf:{}/config.json"], "no model in"),
    "no plan": (["--parallel.plan={}/absent.json"], "no plan in"),
    "no hardware": (["--parallel.hardware=dgx-a1000"], "no hardware preset"),
    "folder is a file": (["--folder={}/file"], "cannot write to"),
    "no checkpoint": (["--checkpoint.resume={}/empty"], "no checkpoint in"),
    "no weights": (["--model.weights={}/empty"], "no weights in"),
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_mistake_is_told_once(text, capsys, arguments):
    """One error, whose first line says what, and whose last line what to do."""
    given, words = BAD[arguments]
    given = [each.replace("{}", str(text)) for each in given]
    if given and given[0].startswith("--"):
        # Sizes of the bundled models are no one else's.
        sized = ("no such model", "sizes of another's")
        bare = given[0].startswith("--model=") and arguments not in sized
        given = [str(text / ("bare.toml" if bare else "good.toml")), "--log.quiet=true", *given]
    assert train_command(given) in (1, 2)
    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert told.out == ""
    assert len(errors) == 1
    assert words in told.err
    assert "  fix:   " in told.err
    assert "Traceback" not in told.err
    assert not (text / "run" / "metrics.jsonl").exists()


def test_all_ranks_end_and_rank_0_tells(text):
    """Under torchrun: no process goes on, and the error is there once."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "autoparallel", "train", str(text / "good.toml"), "--trainig.steps=3",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert ended.stderr.count("error: there is no key trainig") == 1


def test_a_rank_that_nobody_ends_tells(monkeypatch, capsys):
    """An error that rank 0 does not have must not end a process without a word."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train_commands, "_TELLING", 0.0)
    assert train_commands.tell(AutoParallelError("a file is not here", fix="copy it"), 2) == 2
    assert capsys.readouterr().err.startswith("rank 1: error: a file is not here")
