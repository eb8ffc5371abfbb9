"""Run a function in several gloo processes on this machine."""

import gc
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from garbage import collect_rarely


def _start_server() -> None:
    """Start the process without threads of which ranks are forks, where there is none yet.

    It imports what imported_before.py names, and looks for modules where this process does.
    """
    multiprocessing.set_forkserver_preload(["imported_before"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def run_processes(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_seconds: float = 180.0,
    start: str = "forkserver",
) -> list[Any]:
    """Return the results of function(rank, *arguments) of all ranks, in their order.

    function must live at the top level of an importable module. The default process group is gloo
    over all ranks. Every rank plans for itself, which costs a second: put several checks into one
    function. start: "spawn" starts each process by itself, as a launcher does, with a hash seed of
    its own; forks of one server have its seed in common.
    Raises RuntimeError with the traceback of the first rank that failed, TimeoutError if some rank
    has not finished in time; in both cases no process is left behind.
    """
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        _start_server()
    with tempfile.TemporaryDirectory() as name:
        folder, environment = Path(name), dict(os.environ)
        processes = [
            context.Process(
                target=_work,
                args=(function, rank, world_size, arguments, folder, timeout_seconds, environment),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, folder, time.monotonic() + timeout_seconds)
            return [
                torch.load(folder / f"result_{rank}", weights_only=False)
                for rank in range(world_size)
            ]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _work(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    arguments: tuple[Any, ...],
    folder: Path,
    timeout_seconds: float,
    environment: dict[str, str],
) -> None:
    # A fork has the variables that the server was started with.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    # The server has done so for its forks: in one of them it would copy all that they share.
    if not gc.get_freeze_count():
        collect_rarely()
    # Written elsewhere and renamed into place, so that a reader sees a whole file or none.
    written = folder / f"written_{rank}"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        result = function(rank, *arguments)
        torch.save(result, written)
        written.rename(folder / f"result_{rank}")
        # A rank that leaves early would break the others' last collective.
        while len([*folder.glob("result_*"), *folder.glob("failure_*")]) < world_size:
            time.sleep(0.02)
    except BaseException:
        written.write_text(f"{time.monotonic()}\n{traceback.format_exc()}")
        written.rename(folder / f"failure_{rank}")
    # Without the tear-down: gloo's threads now and then abort a process that is ending.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes) or any(folder.glob("failure_*")):
            break
        if time.monotonic() > deadline:
            late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            raise TimeoutError(f"ranks {late} did not finish in time")
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"a process ended without a word; exit codes {codes}")
    # When one rank fails the others soon fail too, of a lost connection: the first is the cause.
    failures = []
    for path in folder.glob("failure_*"):
        seconds, _, text = path.read_text().partition("\n")
        failures.append((float(seconds), path.name.removeprefix("failure_"), text))
    if failures:
        _, rank, text = min(failures)
        raise RuntimeError(f"rank {rank} of {len(processes)} failed:\n{text}")
