"""Values that code may come to: functions that it may call, objects, and the classes of these."""

from __future__ import annotations

import argparse
import collections
import contextvars
import functools
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from autoparallel.capture.found_reads import CALLABLE, FoundReads, Root, Way
from autoparallel.capture.library_questions import asked_by_identity
from autoparallel.capture.searched_values import (
    codes_in,
    has_own,
    is_home_left_out,
    is_left_out,
    is_own_code,
    is_own_kind,
    name_of_function,
    names_in_methods,
    own_kinds_of,
    words_of,
)
from autoparallel.graph.attribute_read import (
    SIMPLE,
    UNKNOWN,
    AttributeRead,
    Contents,
    Where,
    name_of,
)
from autoparallel.graph.read_holders import Held, Items, Namespace
from autoparallel.support.bare_values import plain_contents, plain_items
from autoparallel.support.made_classes import is_made_class
from autoparallel.support.object_state import (
    bytes_of,
    caches_in,
    functions_in,
    is_bound,
    is_closed,
    moves_on,
    own_attributes,
    plain_attribute,
    random_state,
    special_methods,
)
from autoparallel.support.replaced_functions import is_of_another

__all__ = ["ValueSearch"]

# Containers to which code writes, whatever is in them.
_WRITTEN = (
    *(list, dict, set, collections.deque, bytearray),
    *(types.SimpleNamespace, argparse.Namespace),
)
_GRADIENTS = torch.is_grad_enabled
_MOST_BYTES = 1 << 20  # of an object whose memory is compared at each call
# Steps into objects whose attributes are looked at: in the user's own code, and in libraries, of
# which the parts refer to one another in many ways. Those into a container count twice: it is
# looked at as a whole, and an object only as far as the code has the names of what it holds.
_DEEPEST, _DEEPEST_OF_LIBRARIES = 12, 4
_MOST = 2000  # looks into objects; the user's own code may be as large as a library's


