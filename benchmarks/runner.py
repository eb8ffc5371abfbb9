"""The trainer against a bare loop over the same split module, and what saving on the way costs.

    python benchmarks/runner.py [ranks ...]

In one process group blocks of steps take turns: by a loop of five lines, by the runner, and by the
runner with a checkpoint in the middle, which is written while training goes on. The processor time
of all ranks and all of their threads counts, as on a machine that others use seconds do not tell.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from processes import run_processes  # noqa: E402

from autoparallel.parallel.gradient_norms import clip_grad_norm_  # noqa: E402
from autoparallel.train import runner  # noqa: E402
from autoparallel.train.config_text import read_config  # noqa: E402
from autoparallel.train.optimizers import set_rates  # noqa: E402
from autoparallel.train.prepared_run import Run  # noqa: E402
from autoparallel.train.run_log import RunLog  # noqa: E402

ROUNDS, STEPS = 10, 3
# A run of the defaults saves once in so many steps.
STEPS_OF_A_SAVE = 100
CONFIG = (
    "--checkpoint.every=0", "--evaluation.every=0", "--log.quiet=true", "--log.picture=false",
    "--data.limit_bytes=2000000",
)  # fmt: skip
# The least share of the bare loop's tokens in a second; the largest share that saving takes.
LEAST, MOST = 0.97, 0.02


def bare(run: Run, batch: dict[str, torch.Tensor]) -> None:
    """Train some steps on one batch, with nothing around them."""
    for _ in range(STEPS):
        run.module(**batch).loss.backward()
        clip_grad_norm_(run.module.parameters(), 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def by_runner(run: Run, every: int) -> None:
    """Train as many steps as the runner does; every: steps between two checkpoints, 0 for none."""
    last = run.position.step + STEPS
    run.config = replace(run.config, training=replace(run.config.training, steps=last))
    run.checkpoints.config = replace(run.checkpoints.config, every=every)
    runner._steps(run, [])


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the processor time of this process while it works."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def on_rank(rank: int, folder: str) -> list[tuple[float, float, float, float]]:
    """Return, for each round, the seconds of a bare block, the runner's, and one with a save, and
    those that the save keeps its caller from going on.
    """
    config = read_config("gpt-tiny", [*CONFIG, f"--folder={folder}/run"])
    run = Run(config, RunLog(config.log, Path(config.folder), rank == 0), torch.device("cpu"))
    run.log.open(0)
    set_rates(run.optimizers, 0.1)
    rows = config.rows_of_a_pass
    batch = run._read("train", 0, 0, rows)
    bare(run, batch)
    by_runner(run, 0)
    rounds = []
    for _ in range(ROUNDS):
        plain = seconds_of(lambda: bare(run, batch))
        ours = seconds_of(lambda: by_runner(run, 0))
        begun = time.process_time()
        run.checkpoints.config = replace(run.checkpoints.config, every=1)
        waits = time.thread_time()
        run.checkpoints.save(run.module, run.optimizers, run.position)
        waits = time.thread_time() - waits
        by_runner(run, 0)
        run.checkpoints._wait()
        rounds.append((plain, ours, time.process_time() - begun, waits))
    return rounds


def main() -> None:
    """Measure on one rank and on two, or on as many as are asked for."""
    wrong = []
    for ranks in [int(text) for text in sys.argv[1:]] or [1, 2]:
        with tempfile.TemporaryDirectory() as folder:
            results = run_processes(on_rank, ranks, folder, timeout_seconds=3600.0)
        rounds = [
            [sum(rank[number][column] for rank in results) for column in range(4)]
            for number in range(ROUNDS)
        ]
        # The least of each: other work on the machine adds to processor time, and takes none away.
        plain, ours, saved, waits = (min(column) for column in zip(*rounds, strict=True))
        share, step, save = plain / ours, ours / STEPS, saved - ours
        cost = save / (STEPS_OF_A_SAVE * step)
        print(
            f"{ranks} rank{'s' * (ranks > 1)}: the runner has {share:.3f} of the bare loop's "
            f"tokens in a second; a step is {step * 1e3:.0f} ms; a save {save * 1e3:.0f} ms, of "
            f"which training waits {waits * 1e3:.0f} ms: {cost:.1%} of {STEPS_OF_A_SAVE} steps",
            flush=True,
        )
        if share < LEAST or cost > MOST:
            wrong.append(f"{ranks} ranks: {share:.3f}, {cost:.1%}")
    if wrong:
        raise SystemExit("slower than it should be: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
