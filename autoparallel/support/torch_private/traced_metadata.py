"""The metadata of tensors that torch notes with each op that it traces."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

__all__ = ["without_tensor_metadata"]


class _BareTraces(threading.local):
    """The thread's wish to have no metadata of tensors in its traces."""

    wanted = False


_bare_traces = _BareTraces()
_bare_lock = threading.Lock()
# How many threads have the wish now, and torch's function, which is replaced meanwhile.
_bare_count = 0
_noting: Any = None


@contextmanager
def without_tensor_metadata() -> Iterator[None]:
    """Have traces of this thread leave `node.meta["tensor_meta"]` empty.

    Torch notes there in which order each tensor lies in memory, and asks its symbolic sizes for
    it, which takes a quarter of a trace. `node.meta["val"]` tells the same.
    """
    global _bare_count, _noting
    tracer: Any = import_module("torch.fx.experimental.proxy_tensor")
    before = _bare_traces.wanted
    with _bare_lock:
        if _bare_count == 0:
            _noting, tracer._extract_tensor_metadata = tracer._extract_tensor_metadata, _noted
        _bare_count += 1
    _bare_traces.wanted = True
    try:
        yield
    finally:
        _bare_traces.wanted = before
        with _bare_lock:
            _bare_count -= 1
            if _bare_count == 0:
                tracer._extract_tensor_metadata = _noting


def _noted(*args: Any, **kwargs: Any) -> Any:
    """Return a tensor's metadata, or None in threads that want none."""
    return None if _bare_traces.wanted else _noting(*args, **kwargs)
