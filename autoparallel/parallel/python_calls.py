"""Calls that run the user's own Python: no program is right, or the user replaced the forward."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Mapping
from typing import Any

from torch import nn

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.common_numbers import common_numbers
from autoparallel.parallel.compiled_calls import refuse_full_graph
from autoparallel.parallel.module_state import (
    State,
    state_of,
)
from autoparallel.support.torch_private import (
    in_function_transform,
    without_function_overrides,
)

__all__ = [
    "Forward",
    "run_python",
]


class Forward:
    """The attribute `forward` of a parallel module: its program, or what the user has put there.

    A function that is assigned to it runs as Python on whole parameters, and may call the forward
    that was there before. It lies where such an attribute of a plain module does, so that programs
    of the modules around notice it. function: the one that runs programs.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __get__(self, module: Any, kind: Any = None) -> Any:
        if module is None:
            return self.function
        if "forward" not in vars(module):
            return types.MethodType(self.function, module)
        return functools.partial(_run_replaced, module, vars(module)["forward"])

    def __set__(self, module: Any, forward: Any) -> None:
        own = isinstance(forward, types.MethodType) and forward.__func__ is self.function
        if own and forward.__self__ is module:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = forward

    def __delete__(self, module: Any) -> None:
        if "forward" not in vars(module):
            raise AttributeError("forward")
        del vars(module)["forward"]


def _run_replaced(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a forward that the user has put in the place of the module's, as Python."""
    return run_python(module, state_of(module), args, kwargs, forward)


def run_python(
    module: nn.Module,
    state: State,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    forward: Any = None,
) -> Any:
    """Run the user's own forward, on whole parameters; what it calls is split where it can be.

    forward: another function to run in its place.
    """
    forward = forward or state.forward
    tree = state.tree
    if tree.pipeline is not None:
        raise AutoParallelError(
            f"{state.path or type(state.skeleton).__name__} would run as Python, on a mesh with "
            "stages",
            why="no program is right for this call: hooks were registered in the model, a branch "
            "on values goes another way, its forward was replaced, or torch.func transforms it; "
            "and this rank has the parameters of its own stage alone",
            fix="call it as it was planned for, or leave pp out of the mesh",
        )
    # A forward that another one calls finds the parameters shown and the numbers seeded.
    if tree.depth:
        return forward(*args, **kwargs)
    refuse_full_graph(state.path or type(state.skeleton).__name__)
    tree.depth += 1
    try:
        # Where nothing is split, numbers are drawn as a transform of torch.func wants them.
        common = (
            contextlib.nullcontext()
            if in_function_transform()
            else common_numbers(state.generator, state.ranks.world)
        )
        with tree.whole.shown(), common:
            result = forward(*args, **kwargs)
    finally:
        tree.depth -= 1
    if tree.headers is not None:
        with without_function_overrides():
            tree.headers.compare_results(result)
    return result
