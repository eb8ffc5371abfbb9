"""The search for variables outside of a model: from function to function, by the names in code.

What a function may read is written in its code, so that this finds a little more than is read.
"""

from __future__ import annotations

import contextvars
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from autoparallel.capture.found_reads import Way
from autoparallel.capture.library_names import named
from autoparallel.capture.library_questions import names_looked_up
from autoparallel.capture.module_tensors import MODULE_ATTRIBUTES
from autoparallel.capture.searched_values import (
    builtins_of,
    codes_in,
    is_added,
    is_left_out,
    is_own_code,
    is_own_kind,
    is_setting,
    names_of,
    own_kinds_of,
    words_of,
)
from autoparallel.capture.value_search import ValueSearch
from autoparallel.graph.attribute_read import (
    SIMPLE,
    UNKNOWN,
    AttributeRead,
    Cell,
    Contents,
    Where,
    kept_of,
    name_of,
)
from autoparallel.graph.read_holders import Held, Namespace
from autoparallel.support.module_paths import join_path
from autoparallel.support.object_state import (
    functions_in,
)
from autoparallel.support.replaced_functions import replaced_functions

__all__ = ["VariableSearch", "searched"]

# By these code comes to variables and attributes by names that it may put together when it runs.
_NAMES = {"__name__", "__qualname__", "__doc__", "__module__"}  # of functions and classes
_NAMESPACES = {"globals", "__globals__"}
_LOOKING_UP = {"getattr", "vars", "__dict__", "attrgetter", "__getattribute__"}
# By these a function looks up Python modules, and attributes past `__getattribute__` of the object.
_IMPORTING = {"import_module", "__import__", "modules"}
_PAST = {"__getattribute__", "getattr_static", "__getattr__"}


def searched(model: nn.Module) -> VariableSearch:
    """Return a search that is to begin at the forwards of a model."""
    walk = VariableSearch()
    for path, module in model.named_modules():
        walk.places.setdefault(type(module), path)
    walk.collect()
    for kind in walk.places:
        for name in ("forward", "__getattr__", "__getattribute__"):
            walk.method(kind, name)
    for module in model.modules():
        for name, value in vars(module).items():
            # Hooks are called with the module. The model's own run where the program is called.
            hooks = name.endswith("_hooks") and module is not model
            if name == "forward" or name not in MODULE_ATTRIBUTES or hooks:
                walk.attribute(value, type(module))
    # Torch's own layers come to these, and no code of the user's has their names.
    for function in replaced_functions():
        if not is_left_out(str(function.__globals__.get("__name__"))):
            walk.value(function, type(model))
    return walk


