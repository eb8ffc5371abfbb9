"""A record of the plain attributes that a forward reads while it is traced.

A trace has the values of that moment for ever: a temperature, a flag of a config, a method that
was put on an object. A program is right for a call only while all that was read is what it was.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from autoparallel.capture.equal_blocks import Group
from autoparallel.capture.module_tensors import MODULE_ATTRIBUTES
from autoparallel.errors import CaptureError
from autoparallel.graph.attribute_read import ABSENT, SIMPLE, UNKNOWN, AttributeRead, Where, kept_of
from autoparallel.support.bare_values import plain_items
from autoparallel.support.made_classes import is_made_class
from autoparallel.support.module_paths import join_path
from autoparallel.support.object_state import is_closed, moves_on, own_attributes, random_state
from autoparallel.support.pytree import SYMBOLIC

__all__ = ["AttributeReads", "alike_reads", "moving_error"]

_DEEPEST = 4  # containers and objects inside of others that are looked into
# Objects whose attributes are no settings of a model.
_OPAQUE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    torch.Tensor,
    torch.Generator,
    threading.local,
)


class AttributeReads:
    """Records which attributes of modules, and of the objects that these keep, are read.

    model: the one that is to be traced. Its classes are watched within `installed`, and only reads
    of the thread that is in there count.

    >>> class Scaled(nn.Module):
    ...     scale, unread = 2.0, 1
    ...     def forward(self, x):
    ...         return x * self.scale
    >>> model, reads = Scaled(), AttributeReads()
    >>> with reads.installed(model):
    ...     _ = model.forward(torch.ones(2))
    >>> [(read.name, read.value) for read in reads.collected]
    [('forward', UNKNOWN), ('scale', 2.0)]
    """

    def __init__(self) -> None:
        self.objects: dict[int, tuple[Any, str, tuple[tuple[str, Any], ...]]] = {}
        self.known: dict[tuple[int, str], AttributeRead] = {}
        self.moving: list[str] = []
        # What the forward that runs now has set itself: by object, and name.
        self.set: set[tuple[int, str]] = set()
        # Of classes that are watched from when an object of theirs was met on.
        self.watched: contextlib.ExitStack | None = None

    @property
    def collected(self) -> tuple[AttributeRead, ...]:
        """All that has been read, in the order of the first reads."""
        return tuple(self.known.values())

    @contextlib.contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Record what this thread reads within; in the end all classes are what they were."""
        for path, module in model.named_modules():
            self.objects.setdefault(id(module), (module, path, ()))
        for path, module in model.named_modules():
            for name, value in list(vars(module).items()):
                if name not in MODULE_ATTRIBUTES:
                    self.look(value, path, (("attribute", name),))
        kinds = dict.fromkeys(type(item) for item, _, _ in self.objects.values())
        self.set.clear()
        with _watched(kinds), contextlib.ExitStack() as self.watched:
            before, _current.reads = getattr(_current, "reads", None), self
            try:
                yield
            finally:
                _current.reads = before
                self.watched = None

    def look(
        self, value: Any, path: str, route: tuple[tuple[str, Any], ...], depth: int = 1
    ) -> None:
        """Note the plain objects in the value of an attribute, and the way to each.

        path: of the module that has it. route: the steps from there to the value. depth: how many
        of these are looked at in advance. What lies deeper is, when its owner is read.
        """
        if isinstance(value, SIMPLE) or depth > _DEEPEST or id(value) in self.objects:
            return
        contains = isinstance(value, (dict, list, tuple))
        if isinstance(value, dict):
            for key, item in plain_items(value):
                self.look(item, path, (*route, ("item", key)), depth + 1)
        elif contains:
            for index, item in enumerate(plain_items(value)):
                self.look(item, path, (*route, ("item", index)), depth + 1)
        # Containers of a class of the user's may have attributes as well.
        if contains and not hasattr(value, "__dict__"):
            return
        if not isinstance(value, (nn.Module, *_OPAQUE)) and _plain(type(value)):
            self.objects[id(value)] = (value, path, route)
            if self.watched is not None:
                self.watched.enter_context(_watched((type(value),)))
            for name, item in own_attributes(value).items():
                self.look(item, path, (*route, ("attribute", name)), depth + 1)

    def note_names(self, instance: Any) -> None:
        """Note that all attributes of an object are about to be read, and their names."""
        key = (id(instance), "__dict__")
        if key in self.known or id(instance) not in self.objects:
            return
        _, path, route = self.objects[id(instance)]
        self.known[key] = AttributeRead(path, route, "__dict__", Where.NAMES, UNKNOWN)
        for name in list(_own(instance)):
            self.note(instance, name)

    def note(self, instance: Any, name: str) -> None:
        """Note that an attribute is about to be read."""
        key = (id(instance), name)
        if key in self.known or id(instance) not in self.objects or name.startswith("__"):
            return
        item, path, route = self.objects[id(instance)]
        if item is not instance:
            return
        own, module = _own(instance), isinstance(instance, nn.Module)
        if module and (name in MODULE_ATTRIBUTES or _is_registered(own, name)):
            return
        value: Any = ABSENT
        if name in own:
            where, value = Where.INSTANCE, own[name]
            if key in self.set and isinstance(value, (*SIMPLE, *SYMBOLIC)):
                return  # whatever it was before
            if key not in self.set:
                self.look(value, path, (*route, ("attribute", name)))
        elif any(name in vars(kind) for kind in type(instance).__mro__):
            where = Where.CLASS
            owner = next(kind for kind in type(instance).__mro__ if name in vars(kind))
            value = vars(owner)[name]
            if owner is nn.Module and not isinstance(value, SIMPLE):
                return  # torch's own methods
            if hasattr(type(value), "__set__") and not isinstance(value, property):
                where = Where.ASKED  # a slot: the value is in the object
                value = object.__getattribute__(instance, name)
        else:
            # A module finds it elsewhere, in objects that are watched themselves.
            where = Where.INSTANCE if module else Where.ASKED
        kind_name = _moves_on(value) if where is not Where.CLASS else ""
        if kind_name:
            self.moving.append(f"{join_path(path, name)} (a {kind_name})")
            raise moving_error(self.moving)
        if where is Where.ASKED and not module:
            value = UNKNOWN
        self.known[key] = AttributeRead(path, route, name, where, kept_of(value))


