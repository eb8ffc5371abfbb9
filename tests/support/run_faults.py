"""Faults of training runs, made to happen to the command itself: the rows of docs/faults.md."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty_rows import BAD

STEPS, EVERY = 12, 3
BASE = (
    "--model=faulty_rows:regression", f"--training.steps={STEPS}", "--training.batch=6",
    "--training.precision=float64", "--schedule.warmup=1", "--schedule.kind=constant",
    "--evaluation.every=0", f"--checkpoint.every={EVERY}", "--log.picture=false",
    "--checkpoint.asynchronous=false",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What came of a fault. seconds: until the first step after it; None where it ends the run."""

    happened: str
    lost: str
    seconds: float | None = None


@dataclass(frozen=True)
class Fault:
    """A row. try_it: makes it happen in a folder, and raises where anything else comes of it."""

    what: str
    try_it: Callable[[Path], Outcome]


class Job:
    """Runs of the command in one folder."""

    def __init__(self, folder: Path, rows: str = "good") -> None:
        self.folder, self.mark = folder, folder / "mark"
        self.options = [*BASE, f"--folder={folder / 'run'}", f"--data.source=faulty_rows:{rows}"]

    def run(
        self,
        ranks: int,
        *changes: str,
        restarts: int = 0,
        fault: str = "",
        rank: int = 1,
        timeout_seconds: float = 600.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run the command on so many ranks, and return its end."""
        launcher = [
            "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            f"--max-restarts={restarts}", "--monitor-interval=0.1",
        ]  # fmt: skip
        command = [
            sys.executable, *(launcher if ranks > 1 else []), "-m", "autoparallel", "train",
            *self.options, *changes,
        ]  # fmt: skip
        environment = {
            **os.environ, "FAULT": fault, "FAULT_RANK": str(rank if ranks > 1 else 0),
            "FAULT_MARK": str(self.mark),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }  # fmt: skip
        return subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_seconds,
        )

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in self._metrics()}

    def _metrics(self) -> list[dict[str, float]]:
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def recovered(self) -> float:
        """The seconds from the fault to the first step that was done after it."""
        fault = float(self.mark.read_text())
        return min(row["time"] for row in self._metrics() if row["time"] > fault) - fault

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "run" / "checkpoints").glob("step_????????"))


def straight() -> dict[int, float]:
    """The losses of the run to which nothing happens, in one process."""
    with tempfile.TemporaryDirectory() as name:
        job = Job(Path(name))
        require(job.run(1), 0)
        return job.losses()


def require(ended: subprocess.CompletedProcess[str], *codes: int) -> str:
    """What a run wrote to stderr; it has ended with one of these codes, or 1 for torchrun's own."""
    assert ended.returncode in codes, (ended.returncode, ended.stderr[-3000:])
    return ended.stderr


def require_straight(job: Job) -> None:
    """Each step has the loss of the run to which nothing happened."""
    assert job.losses() == pytest.approx(_EXPECTED or straight(), rel=1e-9)


_EXPECTED: dict[int, float] = {}


def killed(fault: str, *changes: str) -> Callable[[Path], Outcome]:
    def try_it(folder: Path) -> Outcome:
        job = Job(folder, "faulty")
        text = require(job.run(2, *changes, restarts=1, fault=fault), 0)
        require_straight(job)
        resumed = max(int(step) for step in re.findall(r"resumed from step (\d+)", text) or [0])
        done = EVERY if fault == "kill in a save" else BAD
        steps = f"{done - resumed} step{'s' * (done - resumed > 1)}"
        lost = f"{steps} since step {resumed}" if resumed else f"{steps}: none was saved before"
        return Outcome("torchrun starts the ranks again; they go on", lost, job.recovered())

    return try_it


def moved(ranks: int, mesh: str) -> Callable[[Path], Outcome]:
    def try_it(folder: Path) -> Outcome:
        job = Job(folder, "faulty")
        require(job.run(2, fault="kill"), 1)
        text = require(job.run(ranks, f"--parallel.mesh={mesh}"), 0)
        assert "resumed from step 3" in text
        require_straight(job)
        return Outcome("goes on there", "1 step since step 3", job.recovered())

    return try_it


def asked_to_end(fault: str) -> Callable[[Path], Outcome]:
    def try_it(folder: Path) -> Outcome:
        number = getattr(signal, fault)
        job = Job(folder, "faulty")
        text = require(job.run(1, fault=fault), 128 + number)
        assert f"ended by signal {number} after step 5, saved" in text
        require(job.run(1), 0)
        require_straight(job)
        return Outcome(f"a checkpoint is written; ends with code {128 + number}", "nothing")

    return try_it


def ended_alone(fault: str, words: str, happened: str, *changes: str) -> Callable[[Path], Outcome]:
    def try_it(folder: Path) -> Outcome:
        job = Job(folder, "faulty")
        text = require(job.run(2, *changes, fault=fault), 1)
        assert re.search(words, text), text[-3000:]
        require(job.run(2), 0)
        require_straight(job)
        return Outcome(happened, "1 step since step 3")

    return try_it


def not_finite(policy: str, code: int, words: str, outcome: Outcome) -> Callable[[Path], Outcome]:
    def try_it(folder: Path) -> Outcome:
        job = Job(folder, "with_nan")
        text = require(job.run(2, f"--training.nonfinite={policy}"), code)
        assert re.search(words, text), text[-3000:]
        return outcome

    return try_it


def damaged(how: str) -> Callable[[Path], Outcome]:
    """Damage the newest checkpoint of a run of ten steps, and let it go on."""

    def try_it(folder: Path) -> Outcome:
        job = Job(folder)
        require(job.run(1, "--training.steps=9"), 0)
        for path in job.checkpoints if how == "all" else job.checkpoints[-1:]:
            file = max(path.iterdir(), key=lambda each: each.stat().st_size)
            content = file.read_bytes()
            if how == "flip":
                middle = len(content) // 2
                flipped = bytes([content[middle] ^ 1])
                file.write_bytes(content[:middle] + flipped + content[middle + 1 :])
            elif how == "contents":
                (path / ".metadata").unlink()
            else:
                file.write_bytes(content[:-40])
        if how == "all":
            text = require(job.run(1), 1)
            assert "is damaged" in text
            return Outcome("refused: a new run would replace them", "nothing yet")
        text = require(job.run(1), 0)
        assert "passed over step_00000009" in text or how == "contents"
        assert "resumed from step 6" in text
        require_straight(job)
        return Outcome("passed over with a warning; goes on from the one before", "3 steps")

    return try_it


def refused(words: str, *changes: str, happened: str, code: int = 2) -> Callable[[Path], Outcome]:
    def try_it(folder: Path) -> Outcome:
        (folder / "file").write_text("a file")
        given = [change.replace("{}", str(folder)) for change in changes]
        begun = time.monotonic()
        text = require(Job(folder).run(1, *given), code)
        assert re.search(words, text), text[-3000:]
        return Outcome(f"{happened}, after {time.monotonic() - begun:.0f} s", "nothing")

    return try_it


GONE = "no word from 1|rank 1|ranks? 1 did not answer"
FAULTS = (
    Fault("kill -9 of one of two ranks in the middle of a step", killed("kill")),
    Fault("kill -9 of one of two ranks in the middle of a save", killed(
        "kill in a save", "--checkpoint.asynchronous=true"
    )),
    Fault("kill -9 of a job of two ranks, started again on one", moved(1, "tp")),
    Fault("the same, started again on four, dp=2 and tp=2", moved(4, "dp=2,tp=2")),
    Fault("SIGTERM", asked_to_end("SIGTERM")),
    Fault("Ctrl-C", asked_to_end("SIGINT")),
    Fault("a rank ends without a word", ended_alone("exit", GONE, "the other rank names it")),
    Fault("a rank hangs", ended_alone(
        "hang", GONE, "after parallel.timeout_seconds the other rank names it, and the place",
            "--parallel.timeout_seconds=60",
    )),
    Fault("an error in the user's code on one rank", ended_alone(
        "raise", "a fault in the user", "both ranks end; the other one names the error"
    )),
    Fault("NaN in a batch, nonfinite = stop", not_finite(
        "stop", 1, "step 5: the loss is nan", Outcome("both ranks end before the update", "1 step")
    )),
    Fault("NaN in a batch, nonfinite = skip", not_finite(
        "skip", 0, "the step is skipped", Outcome("the step updates nothing", "nothing")
    )),
    Fault("NaN in a batch, nonfinite = rollback", not_finite(
        "rollback", 0, "back to step 3, without the rows of batch 4",
        Outcome("goes back to the last checkpoint, without those rows", "1 step"),
    )),
    Fault("the newest checkpoint is cut short", damaged("cut")),
    Fault("one bit of it is flipped", damaged("flip")),
    Fault("its table of contents is gone", damaged("contents")),
    Fault("all checkpoints are damaged", damaged("all")),
    Fault("the folder of the run cannot be written to", refused(
        "cannot write to", "--folder={}/file", happened="refused at the start"
    )),
    Fault("a folder without a checkpoint to go on from", refused(
        "no checkpoint in", "--checkpoint.resume={}", happened="refused at the start", code=1
    )),
    Fault("a misspelt key", refused(
        "do you mean training.steps", "--training.stps=3", happened="refused at the start"
    )),
)  # fmt: skip


def try_all(pattern: str = "") -> Iterator[tuple[str, Outcome]]:
    """Try the rows whose names match a pattern, one after the other."""
    _EXPECTED.update(straight())
    for row in FAULTS:
        if re.search(pattern, row.what):
            with tempfile.TemporaryDirectory() as name:
                outcome = row.try_it(Path(name))
            sys.stderr.write(f"{row.what}: {outcome}\n")
            yield row.what, outcome
