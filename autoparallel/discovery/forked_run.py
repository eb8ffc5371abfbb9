"""Work in a process of its own that may crash or hang: a fork of this one, with limits."""

from __future__ import annotations

import faulthandler
import math
import os
import resource
import selectors
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch

__all__ = ["Limits", "ProcessEndedError", "run_in_fork"]

# Libraries make themselves ready before a fork and undo that after it: filelock 4.2 refuses a fork
# that another thread begins meanwhile.
_FORKING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Limits:
    """The resources that a process may use before it is ended.

    processor_seconds: of its own work, so that a busy machine ends nothing. wall_seconds: for work
    that waits for ever. extra_nbytes: of address space beyond what the process begins with.
    """

    processor_seconds: int = 120
    wall_seconds: float = 240.0
    extra_nbytes: int = 8 << 30


class ProcessEndedError(Exception):
    """A process ended without an answer. Its text is the rest of a sentence about the process.

    crashed: whether it did so by itself, and not for its use of time.
    """

    def __init__(self, words: str, crashed: bool = False) -> None:
        super().__init__(words)
        self.crashed = crashed


def run_in_fork(work: Callable[[], bytes], limits: Limits) -> bytes:
    """Return the bytes that `work` returns in a fork of this process.

    Nothing that it does there is seen here: memory that it corrupts, Python objects that it
    changes. Raises ProcessEndedError where it crashes, raises an error or exceeds a limit.

    >>> run_in_fork(lambda: b"done", Limits())
    b'done'
    """
    reader, writer = os.pipe()
    with _FORKING, warnings.catch_warnings():
        # Python warns of forks beside threads. Only this thread goes on in the fork; it takes no
        # lock of another one but those that C libraries and Python set free by themselves.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        _run(work, writer, limits)
    os.close(writer)
    ended = False
    try:
        answer, in_time = _read(reader, time.monotonic() + limits.wall_seconds)
        if in_time:
            _, status = os.waitpid(process, 0)
            ended = True
    finally:
        os.close(reader)
        # Interrupted or too slow: nobody reads the answer any more.
        if not ended:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    if not in_time:
        raise ProcessEndedError(f"did not end within {limits.wall_seconds:g} s")
    if status:
        slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM)
        raise ProcessEndedError(_fate(status, limits), crashed=not slow)
    return answer


def _run(work: Callable[[], bytes], writer: int, limits: Limits) -> NoReturn:
    """Do the work in the fork, and end it without the clean-up that is this process's own."""
    code = 1
    try:
        # A crash is expected: no traceback on the user's screen, and no file of the memory.
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _lower(resource.RLIMIT_CPU, limits.processor_seconds)
        _lower(resource.RLIMIT_AS, _address_space() + limits.extra_nbytes)
        # Whoever waits for this process may be ended before it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(limits.wall_seconds) + 1)
        # A pool of threads does not survive a fork, and one thread needs none.
        torch.set_num_threads(1)
        answer = work()
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
        code = 0
    finally:
        os._exit(code)


def _lower(kind: int, limit: int) -> None:
    """Lower a soft limit, never above what the process may have."""
    _, hard = resource.getrlimit(kind)
    allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (allowed, hard))


def _address_space() -> int:
    """Return the bytes of address space that this process has now."""
    if not sys.platform.startswith("linux"):
        return 1 << 40
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _read(reader: int, deadline: float) -> tuple[bytes, bool]:
    """Return what is written to a pipe until it is closed, and whether that was before the
    deadline.
    """
    chunks: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0)):
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                return b"".join(chunks), True
            chunks.append(chunk)
    return b"", False


def _fate(status: int, limits: Limits) -> str:
    """Return how a process ended, in words, by its status as `os.waitpid` returns it."""
    if not os.WIFSIGNALED(status):
        return f"ended with exit code {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number == signal.SIGALRM:
        return f"did not end within {limits.wall_seconds:g} s"
    if number == signal.SIGXCPU:
        return f"did not end within {limits.processor_seconds} s of processor time"
    return f"crashed with {signal.Signals(number).name}"
