"""Runs rows in as few launches of processes as can be, and says what came of each."""

from __future__ import annotations

import logging
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from processes import run_processes

from autoparallel.errors import AutoParallelError

from .case import Case, SameError
from .registry import Habit, all_habits

__all__ = ["Outcome", "outcomes", "ran"]

# How long a rank waits for the others to finish a row that it has finished itself: they hang when
# they wait for a collective that a failed rank never makes.
_PATIENCE_SECONDS = 120.0
_PATIENCE_AFTER_FAILURE = 15.0


@dataclass(frozen=True)
class Outcome:
    """What came of a row.

    kind: "works"; "works as Python", where the model or a part of it was not split; "refused", by
    an AutoParallelError; "same error", where the unsplit module fails alike; "not run"; and two
    failures: "wrong", where something is not what the unsplit module gives, and "error", where an
    error is raised that is not the project's. message: the reason, the first line. fix: of a
    refusal. trace: of a failure.
    """

    kind: str
    message: str = ""
    fix: str = ""
    trace: str = ""

    @property
    def failed(self) -> bool:
        """Whether the row fails."""
        return self.kind in ("wrong", "error")


class _Warned(logging.Handler):
    """Collects the first lines of the project's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().split("\n")[0])


def ran(habit: Habit, case: Case) -> Outcome:
    """Return what comes of one row on this rank."""
    log, warned = logging.getLogger("autoparallel"), _Warned()
    log.addHandler(warned)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            habit.run(case)
    except AutoParallelError as error:
        what, fix = (text.replace(str(case.folder), "…") for text in (error.what, error.fix))
        # A fix of several lines ends its first one by telling what follows.
        fix, _, more = fix.partition("\n")
        return Outcome("refused", what.split("\n")[0], fix.rpartition(";")[0] if more else fix)
    except SameError as error:
        return Outcome("same error", str(error).split("\n")[0])
    # Some errors of torch.distributed.checkpoint are no Exception.
    except BaseException as error:
        kind = "wrong" if isinstance(error, AssertionError) else "error"
        lines = str(error).strip().splitlines() or [""]
        message = f"{type(error).__name__}: {lines[0][:200]}"
        return Outcome(kind, message, trace=traceback.format_exc())
    finally:
        log.removeHandler(warned)
    if habit.refused:
        return Outcome("wrong", "it runs, and is expected to be refused")
    lines = [line for line in warned.lines if "Python" in line]
    lines += [
        f"{item.path or 'the model'}: {item.reason}"
        for module in case.made
        if (plan := getattr(module.__dict__.get("_autoparallel"), "plan", None)) is not None
        for item in plan.breaks
    ]
    return Outcome("works as Python", lines[0]) if lines else Outcome("works")


def _work(rank: int, world_size: int, folder: str, names: Sequence[str]) -> None:
    """Run the rows with these words, and write what came of each into a file.

    Ends after the first row that fails: what it leaves behind could harm the next one.
    """
    if world_size == 1:
        # A script that is run without a launcher has no process group.
        dist.destroy_process_group()
    known = {habit.words: habit for habit in all_habits()}
    for number, words in enumerate(names):
        place = Path(folder) / f"row_{number}"
        place.mkdir(exist_ok=True)
        outcome = ran(known[words], Case(world_size, rank, place))
        written = Path(folder) / f"outcome_{number}_{rank}.part"
        written.write_bytes(pickle.dumps(outcome))
        written.rename(written.with_suffix(""))
        patience = _PATIENCE_AFTER_FAILURE if outcome.failed else _PATIENCE_SECONDS
        deadline = time.monotonic() + patience
        wanted = [Path(folder) / f"outcome_{number}_{other}" for other in range(world_size)]
        while not all(path.exists() for path in wanted):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{words}: the other ranks hang")
            time.sleep(0.005)
        if any(pickle.loads(path.read_bytes()).failed for path in wanted):
            return


def _joined(folder: Path, number: int, world_size: int, crash: str) -> Outcome:
    """Return what came of a row on all ranks. crash: why the launch ended, if it did."""
    ranks: list[Outcome] = []
    for rank in range(world_size):
        path = folder / f"outcome_{number}_{rank}"
        ranks.append(
            pickle.loads(path.read_bytes())
            if path.exists()
            else Outcome("error", f"rank {rank} hangs or ends", trace=crash)
        )
    failed = [outcome for outcome in ranks if outcome.failed]
    if failed:
        # The reason is the rank that fails by itself, not the one that waits for it.
        return next((f for f in failed if "hangs or ends" not in f.message), failed[0])
    if len({outcome.kind for outcome in ranks}) > 1:
        return Outcome("wrong", "the ranks differ: " + ", ".join(o.kind for o in ranks))
    return ranks[0]


def outcomes(
    habits: Sequence[Habit], world_size: int, timeout_seconds: float = 600.0
) -> dict[str, Outcome]:
    """Return what comes of the rows, by their words, at a number of ranks.

    All run in one launch of processes, one after the other; where one fails or hangs, those after
    it run in another launch.
    """
    results = {h.words: Outcome("not run", h.missing) for h in habits if h.missing}
    waiting = [habit.words for habit in habits if not habit.missing]
    while waiting:
        with tempfile.TemporaryDirectory() as name:
            crash = ""
            try:
                run_processes(
                    _work, world_size, world_size, name, waiting, timeout_seconds=timeout_seconds
                )
            except (RuntimeError, TimeoutError) as error:
                crash = str(error)
            # A launch that ends before its first row has that one to blame, and is not repeated.
            started = max(1, len(list(Path(name).glob("row_*"))))
            for number in range(started):
                results[waiting[number]] = _joined(Path(name), number, world_size, crash)
            waiting = waiting[started:]
    return {habit.words: results[habit.words] for habit in habits}
