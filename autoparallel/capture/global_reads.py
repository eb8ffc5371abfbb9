"""Global variables that a forward may read: found in the code of the functions that it may call.

Variables of a function around are found likewise. A read of either cannot be watched as one of an
attribute can. What a function may read
is written in its code, so that this finds a little more than is read: a program is then made anew
where it need not be, and never kept where it must not.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from autoparallel.graph.attribute_read import SIMPLE, UNKNOWN, AttributeRead, Cell, Where
from autoparallel.support.model_snapshot import untouched
from autoparallel.support.one_at_a_time import planning

__all__ = ["OuterVariables", "global_reads", "undisturbed"]

# Packages whose own settings are not looked at; the standard library is none either.
_LEFT_OUT = {"torch", "numpy", "einops", "autoparallel", *sys.stdlib_module_names} - {"__main__"}
# Containers to which code writes, whatever is in them.
_WRITTEN = (list, dict, set, collections.deque, bytearray, types.SimpleNamespace)
# Containers with more items than this are tables, not settings.
_MOST_ITEMS = 32


def global_reads(model: nn.Module) -> tuple[AttributeRead, ...]:
    """Return the global and enclosed variables that forwards in a model may read, as they are.

    Numbers, texts and the like count, small containers of them, and those that a module, a class or
    an object has to which a global variable refers. Functions are followed inside of the package
    that the model's class is from.

    >>> import autoparallel.capture.global_reads as here
    >>> class Limited(nn.Module):
    ...     def forward(self, x):
    ...         return x.clamp(max=here._MOST_ITEMS)
    >>> [(read.name, read.value) for read in global_reads(Limited())]
    []
    """
    return _walked(model).reads()


class OuterVariables:
    """The objects outside of a model to which its forwards may write, and functions that remember.

    model: the one whose code is searched. objects: containers and plain objects in global and
    enclosed variables, by the variables' names. caches: functions under functools.lru_cache.

    >>> OuterVariables(nn.Linear(2, 2)).objects
    {}
    """

    def __init__(self, model: nn.Module) -> None:
        walk = _walked(model)
        walk.reads()
        self.objects, self.caches = walk.objects, walk.caches

    @contextlib.contextmanager
    def forgotten(self) -> Iterator[None]:
        """Have functions forget what they have remembered within: it may be tensors of a trace."""
        before = [cache.cache_info().misses for cache in self.caches]
        try:
            yield
        finally:
            for cache, misses in zip(self.caches, before, strict=True):
                if cache.cache_info().misses != misses:
                    cache.cache_clear()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """At the end the model, and variables outside of it that its code may write to, are as before.

    Other threads that come here wait until then: they would take a variable for theirs that is
    about to be put back.

    >>> layer = nn.Linear(2, 2)
    >>> with undisturbed(layer):
    ...     layer.calls = 1
    >>> hasattr(layer, "calls")
    False
    """
    with planning.held():
        outer = OuterVariables(model)
        with untouched(model, *outer.objects.values()), outer.forgotten():
            yield


def _walked(model: nn.Module) -> _Walk:
    """Return a search that is to begin at the forwards of a model."""
    walk = _Walk()
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        walk.method(kind, "forward")
    for module in model.modules():
        walk.value(vars(module).get("forward"), type(module))
    return walk


class _Walk:
    """The search from function to function.

    found: the reads, by the name of the Python module and the names from there. seen: the functions
    that were met, each with the class whose method it is: decorators make many of one code. todo:
    those of them that are still to be looked at. objects, caches: see OuterVariables.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], AttributeRead] = {}
        self.seen: dict[tuple[int, type], types.FunctionType] = {}
        self.todo: list[tuple[types.FunctionType, type]] = []
        self.objects: dict[str, Any] = {}
        self.caches: list[Any] = []

    def reads(self) -> tuple[AttributeRead, ...]:
        """Look at all functions that are to be looked at, and return what they may read."""
        while self.todo:
            self.look(*self.todo.pop())
        return tuple(self.found.values())

    def method(self, kind: type, name: str) -> None:
        """Take up a method of a class, wherever it inherits it from."""
        for owner in kind.__mro__:
            if name in vars(owner):
                if not _left_out(owner.__module__):
                    self.value(vars(owner)[name], kind)
                return

    def value(self, value: Any, kind: type) -> None:
        """Take up the functions in a value, which is an attribute of a class, say.

        kind: the class of which they are methods.
        """
        for function in _functions(value):
            if (id(function), kind) not in self.seen:
                self.seen[id(function), kind] = function
                self.todo.append((function, kind))

    def look(self, function: types.FunctionType, kind: type) -> None:
        """Look at the code of a function, and at the functions that are written in it."""
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            self.enclosed(name, cell, kind)
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
            for name in code.co_names:
                if name in function.__globals__:
                    self.variable(function, name, code.co_names, kind)
                # It may be a method that is called on self.
                elif name != "forward":
                    self.method(kind, name)

    def enclosed(self, name: str, cell: types.CellType, kind: type) -> None:
        """Look at a variable of a function around, by its name and its cell."""
        try:
            value = cell.cell_contents
        except ValueError:  # it has no value yet
            return
        self.value(value, kind)
        self.keep(name, value)
        if isinstance(value, SIMPLE) or _is_small(value):
            kept = value if isinstance(value, SIMPLE) else UNKNOWN
            read = AttributeRead("", (("cell", Cell(cell)),), name, Where.ENCLOSED, kept)
            self.found.setdefault((id(cell),), read)

    def variable(
        self, function: types.FunctionType, name: str, names: tuple[str, ...], kind: type
    ) -> None:
        """Look at a global variable that a function reads. names: all that its code has."""
        value, module = function.__globals__[name], str(function.__globals__.get("__name__"))
        self.keep(name, value)
        if isinstance(value, types.FunctionType):
            package = function.__module__.partition(".")[0]
            if (value.__module__ or "").partition(".")[0] == package:
                self.value(value, kind)
        elif not self.read(module, (), name, value):
            # The attributes of what it refers to, as far as the code has their names.
            home = value.__name__ if isinstance(value, types.ModuleType) else type(value).__module__
            home = value.__module__ if isinstance(value, type) else home
            if not isinstance(value, nn.Module) and not _left_out(home):
                own = getattr(value, "__dict__", {})
                for inner in names:
                    if inner in own and not inner.startswith("__"):
                        self.read(module, (name,), inner, own[inner])

    def keep(self, name: str, value: Any) -> None:
        """Keep what a variable refers to, where code may write to it."""
        if isinstance(value, functools._lru_cache_wrapper):
            if not _left_out(value.__module__) and all(value is not one for one in self.caches):
                self.caches.append(value)
        elif isinstance(value, _WRITTEN) or (
            hasattr(value, "__dict__")
            and not isinstance(value, (type, types.ModuleType, types.FunctionType, nn.Module))
            and not _left_out(type(value).__module__)
        ):
            self.objects.setdefault(name, value)

    def read(self, module: str, way: tuple[str, ...], name: str, value: Any) -> bool:
        """Note a read, where the value is a setting; return whether it is.

        module: the name of the Python module. way: the global variable to whose value the attribute
        belongs, if it is one.
        """
        simple = isinstance(value, SIMPLE)
        if name.startswith("__") or not (simple or _is_small(value)):
            return False
        route = (("global", module), *(("attribute", step) for step in way))
        kept = value if simple else UNKNOWN
        self.found.setdefault(
            (module, way, name), AttributeRead("", route, name, Where.GLOBAL, kept)
        )
        return True


def _left_out(module: str | None) -> bool:
    """Return whether a Python module is of a package whose settings are not looked at."""
    return (module or "builtins").partition(".")[0] in _LEFT_OUT


def _is_small(value: Any) -> bool:
    """Return whether a value is a small container of simple values."""
    if not isinstance(value, (list, tuple, dict)) or len(value) > _MOST_ITEMS:
        return False
    items = value.values() if isinstance(value, dict) else value
    return all(isinstance(item, SIMPLE) or _is_small(item) for item in items)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Yield the Python functions in a value: a method, a property, or one under decorators."""
    depth = 0
    while value is not None and depth < 10:
        depth += 1
        if isinstance(value, property):
            yield from _functions(value.fget)
            return
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, types.FunctionType):
            yield value
            # A decorated function keeps the one that it decorates.
            value = getattr(value, "__wrapped__", None)
        else:
            return
