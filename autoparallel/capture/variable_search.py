"""The search for variables outside of a model: from function to function, by the names in code.

What a function may read is written in its code, so that this finds a little more than is read.
"""

from __future__ import annotations

import argparse
import collections
import contextvars
import functools
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from autoparallel.capture.found_reads import CALLABLE, FoundReads
from autoparallel.capture.library_names import named
from autoparallel.capture.library_questions import asked_by_identity
from autoparallel.capture.module_tensors import MODULE_ATTRIBUTES
from autoparallel.capture.searched_values import (
    builtins_of,
    has_own,
    is_added,
    is_home_left_out,
    is_left_out,
    is_name,
    is_own_code,
    is_own_kind,
    is_setting,
    name_of_function,
    names_in_methods,
)
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
from autoparallel.graph.read_holders import (
    Items,
    Namespace,
)
from autoparallel.support.module_paths import join_path
from autoparallel.support.object_state import (
    bytes_of,
    caches_in,
    functions_in,
    is_bound,
    is_closed,
    moves_on,
    own_attributes,
    random_state,
    special_methods,
)
from autoparallel.support.replaced_functions import is_of_another, replaced_functions

__all__ = ["VariableSearch", "searched"]

# Containers to which code writes, whatever is in them.
_WRITTEN = (
    *(list, dict, set, collections.deque, bytearray),
    *(types.SimpleNamespace, argparse.Namespace),
)
_GRADIENTS = torch.is_grad_enabled
# By these code comes to variables and attributes by names that it may put together when it runs.
_NAMESPACES = {"globals", "__globals__"}
_LOOKING_UP = {"getattr", "vars", "__dict__", "attrgetter", "__getattribute__"}
# By these a function looks up Python modules, and attributes past `__getattribute__` of the object.
_IMPORTING = {"import_module", "__import__", "modules"}
_PAST = {"__getattribute__", "getattr_static", "__getattr__"}
_MOST_BYTES = 1 << 20  # of an object whose memory is compared at each call
_DEEPEST = 4  # objects inside of others whose attributes are looked at
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that a program has made, not an interpreter's


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


