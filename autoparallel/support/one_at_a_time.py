"""Tracing and planning, one at a time in a process: both change what torch and Python share."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["OneAtATime", "planning"]


class OneAtATime:
    """A lock that whoever holds it may take again, also in threads that were started for the work.

    Simulated ranks are such threads: they may plan while the one that simulates waits for them, and
    run in a copy of its context, by which they are known. In a child process that was forked
    nobody holds it.

    >>> lock = OneAtATime()
    >>> with lock.held(), lock.held():
    ...     pass
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_mine: ContextVar[bool] = ContextVar("is_mine", default=False)
        os.register_at_fork(after_in_child=self._forget)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait until no other thread holds it, and hold it until the end."""
        if self._is_mine.get():
            yield
            return
        with self._lock:
            token = self._is_mine.set(True)
            try:
                yield
            finally:
                self._is_mine.reset(token)

    def _forget(self) -> None:
        """Make it free, in a child process to which no thread but this one has come along."""
        self._lock = threading.Lock()


# A trace replaces functions of torch and of modules, and watches what the whole process does. Of
# two at once, each would find the other's changes, and take them for those of its model.
planning = OneAtATime()
