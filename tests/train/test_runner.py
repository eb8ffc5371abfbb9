"""The runner trains the same at any number of ranks, and goes on anywhere."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from broad_cases import broad
from processes import run_processes
from safetensors.torch import load_file
from training_runs import metrics_of, run_on, small_config, write_text

from autoparallel.train.generation import Sampling, generate
from autoparallel.train.trained import open_trained
from autoparallel.train.weights import export_weights

pytestmark = pytest.mark.usefixtures("one_trace")
BERT = (
    "--model=bert", "--model.norm=post", "--model.sentence_order=true",
    "--data.tokenizer=wordpiece", "--optimizer.kind=muon", "--schedule.kind=linear",
)  # fmt: skip
EXPERTS = (
    "--model=hf:MixtralForCausalLM", "--model.options.hidden_size=16",
    "--model.options.intermediate_size=24", "--model.options.num_hidden_layers=1",
    "--model.options.num_attention_heads=4", "--model.options.num_key_value_heads=2",
    "--model.options.num_local_experts=4", "--model.options.attention_dropout=0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text; its token files are made once."""
    folder = tmp_path_factory.mktemp("runner")
    write_text(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "ranks", "split"),
    [
        *broad(((), 2, ("--parallel.mesh=tp",))),
        *broad(((), 2, ("--parallel.mesh=dp", "--training.accumulate=2"))),
        *broad((BERT, 4, ("--parallel.mesh=dp=2,tp", "--training.accumulate=4"))),
        *broad((BERT, 2, ("--parallel.mesh=tp", "--training.accumulate=2"))),
        *broad(
            (EXPERTS, 2, ("--parallel.mesh=ep", '--parallel.constraints=["*experts.* is split 0"]'))
        ),
    ],
    ids=["tp", "dp", "bert-dp-tp", "bert-tp", "experts"],
)
def test_ranks_train_what_one_process_trains(text, tmp_path, changes, ranks, split):
    """Losses, with dropout, after clipped updates, and the held-out loss; batches in passes."""
    # Dropout draws for the whole batch of a pass: others in passes of fewer rows.
    passes = [change for change in split if "accumulate" in change]
    alone = run_on(1, replace(small_config(text, *changes, *passes), folder=str(tmp_path / "one")))
    spread = run_on(ranks, replace(small_config(text, *changes, *split), folder=str(tmp_path)))
    assert len(alone[0]) == 6
    assert alone[0][-1] < alone[0][0]
    # The library's experts have norms and losses of float32 in them, whatever the weights are.
    within = 1e-6 if changes is EXPERTS else 1e-11
    assert spread[0] == pytest.approx(alone[0], rel=within)
    assert spread[1] == pytest.approx(alone[1], rel=within)


def test_passes_of_a_step_are_one_batch(text, tmp_path):
    """Without dropout, rows in four passes train what they train in one."""
    whole, passes = (
        run_on(1, replace(
            small_config(text, "--model.dropout=0", f"--training.accumulate={count}"),
            folder=str(tmp_path / str(count)),
        ))
        for count in (1, 4)
    )  # fmt: skip
    assert passes[0] == pytest.approx(whole[0], rel=1e-11)


def test_a_run_goes_on_anywhere(text, tmp_path):
    """Six steps at once are three on two ranks and three on one, and then on two with other axes.

    The newest checkpoint is damaged, so that the last run goes on from the one before it.
    """
    changes = ("--checkpoint.every=1", "--checkpoint.keep=2")
    straight = small_config(text)
    expected = run_on(1, replace(straight, folder=str(tmp_path / "straight")))
    config = replace(small_config(text, *changes), folder=str(tmp_path / "run"))

    def until(steps: int, mesh: str) -> object:
        # The schedule is that of the whole run.
        return replace(
            config,
            training=replace(config.training, steps=steps),
            schedule=replace(config.schedule, decay_steps=6),
            parallel=replace(config.parallel, mesh=mesh),
        )

    first = run_on(2, until(3, "tp"))
    second = run_on(1, until(5, "tp"))
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step_00000004", "step_00000005"]
    largest = max(kept[-1].iterdir(), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    third = run_on(2, until(6, "dp"))
    assert len(first[0] + second[0][:1]) == 4
    assert first[0] + second[0][:1] + third[0] == pytest.approx(expected[0], rel=1e-11)
    assert third[1] == pytest.approx(expected[1], rel=1e-11)
    steps = [row["step"] for row in metrics_of(config) if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("ranks", "mesh"), [(2, "pp=2"), *broad((4, "pp=2,tp=2"))], ids=["two", "two of two"]
)
def test_stages_train_what_one_process_trains(text, tmp_path, ranks, mesh):
    """Two stages, with passes and micro-batches; what they have saved goes on without stages, on as
    many ranks and on one, and generates.
    """
    changes = ("--training.accumulate=2", "--checkpoint.every=3")
    config = replace(small_config(text, *changes), folder=str(tmp_path / "run"))
    expected = run_on(1, replace(config, folder=str(tmp_path / "one")))

    def until(steps: int, axes: str, **options: object) -> object:
        # The schedule is that of the whole run.
        return replace(
            config,
            training=replace(config.training, steps=steps),
            schedule=replace(config.schedule, decay_steps=6),
            parallel=replace(config.parallel, mesh=axes, **options),
        )

    first = run_on(ranks, until(3, mesh, microbatches=2))
    stages = metrics_of(config)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    second = run_on(ranks, until(6, "tp"))
    for found in (first[0] + second[0], first[0]):
        assert found == pytest.approx(expected[0][: len(found)], rel=1e-11)
    assert second[1] == pytest.approx(expected[1], rel=1e-11)
    assert [row["step"] for row in stages if "loss" in row] == [1, 2, 3]
    alone = run_on(1, replace(until(6, "tp"), folder=str(tmp_path / "copy")))
    assert first[0] + alone[0] == pytest.approx(expected[0], rel=1e-11)
    said = run_processes(written, 2, tmp_path / "run", "pp=2")
    assert said == [written(0, tmp_path / "one", "tp")] * 2
    weights = [load_file(tmp_path / name / "out" / "model.safetensors") for name in ("one", "run")]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-11)


def written(_: int, folder: Path, mesh: str) -> list[int]:
    """The tokens that a trained model writes. Its weights are written, too."""
    module = open_trained(folder, mesh, say=lambda _: None).module
    export_weights(module, folder / "out")
    return [int(token) for token in generate(module, torch.arange(5)[None], 3, Sampling())]
