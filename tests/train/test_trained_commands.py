"""A trained model is asked by commands: for text, for scores, for its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_runs import small_config, write_text

from autoparallel.cli import main
from autoparallel.train.runner import run_training

pytestmark = pytest.mark.usefixtures("one_trace")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder)
    run_training(small_config(
        folder, "--checkpoint.every=4", "--training.precision=float32", "--data.sequence=32",
        "--optimizer.learning_rate=0.01", "--training.steps=12",
    ))  # fmt: skip
    return folder / "run"


def test_text_is_written(trained, capsys):
    assert main(["generate", str(trained), "--prompt", "the quick", "--tokens", "6"]) == 0
    first = capsys.readouterr()
    assert first.out.startswith("the quick")
    assert "tokens/s" in first.err
    checkpoint = trained / "checkpoints" / "step_00000012"
    assert main(["generate", str(checkpoint), "--prompt", "the quick", "--tokens", "6"]) == 0
    assert capsys.readouterr().out == first.out


def test_scores_are_printed(trained, capsys):
    (trained / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 5)
    asked = ["--perplexity", str(trained / "text.txt"), "--stride", "8", "--json"]
    asked += ["--cloze", str(trained / "text.txt"), "--held-out", "1"]
    assert main(["evaluate", str(trained), *asked]) == 0
    scores = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert scores["word perplexity"]["count"] == 45
    assert scores["cloze accuracy"]["count"] == 5
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert scores["loss"]["value"] == pytest.approx(held_out[-1], rel=1e-6)


def test_weights_begin_another_run(trained, capsys, tmp_path):
    """A run that begins with exported weights has the loss at which the other one ended."""
    assert main(["export-weights", str(trained), "--output", str(tmp_path / "weights")]) == 0
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    ended = [row["held_out_loss"] for row in rows if "held_out_loss" in row][-1]
    run_training(small_config(
        trained.parent, f"--folder={tmp_path / 'run'}", "--training.precision=float32",
        "--data.sequence=32", "--training.steps=1", f"--model.weights={tmp_path / 'weights'}",
        "--evaluation.every=1",
    ))  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["held_out_loss"] == pytest.approx(ended, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "{}/absent"], "no trained model"),
        (["evaluate", "{}"], "nothing is to be measured"),
        (["evaluate", "{}", "--cloze", "{}/absent"], "no passages"),
        (["evaluate", "{}", "--masked", "1"], "masked accuracy of a model that was trained on oth"),
        (["generate", "{}", "--temperature", "-1"], "temperature 0 is greedy"),
        (["generate", "{}", "--mesh", "tp=2"], "on 1 ranks"),
        (["evaluate", "{}", "--held-out", "-2"], "nothing would be measured"),
        (["export-weights", "{}", "--output", "{}/config.toml/weights"], "cannot be written"),
    ],
)
def test_what_cannot_be_asked_is_told(trained, capsys, arguments, words):
    assert main([each.replace("{}", str(trained)) for each in arguments]) == 2
    assert words in capsys.readouterr().err
