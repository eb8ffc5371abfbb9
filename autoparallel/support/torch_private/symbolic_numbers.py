"""Sizes that a trace leaves open, as torch writes them, and what it has taken for true of them."""

from __future__ import annotations

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
    "as_if_exported",
    "expression_of",
    "guards_of",
    "hint_of",
    "is_fixed",
    "remembering_fake_results",
]

# Loggers whose messages the project replaces by errors of its own.
EXPORT_LOGGERS = ("torch._export", "torch.export", "torch.fx")

# Where torch notes that it exports a model.
_EXPORT_FLAGS = ("_is_compiling_flag", "_is_exporting_flag")

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
    """Return the expressions in sizes that the tracer of a size took for true, in order.

    They are in the symbols that the tracer knows at its end: of sizes that it has found equal, one
    symbol is left, also where it took something for true of another one before.
    """
    known: Any = size.node.shape_env
    replaced = (known.replace(guard.expr) for guard in known.guards)
    # That two sizes are equal says nothing more when they are one symbol.
    return tuple(guard for guard in replaced if guard.free_symbols)


@contextmanager
def as_if_exported() -> Iterator[None]:
    """Have torch.compiler.is_compiling() and is_exporting() answer as while a model is exported.

    Code asks them to leave out checks that no graph has, and then goes the way of the trace. And
    have max() and min() of two tensors be ops, which compare and branch outside of an export.
    """
    compiler: Any = torch.compiler
    names = [name for name in _EXPORT_FLAGS if hasattr(compiler, name)]
    before = [getattr(compiler, name) for name in names]
    try:
        for name in names:
            setattr(compiler, name, True)
        with import_module("torch._export.non_strict_utils")._override_builtin_ops():
            yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(compiler, name, value)


def remembering_fake_results(enabled: bool) -> AbstractContextManager[Any]:
    """Return a context that sets whether results of ops on fake tensors are cached by size."""
    config = import_module("torch._dynamo").config
    patch: AbstractContextManager[Any] = config.patch(fake_tensor_cache_enabled=enabled)
    return patch
