"""Runs in which something goes wrong: all ranks notice, and do what the configuration says."""

from __future__ import annotations

import errno
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_rows import BAD
from processes import run_processes
from training_runs import small_config, write_text

from autoparallel.errors import CheckpointError
from autoparallel.parallel import background_checkpoint
from autoparallel.train import preflight
from autoparallel.train.config import TrainingError
from autoparallel.train.config_text import read_config
from autoparallel.train.run_config import RunConfig
from autoparallel.train.runner import Result, run_training


def config_of(folder: Path, rows: str, *changes: str) -> RunConfig:
    return read_config(
        None,
        [
            f"--folder={folder}",
            "--model=faulty_rows:regression",
            f"--data.source=faulty_rows:{rows}",
            "--training.steps=8",
            "--training.batch=6",
            "--training.precision=float64",
            "--schedule.warmup=1",
            "--schedule.kind=constant",
            "--evaluation.every=0",
            "--checkpoint.every=2",
            "--log.quiet=true",
            "--log.picture=false",
            *changes,
        ],
    )


def test_a_run_stops_where_numbers_are_not_finite(tmp_path):
    config = config_of(tmp_path, "with_nan")
    with pytest.raises(TrainingError, match=f"step {BAD + 1}: the loss is nan"):
        run_training(config)
    # It goes on from what was saved, and stops there again.
    with pytest.raises(TrainingError, match=f"step {BAD + 1}: the loss is nan"):
        run_training(config)


def test_a_step_is_skipped(tmp_path):
    """It counts, and changes nothing: seven losses, and the rates go on."""
    result = run_training(config_of(tmp_path, "with_nan", "--training.nonfinite=skip"))
    other = run_training(config_of(tmp_path / "other", "without", "--training.steps=7"))
    assert (result.steps, result.skipped) == (8, 1)
    assert result.losses == pytest.approx(other.losses, rel=1e-12)


@pytest.mark.parametrize("every", [3, 100], ids=["checkpoint", "none yet"])
def test_a_run_is_rolled_back_past_the_rows(tmp_path, every):
    """Its updates are those of a run that never saw the rows; some steps are done twice."""
    changes = (f"--checkpoint.every={every}", "--training.nonfinite=rollback")
    result = run_training(config_of(tmp_path / "one", "with_nan", *changes))
    other = run_training(config_of(tmp_path / "other", "without", *changes))
    assert (result.steps, result.skipped) == (8, 1)
    twice = 1 if every == 3 else 0
    assert len(result.losses) == 8 + twice
    assert result.losses[BAD + twice :] == pytest.approx(other.losses[BAD:], rel=1e-12)


def on_rank(rank: int, config: RunConfig, seeds: tuple[int, ...]) -> Result:
    training = replace(config.training, seed=seeds[rank])
    return run_training(replace(config, training=training))


def test_a_signal_ends_all_ranks_after_a_checkpoint(tmp_path):
    """It reaches the last rank alone; a new start has nothing to do again."""
    config = config_of(tmp_path, "with_signal")
    results = run_processes(on_rank, 2, config, (1, 1))
    assert {(result.steps, result.signal) for result in results} == {(BAD + 1, signal.SIGTERM)}
    rest = run_training(replace(config, training=replace(config.training, seed=1)))
    assert len(rest.losses) == 8 - BAD - 1


def test_ranks_that_mean_other_runs_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="seed = 1', the other 'seed = 2'") as caught:
        run_processes(on_rank, 2, config_of(tmp_path, "good"), (1, 2))
    assert "the configuration of rank 1 is not rank 0's" in str(caught.value)


def with_a_source(rank, config):
    """Rank 1 has a function for its rows, and reads no files together with rank 0."""
    source = "json:loads" if rank else config.data.source
    with pytest.raises(TrainingError, match="the configuration of rank 1 is not rank 0's"):
        run_training(replace(config, data=replace(config.data, source=source)))


def test_ranks_whose_rows_come_from_elsewhere_are_refused(tmp_path):
    write_text(tmp_path)
    run_processes(with_a_source, 2, small_config(tmp_path))


def test_a_device_without_room_is_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 99}))
    with pytest.raises(TrainingError, match="too little room"):
        run_training(config_of(tmp_path, "good"))


@pytest.mark.parametrize("last", [False, True])
def test_a_full_device_ends_no_run_but_at_its_end(tmp_path, monkeypatch, capsys, last):
    """A checkpoint that cannot be written is told; the last one is the run's."""
    write = background_checkpoint.write_content

    def full(folder: Path, content: object, group: object = None) -> None:
        if folder.name == ("step_00000008" if last else "step_00000006"):
            raise OSError(errno.ENOSPC, "no space left")
        write(folder, content, group)

    monkeypatch.setattr(background_checkpoint, "write_content", full)
    if last:
        with pytest.raises(CheckpointError, match=r"step 8, was not saved(.|\n)*no space left"):
            run_training(config_of(tmp_path, "good"))
        return
    run_training(config_of(tmp_path, "good"))
    assert "a checkpoint was not written, and training goes on" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert "step_00000006" not in names
    assert names[-1] == "step_00000008"


def test_a_run_begins_anew_only_where_nothing_is(tmp_path):
    config = config_of(tmp_path, "good", "--checkpoint.resume=never")
    assert run_training(config).steps == 8
    with pytest.raises(TrainingError, match="has checkpoints"):
        run_training(config)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    config = config_of(tmp_path, "good", "--checkpoint.keep=1")
    run_training(config)
    (only,) = (tmp_path / "checkpoints").iterdir()
    (only / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        run_training(replace(config, training=replace(config.training, steps=9)))
