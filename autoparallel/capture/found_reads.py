"""The reads that a search for outer variables has found: settings, questions, names, absences."""

from __future__ import annotations

import abc
import contextvars
import inspect
import sys
import threading
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from autoparallel.capture.library_names import library_names
from autoparallel.capture.library_questions import (
    names_looked_up,
    questions_in,
    ways_in,
)
from autoparallel.capture.searched_values import (
    builtins_of,
    is_left_out,
    is_own_code,
    is_own_kind,
    is_setting,
)
from autoparallel.graph.attribute_read import (
    ABSENT,
    UNKNOWN,
    Answer,
    AttributeRead,
    Where,
    kept_of,
    name_of,
)
from autoparallel.graph.read_holders import (
    ClassParts,
    FunctionParts,
    GivenNames,
    Held,
    Namespace,
    ObjectKinds,
)
from autoparallel.support.object_state import functions_in

__all__ = ["CALLABLE", "FoundReads", "Root", "Way"]

# Where a way begins: a Python module, by its name, or an object; and the steps from there.
Root = str | Held
Way = tuple[tuple[str, Any], ...]

_LOCKS = (type(threading.Lock()),)
CALLABLE = (types.BuiltinFunctionType, types.MethodType, types.FunctionType)
_GRADIENTS = torch.is_grad_enabled


def start(root: Root, way: Way) -> Way:
    """Return a way with its beginning, as a read has it.

    >>> start("math", (("attribute", "pi"),))
    (('global', 'math'), ('attribute', 'pi'))
    """
    return (("global" if isinstance(root, str) else "cell", root), *way)


