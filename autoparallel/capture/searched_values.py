"""The kinds of values that the search for outer variables tells apart, and whose they are."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from typing import Any

import torch
from torch import nn

from autoparallel.capture.outside_answers import NOTATIONS
from autoparallel.graph.attribute_read import SIMPLE, Contents
from autoparallel.support.object_state import (
    bytes_of,
    functions_in,
    is_bound,
    is_of_library,
    plain_attribute,
)

__all__ = [
    "builtins_of",
    "codes_in",
    "has_own",
    "is_added",
    "is_home_left_out",
    "is_left_out",
    "is_name",
    "is_own_code",
    "is_own_kind",
    "is_setting",
    "name_of_function",
    "names_in_methods",
    "names_of",
    "own_kinds_of",
    "words_of",
]

# Packages whose own settings are not looked at; the standard library is none either.
_LEFT_OUT = {"torch", "numpy", "autoparallel", *NOTATIONS, *sys.stdlib_module_names} - {"__main__"}
# What is compared by what it holds.
_HOLDING = (functools.partial, types.MappingProxyType, frozenset, weakref.ref)
_INTERPRETERS = {"builtins", "io", "_io", "_sitebuiltins"}


def builtins_of(function: Any) -> dict[str, Any]:
    """Return what a function finds where there is no global variable."""
    names: dict[str, Any] = function.__builtins__
    return names


def is_added(value: Any) -> bool:
    """Return whether a value among the interpreter's own names was put there by a program."""
    if value is None or value is Ellipsis or value is NotImplemented:
        return False
    homes = (getattr(value, "__module__", ""), type(value).__module__)
    return _INTERPRETERS.isdisjoint(homes) or isinstance(value, (*SIMPLE, types.FunctionType))


def is_setting(value: Any) -> bool:
    """Return whether a value is one that can be compared: simple ones, few of them, or memory."""
    if isinstance(value, SIMPLE) or Contents.fit(value):
        return True
    if isinstance(value, _HOLDING) or is_bound(value):
        return True
    known = (list, dict, types.ModuleType, types.FunctionType, type, nn.Module, torch.Tensor)
    return not isinstance(value, known) and (is_of_library(value) or bytes_of(value) is not None)


def name_of_function(function: Any) -> str:
    """Return the name of a function, for messages."""
    return str(plain_attribute(function, "__qualname__", type(function).__name__))


def has_own(function: types.FunctionType) -> bool:
    """Return whether a function has attributes of its own, or refers to itself to give it some."""
    return bool(vars(function)) or function.__name__ in function.__code__.co_names


@functools.lru_cache(maxsize=1024)
def names_in_methods(kind: Any) -> tuple[str, ...]:
    """Return the names in the code of a class's methods, where it is the user's own."""
    owners = [owner for owner in kind.__mro__ if is_own_kind(owner)]
    functions = [
        each for owner in owners for item in vars(owner).values() for each in functions_in(item)
    ]
    return tuple(dict.fromkeys(name for each in functions for name in each.__code__.co_names))


def names_of(code: types.CodeType) -> tuple[str, ...]:
    """Return the names in some code, and in that of the functions that are written in it."""
    return tuple(dict.fromkeys(name for each in codes_in(code) for name in each.co_names))


def words_of(code: types.CodeType) -> tuple[str, ...]:
    """Return the names in some code, and the texts that may be names: of attributes, say.

    >>> words_of((lambda settings: getattr(settings.inner, "scale.x", 1)).__code__)
    ('getattr', 'inner', 'scale.x', 'scale', 'x')
    """
    texts = [item for item in code.co_consts if isinstance(item, str) and is_name(item)]
    # An operator.attrgetter is given several in one.
    texts += [part for text in texts if "." in text for part in text.split(".")]
    return (*code.co_names, *texts)


def codes_in(code: types.CodeType) -> list[types.CodeType]:
    """Return some code, and that of the functions that are written in it."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return [code, *(each for one in inner for each in codes_in(one))]


def is_left_out(module: str | None) -> bool:
    """Return whether a Python module is of a package whose settings are not looked at."""
    return (module or "builtins").partition(".")[0] in _LEFT_OUT


def is_home_left_out(value: Any) -> bool:
    """Return whether the attributes of a value are of a package that is not looked at.

    An object of the standard library, such as a namespace, has what a program has put there.
    """
    if isinstance(value, types.ModuleType):
        return is_left_out(value.__name__)
    if isinstance(value, type):
        return is_left_out(value.__module__)
    package = (type(value).__module__ or "").partition(".")[0]
    return package in _LEFT_OUT and package not in sys.stdlib_module_names


def is_name(text: str) -> bool:
    """Return whether a text may be the name of a variable, an attribute or a Python module."""
    return all(map(str.isidentifier, text.split(".")))


def own_kinds_of(kind: Any) -> list[type]:
    """Return the classes of the user's own that a class is an instance of.

    What the class itself does not have, these may have for it.

    >>> own_kinds_of(int)
    []
    """
    above: Any = type(kind).__mro__
    return [each for each in above if is_own_kind(each)]


def is_own_kind(kind: type) -> bool:
    """Return whether a class is the user's own."""
    return is_own_code(kind.__module__)


def is_own_code(module: str) -> bool:
    """Return whether a Python module lies beside the user's own, and in no installed package.

    >>> is_own_code("torch.nn"), is_own_code("json")
    (False, False)
    """
    if module == "__main__":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return bool(file) and "-packages" not in str(file) and not is_left_out(module)
