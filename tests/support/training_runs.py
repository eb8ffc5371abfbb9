"""Small runs of the runner, for tests: their configuration, and how they are started on ranks."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from processes import run_processes
from traces import trace_ahead

from autoparallel.train.config_text import read_config
from autoparallel.train.run_config import RunConfig
from autoparallel.train.runner import run_training

TEXT = "the quick brown fox jumps over the lazy dog, and {} of them sleep under tree {}\n"


def write_text(folder: Path) -> Path:
    """Write a text of some thousand words; return its folder."""
    texts = folder / "text"
    texts.mkdir()
    for number in range(25):
        lines = [TEXT.format(number * place % 17, place) for place in range(12)]
        (texts / f"{number:02}.txt").write_text("".join(lines))
    return texts


def small_config(folder: Path, *changes: str) -> RunConfig:
    """A GPT of two blocks in float64 with dropout, on the text beside its folder."""
    others = any(change.startswith("--model=hf:") for change in changes)
    return read_config(
        None,
        [
            f"--folder={folder / 'run'}",
            f"--data.source={folder / 'text'}",
            f"--data.cache={folder / 'cache'}",
            "--data.vocabulary=300",
            "--data.sequence=16",
            "--data.held_out_every=5",
            *(() if others else ("--model.layers=2", "--model.hidden=24", "--model.heads=3")),
            "--training.steps=6",
            "--training.batch=8",
            "--training.precision=float64",
            "--schedule.warmup=2",
            "--evaluation.every=3",
            "--evaluation.batches=1",
            "--checkpoint.every=0",
            "--log.quiet=true",
            "--log.picture=false",
            *changes,
        ],
    )


def on_rank(_: int, config: RunConfig) -> tuple[tuple[float, ...], float | None]:
    """The losses of a run, and the last held-out one."""
    result = run_training(config)
    return result.losses, result.held_out


def traced(config: RunConfig) -> None:
    """Trace what each rank of a run would: one process begins it, and evaluates its model."""
    with tempfile.TemporaryDirectory() as folder:
        parallel = replace(config.parallel, mesh="auto", constraints=(), microbatches=0)
        alone = replace(
            config,
            folder=folder,
            parallel=replace(parallel, stages_per_rank=1),
            training=replace(config.training, steps=1),
            checkpoint=replace(config.checkpoint, every=0),
        )
        run_training(alone)


def run_on(ranks: int, config: RunConfig) -> tuple[tuple[float, ...], float | None]:
    """Run on so many processes; all ranks tell the same.

    They are forks of one that has traced the model, as each of them would, and plan by themselves.
    """
    if ranks == 1:
        return on_rank(0, config)
    results = run_processes(on_rank, ranks, config, before=partial(trace_ahead, traced, config))
    assert all(result == results[0] for result in results)
    losses: tuple[float, ...] = results[0][0]
    return losses, results[0][1]


def metrics_of(config: RunConfig) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    lines = (Path(config.folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
