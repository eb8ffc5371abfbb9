"""Run a function in several gloo processes on this machine, for tests."""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_processes(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_seconds: float = 180.0,
) -> list[Any]:
    """Result of function(rank, *arguments) of every rank, in order.

    function must live at the top level of an importable module. The default process group is gloo
    over all ranks. Processes cost seconds to start: put several checks into one function.
    Raises RuntimeError with the traceback of the first rank that failed, TimeoutError if some rank
    has not finished in time; in both cases no process is left behind.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_work,
                args=(function, rank, world_size, arguments, folder, timeout_seconds),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), time.monotonic() + timeout_seconds)
            return [
                torch.load(Path(folder) / f"result_{rank}.pt", weights_only=False)
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
    folder: str,
    timeout_seconds: float,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        result = function(rank, *arguments)
        # A rank that leaves early would break the others' last collective.
        dist.barrier()
        dist.destroy_process_group()
        torch.save(result, f"{folder}/result_{rank}.pt")
    except BaseException:
        # Renamed into place, so that a reader sees the whole text or none.
        text = Path(folder) / f"failure_{rank}.writing"
        text.write_text(f"{time.monotonic()}\n{traceback.format_exc()}")
        text.rename(Path(folder) / f"failure_{rank}.txt")
        raise SystemExit(1) from None


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            break
        if time.monotonic() > deadline:
            late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            raise TimeoutError(f"ranks {late} did not finish in time")
        time.sleep(0.02)
    if all(process.exitcode == 0 for process in processes):
        return
    # When one rank fails the others soon fail too, of a lost connection: the first is the cause.
    failures = []
    for path in folder.glob("failure_*.txt"):
        seconds, _, text = path.read_text().partition("\n")
        failures.append((float(seconds), path.stem.removeprefix("failure_"), text))
    if failures:
        _, rank, text = min(failures)
        raise RuntimeError(f"rank {rank} of {len(processes)} failed:\n{text}")
    codes = [process.exitcode for process in processes]
    raise RuntimeError(f"a process ended without a word; exit codes {codes}")
