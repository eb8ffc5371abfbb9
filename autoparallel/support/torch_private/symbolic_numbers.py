"""Sizes that a trace leaves open, as torch writes them, and what it has taken for true of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import sympy

__all__ = [
    "EXPORT_LOGGERS",
    "FAKE_TENSOR_LOGGER",
    "expression_of",
    "guards_of",
    "hint_of",
    "is_fixed",
    "remembering_fake_results",
    "without_tensor_metadata",
]

# Loggers whose messages the project replaces by errors of its own.
EXPORT_LOGGERS = ("torch._export", "torch.export", "torch.fx")

FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"


def expression_of(size: Any) -> sympy.Expr:
    """Return the expression of a symbolic number (SymInt, SymFloat, SymBool)."""
    expression: sympy.Expr = size.node.expr
    return expression


def hint_of(size: Any) -> Any:
    """Return a symbolic number's value for the example inputs; None if it is read from data."""
    return size.node.hint if size.node.has_hint() else None


def is_fixed(size: torch.SymInt) -> bool:
    """Return whether the tracer knows of a symbolic number that it is the example inputs' value."""
    known: Callable[[Any], bool] = import_module(
        "torch.fx.experimental.symbolic_shapes"
    ).statically_known_true
    hint = hint_of(size)
    return hint is not None and known(size == hint)


def guards_of(size: torch.SymInt) -> tuple[Any, ...]:
    """Return the expressions in sizes that the tracer of a size took for true, in order."""
    return tuple(guard.expr for guard in size.node.shape_env.guards)


def remembering_fake_results(enabled: bool) -> AbstractContextManager[Any]:
    """Return a context that sets whether results of ops on fake tensors are cached by size."""
    config = import_module("torch._dynamo").config
    patch: AbstractContextManager[Any] = config.patch(fake_tensor_cache_enabled=enabled)
    return patch


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
