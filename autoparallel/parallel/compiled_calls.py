"""torch.compile of a parallel module: its programs are compiled, and what surrounds them runs as it
is.

torch.compile takes up each frame of Python that begins in a call. Around a program it is kept from
doing so: there the program is chosen, and modes, attributes, parameters and the other ranks'
headers are looked at, in every call, as without torch.compile. Nothing that a compiler could take
for constant is kept in its guards. A program itself is one function of tensors and their sizes,
with functional collectives, so that it becomes one graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from autoparallel.errors import CaptureError, WrappedModelError
from autoparallel.support.torch_private import (
    break_graph,
    frame_compiler,
    run_as_python,
    set_frame_compiler,
    wants_full_graph,
)

__all__ = ["CompiledCalls", "is_compiled", "refuse_full_graph", "run_compiled"]


class _Current(threading.local):
    """The compiler of the call that runs in this thread, None where it is not compiled."""

    compiler: Any = None


_current = _Current()


class CompiledCalls:
    """Mixed into a parallel module's class: torch.compile compiles its programs.

    Example: `torch.compile(module, fullgraph=True)` or `module.compile(fullgraph=True)`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module as nn.Module does; under torch.compile its programs are compiled."""
        if torch.compiler.is_dynamo_compiling():
            _refuse_inlining()
        # No function in Python may be called before the compiler is put aside: it would take it up.
        compiler = frame_compiler()
        if compiler is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        before = _current.compiler
        set_frame_compiler(None)
        _current.compiler = compiler
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            _current.compiler = before
            set_frame_compiler(compiler)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Have all calls compiled, as nn.Module.compile does; it takes torch.compile's options.

        Raises WrappedModelError for a module inside of a model whose program replaces its calls.
        """
        state = vars(self).get("_autoparallel")
        if state is not None and _is_replaced(state):
            raise WrappedModelError(
                "a module inside of a split model is compiled by itself",
                where=state.path,
                why="the model runs one program, which has the module's ops in it and does not "
                "call the module",
                fix="compile the model: model.compile(), or torch.compile(model)",
            )
        vars(self)["_compiled_call_impl"] = torch.compile(self._call_compiled, *args, **kwargs)

    def _call_compiled(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module without the look at `_compiled_call_impl`, which is this method."""
        if torch.compiler.is_dynamo_compiling():
            _refuse_inlining()
        compiler = frame_compiler()
        before = _current.compiler
        set_frame_compiler(None)
        _current.compiler = compiler
        try:
            return self._call_impl(*args, **kwargs)  # type: ignore[attr-defined]
        finally:
            _current.compiler = before
            set_frame_compiler(compiler)


for _method in (CompiledCalls.__call__, CompiledCalls._call_compiled):
    run_as_python(_method.__code__)


def _is_replaced(state: Any) -> bool:
    """Return whether a module's calls are a part of the program of the model around it."""
    if not state.path:
        return False
    above = vars(state.tree.root)["_autoparallel"]
    return bool(above.entries)


def _refuse_inlining() -> None:
    """Tell the compiler of a function that calls a split module to compile the module by itself.

    With fullgraph=True that is an error, which torch.compile raises with these words.
    """
    break_graph(
        "a module that autoparallelize has split is called in a function that is compiled. The "
        "program of a split module is chosen, and the ranks are compared, in each call, which no "
        "graph can hold. Compile the module itself, torch.compile(model, fullgraph=True), and call "
        "it in a function that is not compiled, or is compiled without fullgraph=True"
    )


def is_compiled() -> bool:
    """Return whether the programs of the call that runs now are compiled."""
    return _current.compiler is not None


def run_compiled(run: Callable[..., Any], *arguments: Any) -> Any:
    """Run a program, compiled where the call around it is."""
    compiler = _current.compiler
    if compiler is None:
        return run(*arguments)
    set_frame_compiler(compiler)
    try:
        return run(*arguments)
    finally:
        set_frame_compiler(None)


def refuse_full_graph(name: str) -> None:
    """Raise CaptureError for a model that runs as the user's Python under fullgraph=True.

    name: of its class, or its path.
    """
    if _current.compiler is not None and wants_full_graph(_current.compiler):
        raise CaptureError(
            "torch.compile(fullgraph=True) of a model that runs as the user's Python",
            where=name,
            why="it could not be traced whole, or hooks were registered in it; so it has no one "
            "program, and its modules have programs of their own",
            fix="compile it without fullgraph=True: each of its programs becomes one graph",
        )
