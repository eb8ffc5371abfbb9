"""Switches of torch that a forward asks for while it is traced, so that it may depend on them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import torch

__all__ = ["watching_gradient_mode"]

_lock = threading.Lock()
_records: dict[int, list[list[str]]] = {}
_original = torch.is_grad_enabled


def _asked() -> bool:
    """Return what torch.is_grad_enabled does, and note who has asked.

    Torch asks for purposes of its own: its fast paths for inference compute the same.
    """
    records = _records.get(threading.get_ident())
    if records:
        name = str(sys._getframe(1).f_globals.get("__name__", ""))
        if name.partition(".")[0] not in ("torch", "autoparallel"):
            records[-1].append(name)
    return _original()


@contextlib.contextmanager
def watching_gradient_mode(record: list[str]) -> Iterator[None]:
    """Note in `record` who asks, in this thread and within, whether gradients are recorded.

    >>> record = []
    >>> with watching_gradient_mode(record):
    ...     _ = eval("torch.is_grad_enabled()", {"torch": torch, "__name__": "a_model"})
    >>> record
    ['a_model']
    """
    thread = threading.get_ident()
    with _lock:
        _records.setdefault(thread, []).append(record)
        torch.is_grad_enabled = _asked
    try:
        yield
    finally:
        with _lock:
            _records[thread].pop()
            if not _records[thread]:
                del _records[thread]
            if not _records:
                torch.is_grad_enabled = _original
