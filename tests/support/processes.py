"""Run a function in several gloo processes on this machine."""

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from garbage import collect_rarely
from traces import planned_once, sharing, traced_once


def start_server() -> None:
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
    timeout_seconds: float = 900.0,
    start: str = "forkserver",
    before: Callable[[], Any] | None = None,
) -> list[Any]:
    """Return the results of function(rank, *arguments) of all ranks, in their order.

    function must live at the top level of an importable module. The default process group is gloo
    over all ranks. Of what all ranks plan alike, the first one's plan is everybody's. start:
    "spawn" starts each process by itself, as a launcher does, with a hash seed of its own, and each
    plans for itself; forks of one server have its seed in common. before: runs once, in a process
    of which all ranks are then forks, so that they have what it has cached, such as plans. It may
    start no thread.
    Raises RuntimeError with the traceback of the first rank that failed, TimeoutError if some rank
    has not finished in time; in both cases no process is left behind.
    """
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        start_server()
    with tempfile.TemporaryDirectory() as name:
        folder, environment = Path(name), dict(os.environ)
        shares = sharing(), start == "forkserver"
        given = (world_size, arguments, folder, timeout_seconds, environment, shares)
        works = [(_work, (function, rank, *given)) for rank in range(world_size)]
        if before is not None:
            works = [(_fork, (before, function, *given))]
        processes = [
            context.Process(target=target, args=values, daemon=True) for target, values in works
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, world_size, folder, time.monotonic() + timeout_seconds)
            return [
                torch.load(folder / f"result_{rank}", weights_only=False)
                for rank in range(world_size)
            ]
        finally:
            for process in processes:
                if before is not None:
                    # Its forks are of its group.
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()


def _fork(
    before: Callable[[], Any],
    function: Callable[..., Any],
    world_size: int,
    arguments: tuple[Any, ...],
    folder: Path,
    timeout_seconds: float,
    environment: dict[str, str],
    shares: tuple[bool | None, bool],
) -> None:
    """Run `before`, and then all ranks as forks of this process."""
    os.setpgid(0, 0)
    # Autograd has threads where there are GPUs, and forks would be without them.
    os.environ.clear()
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    try:
        before()
    except BaseException:
        _write_failure(folder, "before")
        os._exit(0)
    gc.freeze()
    ranks = []
    for rank in range(world_size):
        ranks.append(os.fork())
        if not ranks[-1]:
            given = (world_size, arguments, folder, timeout_seconds, dict(os.environ), shares)
            _work(function, rank, *given)
    for _ in ranks:
        _, status = os.wait()
        if status:
            # Without its words; the others are ended by the process that waits for this one.
            os._exit(abs(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _write_failure(folder: Path, name: str) -> None:
    """Write the traceback of the exception that is being handled.

    It is written elsewhere and renamed into place, so that a reader sees a whole file or none.
    """
    written = folder / f"unfinished_{name}"
    written.write_text(f"{time.monotonic()}\n{traceback.format_exc()}")
    written.rename(folder / f"failure_{name}")


def _work(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    arguments: tuple[Any, ...],
    folder: Path,
    timeout_seconds: float,
    environment: dict[str, str],
    shares: tuple[bool | None, bool],
) -> None:
    # A fork has the variables that the server was started with.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    # A rank that native code ends says where it was, on the errors of the test.
    faulthandler.enable(sys.__stderr__)
    # The server has done so for its forks: in one of them it would copy all that they share.
    if not gc.get_freeze_count():
        collect_rarely()
    written = folder / f"written_{rank}"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        with _sharing(*shares, folder):
            result = function(rank, *arguments)
        # A reader sees a whole file or none.
        torch.save(result, written)
        written.rename(folder / f"result_{rank}")
        # A rank that leaves early would break the others' last collective.
        while len([*folder.glob("result_*"), *folder.glob("failure_*")]) < world_size:
            time.sleep(0.02)
    except BaseException:
        _write_failure(folder, str(rank))
    # Without the tear-down: gloo's threads now and then abort a process that is ending.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def _sharing(traces: bool | None, plans: bool, folder: Path) -> Iterator[None]:
    """Have a rank share traces as the test that has started it does, and plans with the others.

    traces: as of `sharing`. plans: not where each rank has a hash seed of its own.
    """
    with ExitStack() as stack:
        if traces is not None:
            stack.enter_context(traced_once(traces))
        if plans:
            stack.enter_context(planned_once(folder))
        yield


def _wait(processes: list[Any], world_size: int, folder: Path, deadline: float) -> None:
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes) or any(folder.glob("failure_*")):
            break
        if time.monotonic() > deadline:
            ended = {int(path.name.removeprefix("result_")) for path in folder.glob("result_*")}
            late = sorted({*range(world_size)} - ended)
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
        where = f"rank {rank} of {world_size}" if rank != "before" else "before all ranks it"
        raise RuntimeError(f"{where} failed:\n{text}")
