"""Conversions of modules in a forward, such as `self.head.to(x.dtype)`.

Torch converts a module by putting other memory into its parameters. A tracer's parameters take
none, not even where nothing changes: there the conversion is left out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from autoparallel.errors import CaptureError

__all__ = ["idle_conversions"]

# By the names of the functions that they hand on: the methods that leave values as they are.
_PLAIN = tuple(
    f"Module.{name}.<locals>"
    for name in ("to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda", "xpu")
)
_lock = threading.Lock()
_local = threading.local()
# Torch's own, or what somebody else has put in its place, while ours stands there.
_apply: Any = nn.Module._apply
_installed = 0


@contextlib.contextmanager
def idle_conversions() -> Iterator[None]:
    """Have conversions that this thread asks for within do nothing, where nothing is to be done.

    Those that would change something raise CaptureError.

    >>> with idle_conversions():
    ...     _ = nn.Linear(2, 2).to(torch.float32)
    """
    global _apply, _installed
    before = getattr(_local, "idle", False)
    with _lock:
        if _installed == 0:
            _apply = nn.Module._apply
            nn.Module._apply = _converted  # type: ignore[method-assign]
        _installed += 1
    _local.idle = True
    try:
        yield
    finally:
        _local.idle = before
        with _lock:
            _installed -= 1
            if _installed == 0:
                nn.Module._apply = _apply  # type: ignore[method-assign]


def _converted(self: nn.Module, fn: Callable[[Any], Any], *args: Any, **kwargs: Any) -> nn.Module:
    """Convert a module as torch does, and where conversions are idle only see that it is one."""
    if not getattr(_local, "idle", False):
        converted: nn.Module = _apply(self, fn, *args, **kwargs)
        return converted
    name = getattr(fn, "__qualname__", "")
    for path, tensor in (*self.named_parameters(), *self.named_buffers()):
        # Not the parameter itself: to a tracer it would be the result of this call from now on.
        like = torch.empty((0,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device)
        result = fn(like) if name.startswith(_PLAIN) else None
        if result is None or (result.dtype, result.device) != (tensor.dtype, tensor.device):
            raise CaptureError(
                f"the forward converts {path} of a {type(self).__name__}",
                why="a graph returns values, and its parameters stay as they are",
                fix="convert the module before it is split, or the values in the forward",
            )
    return self
