"""Arithmetic with symbolic sizes, remembered: the shape of each tensor asks for the same again."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import Any

__all__ = ["remembering_arithmetic"]

# Those whose results follow from the two expressions alone; that of `mod` does from ranges, too.
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge")
}
_PLAIN = (int, float, bool, type(None))
_MISSING = object()


class _Memory(threading.local):
    """The results that a thread remembers, by the identity of the assumptions about its sizes.

    The assumptions are kept with them, so that no others get their identity.
    """

    results: dict[int, tuple[Any, dict[Any, Any]]] | None = None


_memory = _Memory()
_lock = threading.Lock()
# How many threads remember, and the methods of torch's that are replaced meanwhile.
_count = 0
_originals: dict[str, Any] = {}


@contextmanager
def remembering_arithmetic() -> Iterator[None]:
    """Have this thread compute each sum, product and comparison of two sizes once, within.

    To tell how many numbers a tensor has, and whether they are contiguous, torch computes the same
    again for each tensor of a trace. Expressions are remembered, and no symbolic numbers: by these
    a tracer knows where a number comes from. Torch 2.15 does so itself.
    """
    global _count
    before = _memory.results
    with _lock:
        if _count == 0:
            _install()
        _count += 1
    _memory.results = {} if before is None else before
    try:
        yield
    finally:
        _memory.results = before
        with _lock:
            _count -= 1
            if _count == 0:
                kind = import_module("torch.fx.experimental.sym_node").SymNode
                for name, original in _originals.items():
                    setattr(kind, name, original)
                _originals.clear()


@cache
def _environment() -> tuple[str, bool]:
    """Return the name under which assumptions count their changes, and whether torch remembers."""
    kind: Any = import_module("torch.fx.experimental.symbolic_shapes").ShapeEnv
    example = kind()
    # By these numbers torch knows how old what it remembers is; the second is of torch 2.11.
    counters = ("_replacements_version_counter", "_version_counter")
    counter = next(name for name in counters if hasattr(example, name))
    return counter, hasattr(example, "_symop_cache")


def _install() -> None:
    """Put methods that remember in the place of torch's."""
    module: Any = import_module("torch.fx.experimental.sym_node")
    kind = module.SymNode
    counter, remembers = _environment()
    version = attrgetter(counter)
    replaced = {"maybe_as_int": _remembering_int(kind.maybe_as_int, version)}
    if not remembers:
        proxy_mode = import_module("torch.fx.experimental.proxy_tensor").get_proxy_mode
        for name in _OPERATORS:
            original = getattr(kind, f"_{name}")
            replaced[f"_{name}"] = _remembering(module, name, original, version, proxy_mode)
    for name, method in replaced.items():
        _originals[name] = getattr(kind, name)
        setattr(kind, name, method)


def _results_of(environment: Any) -> dict[Any, Any]:
    """Return what this thread remembers under the assumptions of `environment`."""
    assert _memory.results is not None
    held = _memory.results.get(id(environment))
    if held is None:
        held = _memory.results[id(environment)] = (environment, {})
    return held[1]


def _remembering_int(original: Any, version: Callable[[Any], int]) -> Any:
    """Return a method in place of the one that tells whether a symbolic number is known.

    version: of the assumptions.
    """

    def maybe_as_int(self: Any) -> int | None:
        environment = self.shape_env
        if _memory.results is None or environment is None:
            known: int | None = original(self)
            return known
        results = _results_of(environment)
        key = (self._expr, version(environment))
        found = results.get(key, _MISSING)
        if found is _MISSING:
            found = results[key] = original(self)
        return found

    return maybe_as_int


def _remembering(
    module: Any,
    name: str,
    original: Any,
    version: Callable[[Any], int],
    proxy_mode: Callable[[], Any],
) -> Any:
    """Return a method of symbolic numbers that looks among the results before it computes one.

    module: torch's, of symbolic numbers. version: of the assumptions. proxy_mode: returns the
    tracer that wants to know of what is computed, if there is one.
    """
    kind, unknown, function = module.SymNode, module._NO_HINT, _OPERATORS[name]

    def compute(self: Any, other: Any) -> Any:
        environment = self.shape_env
        if (
            _memory.results is None
            or environment is None
            or type(other) is not kind
            or self.fx_node
            or type(self._hint) not in _PLAIN
            or type(other._hint) not in _PLAIN
            or proxy_mode()
        ):
            return original(self, other)
        results = _results_of(environment)
        kinds = (self.pytype, other.pytype)
        key = (name, self._expr, other._expr, kinds, version(environment))
        found = results.get(key)
        if found is None:
            result = original(self, other)
            results[key] = (result._expr, result.pytype, result._optimized_summation)
            return result
        expression, pytype, summed = found
        hint = unknown
        if self._hint is not None and other._hint is not None:
            hint = pytype(function(self._hint, other._hint))
        return kind(expression, environment, pytype, hint, optimized_summation=summed)

    return compute