class FoundReads:
    """The reads of one search. Its attributes are told at VariableSearch, which fills them."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], AttributeRead] = {}
        self.seen: dict[tuple[int, type], types.FunctionType] = {}
        self.places: dict[type, str] = {}
        self.helpers: dict[type, bool] = {}
        self.instances: dict[int, Any] = {}
        self.moving: list[str] = []
        self.absent: frozenset[str] = frozenset()
        self.asks_gradients = self.asks_names = False

    def listed(self) -> tuple[AttributeRead, ...]:
        """Return the reads of what functions, classes and objects are, beside what they hold."""
        functions = {id(each): each for each in self.seen.values()}
        # Methods that a library writes, such as those of named tuples, are of no Python module.
        own = [
            each
            for each in functions.values()
            if is_own_code(str(each.__module__)) or each.__module__ not in sys.modules
        ]
        helpers = [kind for kind in self.helpers if is_own_kind(kind)]
        holders = (
            FunctionParts(own),
            ClassParts(helpers),
            ObjectKinds(self.instances.values()),
            GivenNames([*own, *helpers, *self.places] if self.asks_names else ()),
        )
        # A trace has calls of its own in the place of nn.Module's.
        owners = dict.fromkeys(owner for kind in self.places for owner in kind.__mro__)
        for owner in owners:
            if owner not in (nn.Module, object):
                read = AttributeRead(
                    "", (("cell", Namespace(owner)),), "__call__", Where.NAMED, UNKNOWN
                )
                self.found.setdefault((owner, "__call__", "method"), read)
        registers = [kind for kind in helpers if isinstance(kind, abc.ABCMeta)]
        if registers:  # an abstract class may be told of others that count as its children
            token = AttributeRead(
                "",
                (("cell", Answer(abc.get_cache_token)),),
                "abc.register()",
                Where.ENCLOSED,
                abc.get_cache_token(),
            )
            self.found.setdefault(("question", "abc"), token)
        return tuple(
            AttributeRead("", (("cell", each),), type(each).__name__, Where.LISTED, UNKNOWN)
            for each in holders
            if len(each)
        )

    def questions(self, function: types.FunctionType, code: types.CodeType) -> None:
        """Note what code asks libraries, and what it may look for and not find."""
        for question in questions_in(code, function.__globals__, is_left_out):
            if question.is_plain:
                self.found.setdefault(("question", question.text), question.read())
            else:
                self.moving.append(f"the answer of {question.text}")
        self.absent, variables = names_looked_up(code)
        module = str(function.__globals__.get("__name__"))
        for name in sorted(variables - function.__globals__.keys() - builtins_of(function).keys()):
            read = AttributeRead("", (("global", module),), name, Where.GLOBAL, ABSENT)
            self.found.setdefault((module, (), name), read)
        for kind, path in self.places.items():
            for owner in kind.__mro__ if self.absent else ():
                if owner is object:
                    continue
                for name in sorted(name for name in self.absent if not hasattr(kind, name)):
                    route = (("class", name_of(owner)),)
                    read = AttributeRead(path, route, name, Where.INSTANCE, ABSENT)
                    self.found.setdefault((owner, name), read)

    def libraries(self, function: types.FunctionType, code: types.CodeType) -> None:
        """Note the names by which code comes to functions of libraries."""
        for read in library_names(code, function.__globals__):
            self.found.setdefault((*read.route[0], read.name, "named"), read)
        for root, steps in ways_in(code):
            names = [name for kind, name in steps if kind == "attribute"]
            if function.__globals__.get(root) is torch and names[:1] == ["_C"]:
                self.asks_gradients = self.asks_gradients or names[-1] == _GRADIENTS.__name__

    def replaceable(self, root: Root, way: Way, name: Any, value: Any, where: Where) -> None:
        """Note a function of the user's own, in whose place another one may be put.

        root, way, name, value: see `read`. where: it is an attribute, or an item of a dict.
        """
        if is_own_code(value.__module__ or ""):
            read = AttributeRead("", start(root, way), name, where, kept_of(value))
            self.found.setdefault((root, way, name), read)

    def missing(self, root: Root, way: Way, value: Any) -> None:
        """Note the attributes that an object does not have, and that the code may look for.

        root, way: see `inside`.
        """
        if isinstance(value, CALLABLE) or not hasattr(value, "__dict__"):
            return
        route = start(root, way)
        for name in sorted(name for name in self.absent if not hasattr(type(value), name)):
            if name not in vars(value) and not (isinstance(value, type) and hasattr(value, name)):
                read = AttributeRead("", route, name, Where.GLOBAL, ABSENT)
                self.found.setdefault((root, way, name), read)
                # A class may get it, too.
                for owner in filter(is_own_kind, type(value).__mro__):
                    route_of_class = (("cell", Namespace(owner)),)
                    read = AttributeRead("", route_of_class, name, Where.NAMED, UNKNOWN)
                    self.found.setdefault((owner, name, "missing"), read)

    def inherited(self, root: Root, way: Way, value: Any, names: Iterable[str]) -> None:
        """Note the attributes that an object takes from a class, in whose place it, or a class that
        comes first, may get its own.

        root, way: see `inside`. names: those in the code.
        """
        kind = value if isinstance(value, type) else type(value)
        places = [] if value is kind else [(way, getattr(value, "__dict__", None))]
        places += [((*way, ("class", name_of(each))), vars(each)) for each in kind.__mro__]
        own_kind = is_own_kind(kind)
        for name in names:
            held = inspect.getattr_static(kind, name, ABSENT)
            # What has a `__set__`, as a property does, comes before an object's own.
            if name.startswith("__") or held is ABSENT or hasattr(type(held), "__set__"):
                continue
            # Nobody puts others in the place of a library's methods.
            if not own_kind and any(functions_in(held)):
                continue
            for place, own in places:
                if own is not None and name in own:
                    break
                if own is not None:
                    read = AttributeRead("", start(root, place), name, Where.GLOBAL, ABSENT)
                    self.found.setdefault((root, place, name), read)

    def asked(self, variable: contextvars.ContextVar[Any]) -> None:
        """Note a context variable."""
        try:
            value = variable.get()  # an argument would stand before the variable's own default
        except LookupError:
            value = ABSENT
        route = (("cell", Answer(variable.get)),)
        read = AttributeRead("", route, variable.name, Where.ENCLOSED, kept_of(value))
        self.found.setdefault((id(variable),), read)

    def read(self, root: Root, way: Way, name: str, value: Any, slot: bool = False) -> bool:
        """Note a read, where the value is a setting; return whether it is.

        root, way: see `inside`; of the object that has the attribute. slot: it has it in a slot.
        """
        if isinstance(value, contextvars.ContextVar):
            self.asked(value)
            return True
        if isinstance(value, _LOCKS):
            answer = AttributeRead(
                "", (("cell", Answer(value.locked)),), name, Where.ENCLOSED, value.locked()
            )
            self.found.setdefault(("question", id(value)), answer)
        if name.startswith("__") or not is_setting(value):
            return False
        route = start(root, way)
        self.found.setdefault(
            (root, way, name),
            AttributeRead("", route, name, Where.ASKED if slot else Where.GLOBAL, kept_of(value)),
        )
        return True

    def refers(self, root: Root, way: Way, name: str, slot: bool = False) -> None:
        """Note that a variable, or an attribute, refers to the object that it does now.

        root, way, slot: see `read`.
        """
        where = Where.ASKED if slot else Where.NAMED
        read = AttributeRead("", start(root, way), name, where, UNKNOWN)
        self.found.setdefault((root, way, name), read)

    def any_of(self, root: Root, way: Way, own: dict[str, Any]) -> None:
        """Note all variables of a module: code may put together the name of one when it runs.

        root, way: see `inside`. own: the variables. What an object holds is not looked at.
        """
        for name, value in list(own.items()):
            if not name.startswith("__") and not self.read(root, way, name, value):
                self.refers(root, way, name)
