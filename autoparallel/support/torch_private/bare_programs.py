"""Traces that leave out of a program what nobody reads who imports it node by node."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

__all__ = ["bare_programs"]


class _Bare(threading.local):
    """The thread's wish to have bare programs."""

    wanted = False


_bare = _Bare()
_lock = threading.Lock()
# How many threads have the wish now, and torch's functions, which are replaced meanwhile.
_count = 0
_noting: Any = None
_compiling: Any = None


@contextmanager
def bare_programs() -> Iterator[None]:
    """Have traces of this thread leave `node.meta["tensor_meta"]` empty, and write no Python.

    Torch notes there in which order each tensor lies in memory, and asks its symbolic sizes for
    it: `node.meta["val"]` tells the same. And it writes and compiles the Python code of a graph
    after each of its own passes, which takes up to a sixteenth of the time of a plan (torch 2.13);
    here that is done when a graph is run or its code is asked for, which nobody does who reads the
    nodes.
    """
    global _count, _noting, _compiling
    tracer: Any = import_module("torch.fx.experimental.proxy_tensor")
    graphs: Any = torch.fx.GraphModule
    before = _bare.wanted
    with _lock:
        if _count == 0:
            _noting, tracer._extract_tensor_metadata = tracer._extract_tensor_metadata, _noted
            _compiling, graphs.recompile = graphs.recompile, _recompiled
        _count += 1
    _bare.wanted = True
    try:
        yield
    finally:
        _bare.wanted = before
        with _lock:
            _count -= 1
            if _count == 0:
                tracer._extract_tensor_metadata = _noting
                graphs.recompile = _compiling


def _noted(*args: Any, **kwargs: Any) -> Any:
    """Return a tensor's metadata, or None in threads that want none."""
    return None if _bare.wanted else _noting(*args, **kwargs)


class _Late:
    """A graph's Python code, which is written when somebody asks.

    It is an attribute of the class, which each graph has for itself; once the code is written, the
    graph has one of its own, which goes before it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        _written(module)
        return vars(module)[self.name]


_LATE = {name: _Late(name) for name in ("_code", "_lineno_map", "_prologue_start")}


def _recompiled(module: Any) -> Any:
    """Have the code of a graph written later, in threads that want bare programs."""
    # A graph that takes containers notes their structure when its code is written.
    plain = type(module.graph._codegen) is torch.fx.graph.CodeGen
    if not _bare.wanted or not plain:
        return _compiling(module)
    kind: Any = type(module)
    for name, late in _LATE.items():
        vars(module).pop(name, None)
        setattr(kind, name, late)
    kind.forward = _run
    module._recompile_submodules()
    return None


def _written(module: Any) -> None:
    """Write the code of a graph."""
    wanted, _bare.wanted = _bare.wanted, False
    try:
        torch.fx.GraphModule.recompile(module)
    finally:
        _bare.wanted = wanted


def _run(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a graph whose code is not written yet."""
    _written(module)
    return module.forward(*args, **kwargs)
