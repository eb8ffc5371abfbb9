"""Values of Python as a forward could see them, frozen to be compared with what they are later.

Numbers, texts and containers are compared by what they are, objects by what they hold, functions by
what their code refers to, and all else by identity.
"""

from __future__ import annotations

import array
import collections
import functools
import sys
import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.graph.attribute_read import SIMPLE
from autoparallel.support.bare_values import plain_value
from autoparallel.support.object_state import bytes_of, is_bound, own_attributes

__all__ = ["ALL", "DEEPEST", "equal", "frozen", "is_array", "is_looked_into", "shows_bytes"]
__all__ += ["variable_in"]

DEEPEST = 5  # containers inside of containers whose contents are compared
_MOST_NUMBERS = 16
ALL = None  # in place of a step into a container: all that it holds
_LIBRARIES = {"torch", "autoparallel", *sys.stdlib_module_names} - {"__main__"}
# They keep caches of their own.
_OPERATORS = (type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor))

# What is not looked into by its attributes.
_OTHERWISE = (
    *(list, tuple, dict, set, frozenset, collections.deque, bytearray, array.array, weakref.ref),
    *(functools.partial, types.MethodType, types.MappingProxyType, types.FunctionType, type),
    *(nn.Module, torch.Tensor, torch.Generator, *_OPERATORS),
)


def equal(one: Any, other: Any, depth: int = 0) -> bool:
    """Return whether a forward could not tell two values apart.

    Numbers and texts are compared with their types, containers item by item, all else by identity.
    """
    if one is other:
        return True
    if type(one) is not type(other) or depth > DEEPEST:
        return False
    if isinstance(one, SIMPLE):
        # nan is nan, and 0.0 is not -0.0.
        return (one == other and repr(one) == repr(other)) or repr(one) == repr(other) == "nan"
    if isinstance(one, (list, tuple)):
        # No tuple is in itself, and what `frozen` returns is tuples in tuples.
        depth += isinstance(one, list)
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(equal(a, b, depth) for a, b in pairs)
    if isinstance(one, dict):
        if list(one) != list(other):
            return False
        return all(equal(one[key], other[key], depth + 1) for key in one)
    return False


def frozen(value: Any, depth: int = 0, own: frozenset[Any] = frozenset()) -> Any:
    """Return what a forward could see of an object, as it is now, to be compared by `equal`.

    Objects are what they have, and functions what their code refers to. What cannot be looked into
    is itself, and equal to nothing else. own: places that are left out, each the identity of a
    container and a step into it, or None for all that it holds.

    >>> import types
    >>> settings = types.SimpleNamespace(tau=1.0)
    >>> before = frozen(settings)
    >>> equal(before, frozen(types.SimpleNamespace(tau=1.0)))
    True
    >>> settings.tau = 2.0
    >>> equal(before, frozen(settings))
    False
    """
    if isinstance(value, SIMPLE) or depth > DEEPEST:
        return value
    if (id(value), ALL) in own:
        return type(value)
    inner = functools.partial(frozen, depth=depth + 1, own=own)
    if isinstance(value, (list, tuple, collections.deque)):
        return (type(value), *map(inner, value))
    if isinstance(value, dict):
        return (type(value), *_items(value, "item", value, own, inner))
    if isinstance(value, (set, frozenset)):
        return (type(value), *map(inner, sorted(value, key=repr)))
    if isinstance(value, (bytearray, array.array)):
        return (type(value), bytes(value))
    if is_array(value):
        return (type(value), str(value.dtype), str(value.shape), value.tobytes())
    if isinstance(value, torch.Tensor) and not value.is_inference():
        return (value, value._version, _numbers(value))
    if isinstance(value, weakref.ref):
        return (type(value), inner(value()))
    if isinstance(value, functools.partial):
        return (type(value), inner(value.func), inner(value.args), inner(value.keywords))
    if isinstance(value, types.MethodType):
        return (type(value), value.__func__, inner(value.__self__))
    if isinstance(value, types.MappingProxyType):
        return (type(value), inner(dict(value)))
    if is_bound(value):
        return (type(value), value.__name__, inner(value.__self__))
    if isinstance(value, types.FunctionType):
        if (value.__module__ or "").partition(".")[0] in _LIBRARIES:
            return value
        cells = [inner(variable_in(cell)) for cell in value.__closure__ or ()]
        return (value.__code__, inner(value.__defaults__), inner(value.__kwdefaults__), *cells)
    if isinstance(value, (type, nn.Module, torch.Tensor, torch.Generator, *_OPERATORS)):
        return value
    if shows_bytes(value):
        return (type(value), bytes_of(value))
    attributes, plain = own_attributes(value), plain_value(value)
    if not attributes and not hasattr(value, "__dict__") and plain is None:
        return value
    return (type(value), plain, *_items(attributes, "attribute", value, own, inner))


def _numbers(tensor: torch.Tensor) -> Any:
    """Return the numbers of a small tensor, None for others.

    What is written to `tensor.data` raises no version, and Python may have read them.
    """
    if type(tensor) is not torch.Tensor or tensor.numel() > _MOST_NUMBERS or not tensor.is_cpu:
        return None
    return tensor.tolist()


def is_looked_into(value: Any) -> bool:
    """Return whether `frozen` tells of an object what attributes it has, and nothing else.

    >>> is_looked_into(types.SimpleNamespace()), is_looked_into([]), is_looked_into(1)
    (True, False, False)
    """
    otherwise = isinstance(value, (*SIMPLE, *_OTHERWISE)) or is_array(value) or is_bound(value)
    return not otherwise and not shows_bytes(value) and hasattr(value, "__dict__")


def _items(
    mapping: Mapping[Any, Any], kind: str, owner: Any, own: frozenset[Any], inner: Any
) -> list[Any]:
    """Return keys and frozen values of what an owner holds, but for places that are left out."""
    return [
        (key, inner(item)) for key, item in mapping.items() if (id(owner), (kind, key)) not in own
    ]


def is_array(value: Any) -> bool:
    """Return whether a value is an array of numpy, which is not imported to find out."""
    return type(value).__module__ == "numpy" and hasattr(value, "tobytes")


def shows_bytes(value: Any) -> bool:
    """Return whether an object, no text or number, shows its memory, as arrays of C's do."""
    return not isinstance(value, SIMPLE) and bytes_of(value) is not None


def variable_in(cell: types.CellType) -> Any:
    """Return the variable in a cell, None where it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