def _moves_on(value: Any, depth: int = 0) -> str:
    """Return the name of the type of what gives something else each time it is asked, if any.

    Such an object may be in a container.
    """
    numpy = type(value).__module__.startswith("numpy.random")
    iterates = hasattr(type(value), "__next__") or moves_on(value)
    if numpy or random_state(value) is not None or iterates or is_closed(value):
        return type(value).__name__
    parts: Iterable[Any] = ()
    if depth < _DEEPEST and isinstance(value, (list, tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
    return next(filter(None, (_moves_on(part, depth + 1) for part in parts)), "")


class _Attributes(MutableMapping[str, Any]):
    """The `__dict__` of a watched object as the forward is given it: reads in it are noted."""

    def __init__(self, instance: Any, own: dict[str, Any], reads: AttributeReads) -> None:
        self.instance, self.own, self.reads = instance, own, reads

    def __getitem__(self, name: str) -> Any:
        self.reads.note(self.instance, name)
        if isinstance(getattr(type(self.instance), name, None), property):
            return getattr(self.instance, name)  # another watch has put it there
        return self.own[name]

    def __contains__(self, name: object) -> bool:
        self.reads.note(self.instance, str(name))
        return name in self.own

    def __setitem__(self, name: str, value: Any) -> None:
        self.own[name] = value

    def __delitem__(self, name: str) -> None:
        del self.own[name]

    def __iter__(self) -> Iterator[str]:
        self.reads.note_names(self.instance)
        return iter(list(self.own))

    def __len__(self) -> int:
        self.reads.note_names(self.instance)
        return len(self.own)

    def __or__(self, other: Any) -> dict[str, Any]:
        return {**self, **other}

    def __ror__(self, other: Any) -> dict[str, Any]:
        return {**other, **self}

    def copy(self) -> dict[str, Any]:
        """Return a dictionary of its own, as that of a dict does."""
        return dict(self)


def _own(instance: Any) -> dict[str, Any]:
    """Return the dictionary of an instance, past the classes' own ways to read attributes."""
    try:
        own = object.__getattribute__(instance, "__dict__")
    except AttributeError:
        return {}
    return own if isinstance(own, dict) else {}


def _is_registered(own: dict[str, Any], name: str) -> bool:
    """Return whether a module has a parameter, a buffer or a module of this name."""
    return any(name in own.get(kind, ()) for kind in ("_parameters", "_buffers", "_modules"))


def _plain(kind: type) -> bool:
    """Return whether a class is written in Python, so that reads of its instances can be seen."""
    return is_made_class(kind) and not issubclass(kind, BaseException)


class _Current(threading.local):
    """The record that reads of this thread go to, None where nothing is recorded."""

    reads: AttributeReads | None = None


_current = _Current()
_lock = threading.Lock()
# How many records watch each class, and what reading an attribute was before: several threads may
# trace at the same time.
_counts: dict[type, int] = {}
_NONE: Any = object()


@contextlib.contextmanager
def _watched(kinds: Iterable[type]) -> Iterator[None]:
    """Have reads of the instances' attributes reported within, for classes that allow it."""
    watched: list[type] = []
    try:
        with _lock:
            for kind in kinds:
                if _watch(kind):
                    watched.append(kind)
        yield
    finally:
        with _lock:
            for kind in watched:
                _counts[kind] -= 1
                if not _counts[kind]:
                    del _counts[kind]
                    for name, before in _befores.pop(kind).items():
                        if before is _NONE:
                            delattr(kind, name)
                        else:
                            setattr(kind, name, before)


_befores: dict[type, dict[str, Any]] = {}


def _watch(kind: type) -> bool:
    """Watch one class, and return whether it allows that."""
    if kind in _counts:
        _counts[kind] += 1
        return True
    befores = {name: vars(kind).get(name, _NONE) for name in ("__getattribute__", "__setattr__")}
    # By the class each time: the one that it inherits from may be watched or let go meanwhile.
    original, writes = (None if before is _NONE else before for before in befores.values())
    parent: Any = super

    def read(instance: Any, name: str) -> Any:
        reads = _current.reads
        if reads is not None:
            reads.note(instance, name)
        if original is not None:
            value = original(instance, name)
        else:
            value = parent(kind, instance).__getattribute__(name)
        if name == "__dict__" and reads is not None and id(instance) in reads.objects:
            return _shown(instance, value, reads)
        return value

    def write(instance: Any, name: str, value: Any) -> None:
        reads = _current.reads
        if writes is not None:
            writes(instance, name, value)
        else:
            parent(kind, instance).__setattr__(name, value)
        if reads is not None:
            reads.set.add((id(instance), name))

    try:
        kind.__getattribute__ = read  # type: ignore[method-assign, assignment]
        kind.__setattr__ = write  # type: ignore[method-assign, assignment]
    except (TypeError, AttributeError):
        return False
    _befores[kind], _counts[kind] = befores, 1
    return True


def _shown(instance: Any, own: Any, reads: AttributeReads) -> Any:
    """Return the dictionary of an object as who asks for it may have it.

    A library that copies objects needs the dictionary itself, and may read all of it; torch and
    this project ask for purposes of their own.
    """
    frame = sys._getframe(2)
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if package == "torch" and frame.f_code is nn.Module.__dir__.__code__:
        reads.note_names(instance)
    if package in ("torch", "autoparallel") or not isinstance(own, dict):
        return own
    if package in sys.stdlib_module_names and package != "__main__":
        reads.note_names(instance)
        return own
    return _Attributes(instance, own, reads)


def moving_error(names: Sequence[str]) -> CaptureError:
    """Return the error for a forward that reads what gives something else each time.

    names: of the attributes, each with the kind of object.
    """
    return CaptureError(
        f"the forward reads {', '.join(dict.fromkeys(names))}",
        why="it gives something else at each call, and a graph does the same at every call",
        fix="pass what it gives as an argument, or keep it in a module that is not traced",
    )


def alike_reads(
    reads: Sequence[AttributeRead], groups: Sequence[Group], hidden: Iterable[str]
) -> tuple[AttributeRead, ...]:
    """Return the reads with those that hidden blocks would have made, had they been traced.

    groups: of equal blocks. hidden: paths of those that a traced one stands for. They read what
    their equals read, of which the values are equal.
    """
    result = dict.fromkeys(reads)
    concealed = set(hidden)
    for group in groups:
        others = [path for path, _ in group.members if path in concealed]
        for shown in (path for path, _ in group.members if path not in concealed):
            for read in reads:
                if read.path == shown or read.path.startswith(f"{shown}."):
                    inner = read.path[len(shown) :].removeprefix(".")
                    result.update(
                        dict.fromkeys(read.at(join_path(other, inner)) for other in others)
                    )
    return tuple(result)
