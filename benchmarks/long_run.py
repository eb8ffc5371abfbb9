"""A thousand steps of the trainer on two processes, beside plain training on one.

    python benchmarks/long_run.py [steps]

A small GPT on the standard library's sources. Plain training is a loop of its own over the unsplit
model, with torch's AdamW and a schedule that is written out here; both read the same rows. The run
is well if the memory of its processes is flat after the first tenth, and the losses end together.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from processes import run_processes  # noqa: E402

from autoparallel.train.built_models import build_model  # noqa: E402
from autoparallel.train.config_text import read_config  # noqa: E402
from autoparallel.train.row_sources import open_rows  # noqa: E402
from autoparallel.train.run_config import RunConfig  # noqa: E402
from autoparallel.train.runner import run_training  # noqa: E402

RATE, WARMUP, LEAST, DECAY = 2e-3, 50, 0.1, 0.1
# Without dropout, so that the same numbers are expected; in float32 they part slowly.
CHANGES = (
    "--model.layers=2", "--model.hidden=96", "--model.heads=4", "--model.dropout=0",
    "--data.vocabulary=1000", "--data.limit_bytes=2000000", "--data.sequence=64",
    "--training.batch=8", f"--optimizer.learning_rate={RATE}", f"--schedule.warmup={WARMUP}",
    "--checkpoint.every=200", "--evaluation.every=0", "--log.quiet=true", "--log.picture=false",
)  # fmt: skip
APART, GROWTH = 0.02, 0.02


def config_of(steps: int, folder: str) -> RunConfig:
    """Return the configuration of the run."""
    return read_config(
        "gpt-tiny", [*CHANGES, f"--training.steps={steps}", f"--folder={folder}/run"]
    )


def on_rank(_: int, config: RunConfig) -> None:
    """Train with the runner."""
    run_training(config)


def plain_losses(config: RunConfig) -> list[float]:
    """Return the losses of a loop that knows nothing of this project but its model and its rows."""
    source, steps = open_rows(config, print), config.training.steps
    model = build_model(config, source.vocabulary)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        share = min(1.0, max(0.0, (step - WARMUP) / (steps - WARMUP)))
        cosine = LEAST + (1 - LEAST) * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = RATE * ((step + 1) / WARMUP if step < WARMUP else cosine)
        loss = model(**source.rows("train", step, 0, config.training.batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Run both, and compare."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    last = max(1, steps // 20)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(steps, folder)
        plain = plain_losses(config)
        run_processes(on_rank, 2, config, timeout_seconds=7200.0)
        lines = Path(config.folder, "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    early = rows[steps // 10]["memory_gib"]
    late = max(row["memory_gib"] for row in rows[-last:])
    ends = [sum(values[-last:]) / last for values in ([row["loss"] for row in rows], plain)]
    first = max(abs(row["loss"] - loss) for row, loss in zip(rows[:100], plain, strict=False))
    print(
        f"{len(rows)} steps on 2 processes: loss {rows[0]['loss']:.3f} to {ends[0]:.4f} (mean of "
        f"the last {last}), plain training to {ends[1]:.4f}; at most {first:.1e} apart in the "
        f"first 100 steps; {early:.3f} GiB after {steps // 10} steps, at most {late:.3f} at the end"
    )
    if abs(ends[0] - ends[1]) > APART or late > early * (1 + GROWTH):
        raise SystemExit("the run is not as plain training, or its memory grows")


if __name__ == "__main__":
    main()