class VariableSearch(FoundReads):
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
    looked into, by their ids.
    """

    def __init__(self) -> None:
        super().__init__()
        self.todo: list[tuple[types.FunctionType, type]] = []
        self.objects: dict[str, Any] = {}
        self.caches: list[Any] = []
        self.settings: dict[str, list[tuple[type, type]]] = {}
        self.unwatched: dict[type, dict[str, None]] = {}
        self.codes: dict[types.CodeType, dict[str, Any]] = {}
        self.variables: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self.kept: list[Any] = []
        self.names: dict[str, None] = {}
        self.looks_up = self.helping = False
        self.classes: list[tuple[type, bool]] = []

    def reads(self) -> tuple[AttributeRead, ...]:
        """Look at all functions that are to be looked at, and return what they may read."""
        while self.todo:
            self.look(*self.todo.pop())
        listed = self.listed()
        return (*self.found.values(), *listed)

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
        items = list(value.values()) if isinstance(value, dict) else value
        for item in items if isinstance(value, (list, tuple, dict)) else (value,):
            self.cached(item)
            for function in functions_in(item):
                if not is_left_out(function.__module__):
                    self.value(function, kind)
            if isinstance(item, CALLABLE):
                self.kept.append(item)
            self.help(item)

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
        known = self.helpers.get(kind, kind in self.places and not made)
        if kind.__flags__ & _HEAP_TYPE and not known and not is_left_out(kind.__module__):
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

    def look(self, function: types.FunctionType, kind: type) -> None:
        """Look at the code of a function, and at the functions that are written in it."""
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        for value in defaults:
            self.keep(f"default of {function.__qualname__}", value)
            self.value(value, kind)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            self.enclosed(name, cell, kind)
        codes = [function.__code__]
        own = is_own_code(str(function.__globals__.get("__name__")))
        while codes:
            code = codes.pop()
            self.codes[code] = function.__globals__
            self.absent, self.looks_up = frozenset(), False
            if own:
                self.looks_up = not _LOOKING_UP.isdisjoint(code.co_names)
                self.questions(function, code)
                self.libraries(function, code)
            codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
            # Names that are texts may be looked up by getattr, in globals() or in sys.modules.
            texts = [item for item in code.co_consts if isinstance(item, str) and is_name(item)]
            # An operator.attrgetter is given several in one.
            texts += [part for text in texts if "." in text for part in text.split(".")]
            names = (*code.co_names, *texts)
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
            for name in names:
                self.of_classes(name)
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

    def of_classes(self, name: str) -> None:
        """Note an attribute of classes, which may be read by type(self) or in a class method."""
        for kind, owner in self.settings.get(name, ()):
            route = (("class", name_of(owner)),)
            value = kept_of(vars(owner)[name])
            read = AttributeRead(self.places[kind], route, name, Where.INSTANCE, value)
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

    def enclosed(self, name: str, cell: types.CellType, kind: type) -> None:
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
        if isinstance(value, torch.Tensor):
            route = (("cell", Cell(cell)),)
            read = AttributeRead("", route, name, Where.NAMED, UNKNOWN)
            self.found.setdefault((id(cell),), read)
        if is_setting(value):
            route = (("cell", Cell(cell)),)
            read = AttributeRead("", route, name, Where.ENCLOSED, kept_of(value))
            self.found.setdefault((id(cell),), read)

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

    def inside(
        self,
        function: types.FunctionType,
        module: str,
        way: tuple[tuple[str, Any], ...],
        value: Any,
        names: tuple[str, ...],
        kind: type,
    ) -> None:
        """Look at the attributes of an object, as far as the code has their names.

        way: the steps to the object from the Python module `module`, as in AttributeRead.
        """
        if isinstance(value, (list, tuple, dict)):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            steps = [("item", key, item) for key, item in list(pairs)[: Contents.MOST]]
            by_user = is_own_code(str(function.__globals__.get("__name__")))
            if by_user and len(steps) == len(value) and not isinstance(value, tuple):
                items = AttributeRead("", (("cell", Items(value)),), "items", Where.LISTED, UNKNOWN)
                self.found.setdefault((id(value), "items"), items)
        elif isinstance(value, nn.Module) or is_home_left_out(value):
            return
        else:
            own = getattr(value, "__dict__", None) or own_attributes(value)
            # Methods may be called, by name or not, and read what the object has.
            of: Any = type(value)
            names = (*names, *names_in_methods(of))
            if not isinstance(value, (types.ModuleType, type)) and is_own_kind(of):
                self.instances[id(value)] = value
            by_user = isinstance(value, types.ModuleType) and is_own_code(value.__name__)
            if self.looks_up and by_user:
                self.any_of(module, way, own)
            # What the way has passed already leads round in a circle, as a rule.
            passed = {step for _, step in way}
            here = [name for name in dict.fromkeys(names) if name in own and name not in passed]
            steps = [("attribute", name, own[name]) for name in here if not name.startswith("__")]
            self.missing(module, way, value)
        for step, key, item in steps if len(way) <= _DEEPEST else ():
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
                    self.replaceable(module, way, key, item, place)
                continue
            slot = not hasattr(value, "__dict__")
            if step == "item" or not self.read(module, way, str(key), item, slot):
                self.inside(function, module, inner, item, names, kind)

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
                and type(value).__flags__ & _HEAP_TYPE
                and not is_left_out(type(value).__module__)
            )
        ) or (
            hasattr(value, "__dict__")
            and not isinstance(value, (type, types.ModuleType, nn.Module))
            and not (isinstance(value, types.FunctionType) and not has_own(value))
            and not is_left_out(getattr(value, "__module__", type(value).__module__))
        ):
            self.objects.setdefault(name, value)

    def cached(self, value: Any) -> None:
        """Note functions that remember what they have returned: a method of a class may, too."""
        for cache in caches_in(value):
            if not is_left_out(cache.__module__) and all(cache is not one for one in self.caches):
                self.caches.append(cache)