class ValueSearch(FoundReads):
    """The part of a search that takes up values. Its attributes are told at VariableSearch."""

    def __init__(self) -> None:
        super().__init__()
        self.todo: list[tuple[types.FunctionType, type]] = []
        self.objects: dict[str, Any] = {}
        self.caches: list[Any] = []
        self.kept: list[Any] = []
        self.names: dict[str, None] = {}
        self.entered: dict[tuple[Any, ...], Any] = {}
        self.kinds: dict[type, None] = {}
        self.opened: dict[int, Any] = {}
        self.looks_up = self.helping = False
        self.classes: list[tuple[type, bool]] = []

    def method(self, kind: type, name: str, above: bool = False) -> None:
        """Take up a method of a class, wherever it inherits it from.

        above: and those that it overrides, which `super()` calls.
        """
        for owner in kind.__mro__:
            if name in vars(owner):
                put_in = is_of_another(vars(owner)[name])  # by a program, in a class of torch's
                if put_in or not is_left_out(owner.__module__):
                    self.value(vars(owner)[name], kind)
                    self.help(vars(owner)[name])  # a descriptor
                    called = any(True for _ in functions_in(vars(owner)[name]))
                    if called and kind in self.helpers and is_own_kind(owner):
                        # A module's own methods are noted when they are read.
                        read = AttributeRead(
                            "", (("cell", Namespace(owner)),), name, Where.NAMED, UNKNOWN
                        )
                        self.found.setdefault((owner, name, "method"), read)
                if not above:
                    return

    def value(self, value: Any, kind: type) -> None:
        """Take up the functions in a value, which is an attribute of a class, say.

        kind: the class of which they are methods.
        """
        self.cached(value)
        for function in functions_in(value):
            if (id(function), kind) not in self.seen:
                self.seen[id(function), kind] = function
                self.todo.append((function, kind))

    def attribute(self, value: Any, kind: type) -> None:
        """Take up what an attribute of a module may call. kind: the module's class."""
        contains = isinstance(value, (list, tuple, dict))
        for item in plain_contents(value) if contains else (value,):
            self.cached(item)
            for function in functions_in(item):
                if not is_left_out(function.__module__):
                    self.value(function, kind)
            if isinstance(item, CALLABLE):
                self.kept.append(item)
            self.help(item)
            self.handed(item, kind)
        self.classes_in(value)

    def classes_in(self, value: Any, depth: int = 0) -> None:
        """Note the user's classes in a value, such as one that is a configuration by itself."""
        if isinstance(value, type):
            if is_own_kind(value):
                self.kinds[value] = None
        elif depth < _DEEPEST_OF_LIBRARIES and id(value) not in self.opened:
            items: Iterable[Any] = ()
            if isinstance(value, (list, tuple, dict)):
                items = plain_contents(value)[: Contents.MOST]
            elif is_own_kind(type(value)) and not isinstance(value, (nn.Module, torch.Tensor)):
                items = own_attributes(value).values()
            # Not by a call for each number: there may be very many.
            items = [item for item in items if not isinstance(item, SIMPLE)]
            if items and len(self.opened) < _MOST:
                self.opened[id(value)] = value
                for item in items:
                    self.classes_in(item, depth + 1)

    def help(self, value: Any) -> None:
        """Note the class of an object of the user's that code may call, or a class that it has."""
        function = value.func if isinstance(value, functools.partial) else value
        self.asks_gradients = self.asks_gradients or function is _GRADIENTS
        for question in asked_by_identity(name_of_function(function), value, is_left_out):
            self.found.setdefault(("question", id(function)), question.read())
        if is_bound(value) and isinstance(value.__self__, contextvars.ContextVar):
            self.asked(value.__self__)
        if isinstance(value, type):
            self.help_class(value, made=True)
            if type(value) is not type:
                self.help_class(type(value), made=False)
        else:
            self.help_class(type(value), made=False)

    def help_class(self, kind: type, made: bool) -> None:
        """Note a class of objects that code may call. made: it may make an object, too."""
        known = not made and (kind in self.helpers or kind in self.places)
        known = known or self.helpers.get(kind, False)
        if is_made_class(kind) and not known and not is_left_out(kind.__module__):
            self.helpers[kind] = made
            if is_own_kind(kind):
                self.classes.append((kind, made))
        # One class leads to others: not by a call in a call, as there may be very many.
        while self.classes and not self.helping:
            self.helping = True
            kind, made = self.classes.pop()
            special = [special_methods(owner, made) for owner in kind.__mro__]
            for name in dict.fromkeys((*self.names, *sorted(frozenset().union(*special)))):
                self.method(kind, name)
            self.helping = False

    def function(self, function: types.FunctionType, value: Any, kind: type) -> bool:
        """Take up a function that another one may call; return whether it is one."""
        if isinstance(value, functools._lru_cache_wrapper):
            value = value.__wrapped__
        if not isinstance(value, types.FunctionType):
            return False
        home, package = value.__module__ or "", function.__module__.partition(".")[0]
        if home.partition(".")[0] == package or is_own_code(home):
            self.value(value, kind)
            return not has_own(value)
        return True

    def held(self, value: Any, function: types.FunctionType, kind: type) -> None:
        """Look at an object that a function is given, or has, past all names."""
        own_code = is_own_code(str(function.__globals__.get("__name__")))
        if not own_code or isinstance(value, (*SIMPLE, torch.Tensor)):
            return
        if not self.function(function, value, kind):
            codes = codes_in(function.__code__)
            words = tuple(dict.fromkeys(word for each in codes for word in words_of(each)))
            self.inside(function, Held(value), (), value, words, kind)

    def handed(self, value: Any, kind: type) -> None:
        """Look at the objects that a method or a partial function hands to its function."""
        given: tuple[Any, ...] = ()
        if isinstance(value, types.MethodType):
            given = (value.__self__,)
        elif isinstance(value, functools.partial):
            given = (*value.args, *value.keywords.values())
            self.handed(value.func, kind)
        for function in functions_in(value) if given else ():
            for item in given:
                self.held(item, function, kind)

    def inside(
        self,
        function: types.FunctionType,
        root: Root,
        way: Way,
        value: Any,
        names: tuple[str, ...],
        kind: type,
    ) -> None:
        """Look at the attributes of an object, as far as the code has their names.

        way: the steps to the object, as in AttributeRead, from the Python module of the name
        `root`, or from the object that it holds.
        """
        own_code = is_own_code(str(function.__globals__.get("__name__")))
        own_code = own_code and len(self.entered) < _MOST
        key = (id(value), names, self.looks_up)
        if own_code and key in self.entered:
            return
        if own_code:
            self.entered[key] = value
        steps: list[tuple[str, Any, Any]] = []
        contains = isinstance(value, (list, tuple, dict))
        if contains:
            inside = plain_items(value)
            pairs = inside if isinstance(value, dict) else list(enumerate(inside))
            steps = [("item", key, item) for key, item in pairs[: Contents.MOST]]
            if own_code and len(steps) == len(inside) and not isinstance(value, tuple):
                items = AttributeRead("", (("cell", Items(value)),), "items", Where.LISTED, UNKNOWN)
                self.found.setdefault((id(value), "items"), items)
        elif isinstance(value, nn.Module) or is_home_left_out(value):
            return
        # A container of a class of the user's has attributes as well.
        if not contains or (hasattr(value, "__dict__") and is_own_kind(type(value))):
            own = getattr(value, "__dict__", None) or own_attributes(value)
            # Methods may be called, by name or not, and read what the object has.
            of: Any = value if isinstance(value, type) else type(value)
            names = (*names, *names_in_methods(of))
            above = own_kinds_of(value) if isinstance(value, type) and own_code else []
            for each in above[:1]:
                names = (*names, *names_in_methods(each))
            for each in above:
                self.inside(function, Held(each), (), each, names, kind)
            if not isinstance(value, (types.ModuleType, type)) and is_own_kind(of):
                self.instances[id(value)] = value
            module = isinstance(value, types.ModuleType)
            by_user = is_own_code(value.__name__) if module else is_own_kind(of)
            if self.looks_up and by_user:
                self.any_of(root, way, own)
            if module and by_user:
                self.value(own.get("__getattr__"), kind)  # asked for what is not there
            # What the way has passed already leads round in a circle, as a rule.
            passed = set() if own_code else {step for _, step in way}
            here = [name for name in dict.fromkeys(names) if name in own and name not in passed]
            steps += [("attribute", name, own[name]) for name in here if not name.startswith("__")]
            self.missing(root, way, value)
            classed = not isinstance(value, types.ModuleType) and "class" not in dict(way[-1:])
            if own_code and classed:
                self.inherited(root, way, value, names)
                for owner in of.__mro__:
                    if owner is not value and not is_left_out(owner.__module__):
                        inner = (*way, ("class", name_of(owner)))
                        self.inside(function, root, inner, owner, names, kind)
        depth = len(way) + [step for step, _ in way].count("item") * own_code
        deepest = _DEEPEST if own_code else _DEEPEST_OF_LIBRARIES
        for step, key, item in steps if depth <= deepest else ():
            inner = (*way, (step, key))
            if way or not isinstance(value, types.ModuleType):
                self.keep(".".join(str(part) for _, part in inner), item)
            # The contents of a small container are compared with the container.
            whole = step == "item" and isinstance(item, SIMPLE)
            if whole:
                continue
            if self.function(function, item, kind):
                if step == "attribute" or isinstance(value, dict):
                    place = Where.GLOBAL if step == "attribute" else Where.ENCLOSED
                    self.replaceable(root, way, key, item, place)
                continue
            slot = not hasattr(value, "__dict__")
            if step == "item" or not self.read(root, way, str(key), item, slot):
                if step == "attribute" and own_code:
                    self.refers(root, way, str(key), slot)
                self.inside(function, root, inner, item, names, kind)

    def keep(self, name: str, value: Any) -> None:
        """Keep what a variable refers to, where code may write to it."""
        self.help(value)
        self.cached(value)
        if isinstance(value, functools._lru_cache_wrapper):
            return
        if moves_on(value) or is_closed(value) or len(bytes_of(value) or b"") > _MOST_BYTES:
            self.moving.append(f"the variable {name} (a {type(value).__name__})")
        elif (
            isinstance(value, _WRITTEN)
            or random_state(value) is not None
            or (
                getattr(type(value), "__slots__", None)
                and is_made_class(type(value))
                and not is_left_out(type(value).__module__)
            )
        ) or (
            hasattr(value, "__dict__")
            and not isinstance(value, (type, types.ModuleType, nn.Module))
            and not (isinstance(value, types.FunctionType) and not has_own(value))
            and not is_left_out(plain_attribute(value, "__module__", type(value).__module__))
        ):
            self.objects.setdefault(name, value)

    def cached(self, value: Any) -> None:
        """Note functions that remember what they have returned: a method of a class may, too."""
        for cache in caches_in(value):
            if not is_left_out(cache.__module__) and all(cache is not one for one in self.caches):
                self.caches.append(cache)