class VariableSearch(ValueSearch):
    """The search from function to function.

    found: the reads, by the name of the Python module and the names from there. seen: the functions
    that were met, each with the class whose method it is: decorators make many of one code. todo:
    those of them that are still to be looked at. objects, caches, moving, unwatched: see
    OuterVariables. places: the path of a module of each class. settings: by the name of an
    attribute the classes that have it, each with the one that it inherits it from. codes: all code
    that was looked at, with its global variables. variables: what may be set to other values, each
    as the mapping, or the cell, that has it, its name and its value. helpers: the user's own
    classes of objects that modules or variables refer to; True where they refer to the class, of
    which code may make an object. kept: functions that modules refer to. names: those in all code
    that was looked at. absent: those of attributes that the code under way may find to be absent.
    classes: helpers whose methods are still to be taken up, which happens while helping.
    looks_up: whether that code may come to attributes by names that it puts together.
    asks_gradients: whether something refers to the function of torch that says if gradients are
    recorded, so that it may be called by another name. instances: the user's own objects that were
    looked into, by their ids. entered: objects that were looked
    into, with the names that were looked for. kinds: the user's classes to which attributes of
    modules refer; opened: the objects in which these were looked for, by their ids. asks_names:
    whether code asks what functions and classes are called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, list[tuple[type, type]]] = {}
        self.unwatched: dict[type, dict[str, None]] = {}
        self.codes: dict[types.CodeType, dict[str, Any]] = {}
        self.variables: dict[tuple[int, str], tuple[Any, str, Any]] = {}

    def reads(self) -> tuple[AttributeRead, ...]:
        """Look at all functions that are to be looked at, and return what they may read."""
        while self.todo:
            function, kind = self.todo.pop()
            try:
                self.look(function, kind)
            except Exception as error:  # of an object that cannot be looked at
                what = f"{type(error).__name__} is raised where it is looked at"
                self.moving.append(f"what {function.__qualname__} refers to, but {what}")
        listed = self.listed()
        return (*self.found.values(), *listed)

    def look(self, function: types.FunctionType, kind: type) -> None:
        """Look at the code of a function, and at the functions that are written in it."""
        own = is_own_code(str(function.__globals__.get("__name__")))
        codes = codes_in(function.__code__)
        self.absent = frozenset().union(*(names_looked_up(each)[0] for each in codes if own))
        self.looks_up = own and not _LOOKING_UP.isdisjoint(names_of(function.__code__))
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        for value in defaults:
            self.keep(f"default of {function.__qualname__}", value)
            self.value(value, kind)
            self.held(value, function, kind)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            self.enclosed(name, cell, function, kind)
        for code in codes:
            self.codes[code] = function.__globals__
            self.absent, self.looks_up = frozenset(), False
            if own:
                self.looks_up = not _LOOKING_UP.isdisjoint(code.co_names)
                self.asks_names = self.asks_names or not _NAMES.isdisjoint(names_of(code))
                self.questions(function, code)
                self.libraries(function, code)
            # Names that are texts may be looked up by getattr, in globals() or in sys.modules.
            names = words_of(code)
            composed = self.looks_up and {"modules", "__name__"} <= set(code.co_names)
            if own and (composed or not _NAMESPACES.isdisjoint(code.co_names)):
                around = function.__globals__
                self.any_of(str(around.get("__name__")), (), around)
            for name in code.co_names if "globals" not in code.co_names else names:
                if name in function.__globals__:
                    self.variable(function, name, names, kind)
                elif is_added(builtins_of(function).get(name)):
                    self.of_builtins(function, name, names, kind)
                # It may be a method that is called on self.
                elif name != "forward" or "super" in code.co_names:
                    self.method(kind, name, above="super" in code.co_names)
            self.of_helpers(code.co_names)
            for each in self.kinds if own else ():
                self.inside(function, Held(each), (), each, names, kind)
            # It may put together the names, but as the method that all names are given to.
            if own and not _PAST.isdisjoint(code.co_names) and code.co_name not in _PAST:
                self.unwatched.setdefault(kind, {})[""] = None
            for name in names:
                self.of_classes(name, function, kind)
                if not _PAST.isdisjoint(code.co_names):
                    self.past(kind, name)
            for name in names if not _IMPORTING.isdisjoint(code.co_names) else code.co_names:
                self.imported(function, name, names, kind)

    def collect(self) -> None:
        """Note the settings among the attributes of the modules' classes, by their names."""
        for kind in self.places:
            names: set[str] = set()
            for owner in kind.__mro__:
                for name, value in vars(owner).items() if not is_left_out(owner.__module__) else ():
                    setting = isinstance(value, SIMPLE) or Contents.fit(value)
                    if not setting and is_own_kind(owner):
                        held = any(functions_in(value)) or hasattr(type(value), "__set__")
                        setting = not held
                    if setting and name not in names and not name.startswith("__"):
                        self.settings.setdefault(name, []).append((kind, owner))
                    names.add(name)
            for owner in own_kinds_of(kind):
                for name, value in vars(owner).items():
                    setting = isinstance(value, SIMPLE) or Contents.fit(value)
                    if setting and name not in names and not name.startswith("__"):
                        self.settings.setdefault(name, []).append((kind, owner))
                    names.add(name)

    def of_helpers(self, names: Iterable[str]) -> None:
        """Take up the methods of the user's objects that have one of these names."""
        new = [name for name in names if name not in self.names]
        self.names.update(dict.fromkeys(new))
        for kind in [kind for kind in self.helpers if is_own_kind(kind)]:
            for name in new:
                self.method(kind, name)

    def of_classes(self, name: str, function: types.FunctionType, kind: type) -> None:
        """Note an attribute of classes, which may be read by type(self) or in a class method."""
        for place, owner in self.settings.get(name, ()):
            value = vars(owner)[name]
            if isinstance(value, SIMPLE) or Contents.fit(value):
                kept = kept_of(value)
                route: Way = (("class", name_of(owner)),)
                read = AttributeRead(self.places[place], route, name, Where.INSTANCE, kept)
                if owner not in place.__mro__:  # the class of the class has it
                    route = (("cell", Namespace(owner)),)
                    read = AttributeRead("", route, name, Where.ENCLOSED, kept)
            else:
                route = (("cell", Namespace(owner)),)
                read = AttributeRead("", route, name, Where.NAMED, UNKNOWN)
                self.held(value, function, kind)
            self.found.setdefault((owner, name), read)

    def past(self, kind: type, name: str) -> None:
        """Note an attribute that is read past the ways that can be watched."""
        if name.isidentifier():
            self.unwatched.setdefault(kind, {})[name] = None

    def imported(
        self, function: types.FunctionType, name: str, names: tuple[str, ...], kind: type
    ) -> None:
        """Look at a Python module that a function may import, or look up, when it is called."""
        package = str(function.__globals__.get("__package__") or "")
        for full in dict.fromkeys((name, join_path(package, name))):
            module = sys.modules.get(full)
            if isinstance(module, types.ModuleType) and not is_left_out(full):
                self.inside(function, full, (), module, names, kind)

    def enclosed(
        self, name: str, cell: types.CellType, function: types.FunctionType, kind: type
    ) -> None:
        """Look at a variable of a function around, by its name and its cell."""
        try:
            value = cell.cell_contents
        except ValueError:  # it has no value yet
            return
        self.value(value, kind)
        self.keep(name, value)
        self.variables.setdefault((id(cell), name), (cell, name, value))
        if isinstance(value, contextvars.ContextVar):
            self.asked(value)
        own = is_own_code(str(function.__globals__.get("__name__")))
        if is_setting(value) or isinstance(value, torch.Tensor) or own:
            place = Where.ENCLOSED if is_setting(value) else Where.NAMED
            read = AttributeRead("", (("cell", Cell(cell)),), name, place, kept_of(value))
            self.found.setdefault((id(cell),), read)
        self.held(value, function, kind)

    def variable(
        self, function: types.FunctionType, name: str, names: tuple[str, ...], kind: type
    ) -> None:
        """Look at a global variable that a function reads. names: all that its code has."""
        value, module = function.__globals__[name], str(function.__globals__.get("__name__"))
        self.keep(name, value)
        key = (id(function.__globals__), name)
        self.variables.setdefault(key, (function.__globals__, name, value))
        taken = self.function(function, value, kind)
        if taken:
            self.replaceable(module, (), name, value, Where.GLOBAL)
        elif isinstance(value, torch.Tensor):
            self.found.setdefault((module, (), name), named(module, name))
        elif callable(value) and not hasattr(value, "__dict__") and is_own_code(module):
            # Such as a function of C's, in whose place another one may be put.
            read = AttributeRead("", (("global", module),), name, Where.GLOBAL, kept_of(value))
            self.found.setdefault((module, (), name), read)
        elif not self.read(module, (), name, value):
            if is_own_code(module):
                self.refers(module, (), name)
            self.inside(function, module, (("attribute", name),), value, names, kind)

    def of_builtins(
        self, function: types.FunctionType, name: str, names: tuple[str, ...], kind: type
    ) -> None:
        """Look at a name that was put beside those of the interpreter. See `variable`."""
        value = builtins_of(function)[name]
        self.keep(name, value)
        self.value(value, kind)
        if not self.read("builtins", (), name, value):
            self.inside(function, "builtins", (("attribute", name),), value, names, kind)
