"""Runs each subject in a process of its own: one that dies or hangs is a row like others."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import autoparallel

from .outcomes import Run
from .subjects import Subject
from .trial import run_unsplit, runs_of

__all__ = ["run_all"]

# How often longer than it may compute a process may wait: it hangs, or the machine is busy.
_PATIENCE = 10


def run_all(
    subjects: Sequence[Subject],
    seed: int,
    workers: int,
    seconds: float,
    told: Callable[[str, list[Run]], None],
) -> dict[str, list[Run]]:
    """Return the runs of all subjects, by name.

    seed: of the random plans. workers: how many processes run at once. seconds: of computing that
    one may take, and a tenth of the time that it may wait. told: a function that is called with
    each subject's name and runs, as they come.
    """
    # Forked processes share what is imported by then.
    autoparallel.make_plan(nn.Linear(4, 4), 2, example_inputs=torch.ones(2, 4))
    results: dict[str, list[Run]] = {}
    waiting = list(subjects)
    running: dict[int, tuple[Subject, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < workers:
                subject = waiting.pop(0)
                pid = os.fork()
                if not pid:
                    _work(subject, seed, Path(folder) / str(os.getpid()), seconds)
                running[pid] = (subject, time.monotonic())
            # One process at a time is waited for; those that take too long are ended.
            pid, code = os.waitpid(-1, os.WNOHANG)
            late = [
                number
                for number, (_, since) in running.items()
                if time.monotonic() - since > _PATIENCE * seconds
            ]
            if not pid and late:
                os.kill(late[0], signal.SIGKILL)
                pid, code = os.waitpid(late[0], 0)
            if not pid:
                time.sleep(0.05)
                continue
            subject, _ = running.pop(pid)
            written = Path(folder) / str(pid)
            lines = written.read_text().splitlines() if written.exists() else []
            runs = [Run(**json.loads(line)) for line in lines if line.endswith("}")]
            if pid in late or (os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGXCPU):
                runs.append(Run("", "", "slow", f"it takes more than {seconds:.0f} seconds"))
            elif code and _ends_unsplit(subject):
                runs.append(Run("", "", "not run", "unsplit, it ends the process"))
            elif code:
                runs.append(Run("", "", "dead", f"its process ends with {code}"))
            results[subject.name] = runs
            told(subject.name, runs)
    return {subject.name: results[subject.name] for subject in subjects}


def _ends_unsplit(subject: Subject) -> bool:
    """Return whether a process ends that runs a subject's cases as torch alone does."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            run_unsplit(subject)
            code = 0
        finally:
            os._exit(code)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def _work(subject: Subject, seed: int, place: Path, seconds: float) -> None:
    """Run a subject in a forked process, which ends here. place: the file of its runs."""
    code = 1
    try:
        # A machine that others use too is slow, which is not the op's fault.
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 10))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        torch.set_num_threads(1)
        with place.open("w", buffering=1) as file:
            for run in runs_of(subject, seed):
                file.write(json.dumps(asdict(run)) + "\n")
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)
