"""Switches of torch that a forward asks for while it is traced, or sets and no graph would have."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from autoparallel.errors import CaptureError

__all__ = ["refusing_contexts", "watching_gradient_mode"]

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


_refusals: dict[int, list[list[CaptureError]]] = {}
_enter_inference = torch.inference_mode.__enter__
_enter_hooks = torch.autograd.graph.saved_tensors_hooks.__enter__


def _refuse(what: str, fix: str) -> None:
    """Raise CaptureError in a thread that traces, for a context that a graph would not have."""
    refusals = _refusals.get(threading.get_ident())
    if refusals:
        error = CaptureError(
            f"the forward enters {what}",
            why="a trace does not see it, and gradients would be others",
            fix=fix,
        )
        refusals[-1].append(error)  # the forward may catch it
        raise error


def _inference(self: Any) -> None:
    """Enter torch.inference_mode, which a trace does not see."""
    if self.mode:
        _refuse("torch.inference_mode", "enter torch.no_grad() instead")
    _enter_inference(self)


def _hooks(self: Any) -> None:
    """Enter torch.autograd.graph.saved_tensors_hooks, whose hooks a graph would not have."""
    if str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0] != "torch":
        _refuse("torch.autograd.graph.saved_tensors_hooks", "enter it around the call of the model")
    _enter_hooks(self)


@contextlib.contextmanager
def refusing_contexts(refused: list[CaptureError]) -> Iterator[None]:
    """Raise CaptureError, in this thread and within, for contexts that a trace does not see.

    refused: the errors are added to it.

    >>> refused = []
    >>> with contextlib.suppress(CaptureError), refusing_contexts(refused):
    ...     with torch.inference_mode():
    ...         pass
    >>> print(refused[0].what)
    the forward enters torch.inference_mode
    """
    thread = threading.get_ident()
    with _lock:
        _refusals.setdefault(thread, []).append(refused)
        torch.inference_mode.__enter__ = _inference  # type: ignore[method-assign]
        torch.autograd.graph.saved_tensors_hooks.__enter__ = _hooks  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            _refusals[thread].pop()
            if not _refusals[thread]:
                del _refusals[thread]
            if not _refusals:
                torch.inference_mode.__enter__ = _enter_inference  # type: ignore[method-assign]
                hooks = torch.autograd.graph.saved_tensors_hooks
                hooks.__enter__ = _enter_hooks  # type: ignore[method-assign]
