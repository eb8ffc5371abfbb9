"""The state that objects keep: attributes in dictionaries and slots, positions, random numbers."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import decimal
import functools
import logging
import random
import re
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from autoparallel.support.made_classes import is_made_class

__all__ = [
    "bytes_of",
    "caches_in",
    "contents_of",
    "functions_in",
    "is_bound",
    "is_closed",
    "is_of_library",
    "moves_on",
    "own_attributes",
    "plain_attribute",
    "put_attribute",
    "random_state",
    "second_of",
    "special_methods",
]

# Methods that are called where an object is made, taken apart or copied.
_MAKING = frozenset(
    "__init__ __new__ __post_init__ __init_subclass__ __set_name__ __getstate__ __setstate__ "
    "__reduce__ __reduce_ex__ __copy__ __deepcopy__ __del__".split()
)
# The field of a named tuple, as its class has it: a place in a tuple.
_Field = collections.namedtuple("_Field", "index")
# Kinds of C's that do not change, and locks, whose state is no setting.
_UNCHANGING = (
    *(bool, int, float, complex, str, bytes, tuple, frozenset, range, slice, object),
    *(list, dict, set, collections.deque, memoryview, property, classmethod, staticmethod),
    *(type(None), type(Ellipsis), type(NotImplemented), types.MappingProxyType, types.CodeType),
    *(re.Pattern, re.Match, decimal.Decimal, contextvars.ContextVar, contextvars.Token),
    *(types.GenericAlias, types.UnionType, type(threading.Lock()), type(threading.RLock())),
    *(types.MemberDescriptorType, types.GetSetDescriptorType, struct.Struct, type(_Field.index)),
)
_NO_SETTINGS = (type, types.ModuleType, functools.partial, threading.local, logging.Logger)
_FUNCTIONS = ("builtins", "functools", "operator", "_operator", "weakref")
_STEADY = ("datetime", "torch", "numpy", "typing", "zoneinfo", "_abc", "_weakref")  # and modules


def own_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes that an object has of its own, those in slots among them.

    It asks past the classes' own ways to read attributes. The dictionary is a new one.

    >>> class Point:
    ...     __slots__ = ("x", "y")
    >>> point = Point()
    >>> point.x = 1
    >>> own_attributes(point)
    {'x': 1}
    """
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = {}
    result = dict(own) if isinstance(own, dict) else {}
    for kind in type(value).__mro__:
        if is_made_class(kind) and "__slots__" in vars(kind):
            for name, member in vars(kind).items():
                if isinstance(member, types.MemberDescriptorType):
                    try:
                        result[name] = member.__get__(value)
                    except AttributeError:  # nothing was put there yet
                        continue
    return result


def plain_attribute(value: Any, name: str, default: Any = None) -> Any:
    """Return an attribute that an object, or its class, has, past the class's own ways to find one.

    Those may answer to any name, fail with an error of their own, or write something down.

    >>> class Settings(dict):
    ...     __getattr__ = dict.__getitem__
    >>> plain_attribute(Settings(), "__qualname__", "none")
    'none'
    """
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        return default


def put_attribute(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an object's own, in its dictionary or in a slot.

    It goes past the classes' own ways to set attributes.

    >>> owner = types.SimpleNamespace()
    >>> put_attribute(owner, "x", 1)
    >>> owner.x
    1
    """
    for kind in type(owner).__mro__:
        member = vars(kind).get(name)
        if isinstance(member, types.MemberDescriptorType):
            member.__set__(owner, value)
            return
    object.__getattribute__(owner, "__dict__")[name] = value


def random_state(value: Any) -> tuple[Any, Callable[[], None]] | None:
    """Return the state of a random generator of Python or numpy, and a function that restores it.

    The state is a value that is equal as long as nobody draws. None for any other object.

    >>> generator = random.Random(3)
    >>> before, restore = random_state(generator)
    >>> _ = generator.random()
    >>> restore()
    >>> random_state(generator)[0] == before
    True
    """
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        state = value.getstate()
        return state, lambda: value.setstate(state)
    if not type(value).__module__.startswith("numpy.random"):
        return None
    if hasattr(value, "get_state"):  # numpy's RandomState
        old = value.get_state()
        return repr([getattr(item, "tolist", lambda item=item: item)() for item in old]), (
            lambda: value.set_state(old)
        )
    bits = getattr(value, "bit_generator", value)
    if not hasattr(bits, "state"):
        return None
    now = copy.deepcopy(bits.state)

    def restore() -> None:
        """Put the generator back to where it was."""
        bits.state = now

    return repr(_plain(now)), restore


def _plain(state: Any) -> Any:
    """Return a state with lists in the place of arrays, whose texts leave things out."""
    if isinstance(state, dict):
        return {key: _plain(item) for key, item in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state


def bytes_of(value: Any) -> bytes | None:
    """Return the memory of an object that shows it, such as an array or a number of C's, as bytes.

    None for all other objects.

    >>> import array
    >>> bytes_of(array.array("b", [1, 2])), bytes_of([1, 2])
    (b'\\x01\\x02', None)
    """
    try:
        with memoryview(value) as memory:
            return memory.tobytes()
    except (TypeError, ValueError, BufferError):
        return None


def contents_of(function: types.FunctionType) -> tuple[Any, ...]:
    """Return the variables of functions around a function that it refers to, as they are now.

    >>> def counted(count):
    ...     return lambda: count
    >>> contents_of(counted(3))
    (3,)
    """
    contents = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it has no value yet
            contents.append(cell.cell_contents)
    return tuple(contents)


def functions_in(value: Any) -> Iterator[types.FunctionType]:
    """Yield the Python functions in a value: a method, a property, or one under decorators.

    >>> [function.__name__ for function in functions_in(functools.partial(random.shuffle))]
    ['shuffle']
    """
    depth = 0
    while value is not None and depth < 10:
        depth += 1
        if isinstance(value, property):
            yield from functions_in(value.fget)
            return
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, functools._lru_cache_wrapper):
            value = value.__wrapped__
        elif isinstance(value, types.FunctionType):
            yield value
            # A decorated function keeps the one that it decorates.
            value = getattr(value, "__wrapped__", None)
        else:
            return


def caches_in(value: Any) -> Iterator[Any]:
    """Yield the functions under functools.lru_cache in a value. See `functions_in`.

    >>> list(caches_in(property(len))), len(list(caches_in(functools.cache(len))))
    ([], 1)
    """
    for _ in range(10):
        if value is None:
            return
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, functools.partial):
            value = value.func
        else:
            if isinstance(value, functools._lru_cache_wrapper):
                yield value
            value = plain_attribute(value, "__wrapped__")


def special_methods(kind: type, made: bool) -> frozenset[str]:
    """Return the methods that a class itself defines and that are called without their names.

    made: objects of the class may be made, too.

    >>> class Counted:
    ...     def __init__(self): ...
    ...     def __len__(self): ...
    >>> sorted(special_methods(Counted, True) - special_methods(Counted, False))
    ['__init__']
    """
    own = frozenset(name for name in vars(kind) if name.startswith("__"))
    return own if made else own - _MAKING


def moves_on(value: Any) -> bool:
    """Return whether an object is an iterator or a queue that only the interpreter looks into.

    >>> moves_on(iter([1])), moves_on([1])
    (True, False)
    """
    kind = type(value)
    following = getattr(kind, "__next__", None)
    if following is not None:
        return not isinstance(following, types.FunctionType)
    # What is put into a queue of C's comes out of it once.
    written = (types.MethodDescriptorType, types.BuiltinMethodType)
    return all(isinstance(vars(kind).get(name), written) for name in ("get", "put"))


def is_closed(value: Any) -> bool:
    """Return whether an object of C's may hold what can change, and shows nothing of it.

    Such are connections to a database, the contexts of decimal numbers, and what ctypes finds in a
    library in C: its functions ask what they like, and pointers lead anywhere.

    >>> is_closed(decimal.getcontext()), is_closed(decimal.Decimal(1)), is_closed(len)
    (True, False, False)
    >>> is_closed(collections.namedtuple("Point", "x y").x)
    False
    """
    kind = type(value)
    if kind in _UNCHANGING:
        return False
    if _is_foreign(value):
        return True
    # Classes in Python have what their instances hold in a dictionary, or in slots.
    function = callable(value) and kind.__module__.partition(".")[0] in _FUNCTIONS
    plain = isinstance(value, (type, tuple, int, float, str, bytes, types.ModuleType))
    if function or plain or hasattr(value, "__dict__"):
        return False
    if any("__slots__" in vars(base) for base in kind.__mro__):
        return False
    return kind.__module__.partition(".")[0] not in _STEADY and bytes_of(value) is None


def is_bound(value: Any) -> bool:
    """Return whether a value is a method of C's with the object that it is of, such as `list.pop`.

    >>> is_bound([].append), is_bound(len)
    (True, False)
    """
    bound = isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType))
    return bound and not isinstance(value.__self__, (types.ModuleType, type, type(None)))


def _is_foreign(value: Any) -> bool:
    """Return whether an object is a library in C, a function of one, or a pointer."""
    ctypes: Any = sys.modules.get("ctypes")
    return ctypes is not None and isinstance(
        value, (ctypes.CDLL, ctypes._CFuncPtr, ctypes._Pointer)
    )


def is_of_library(value: Any) -> bool:
    """Return whether an object of a class of the standard library's in Python holds a setting.

    Loggers hold one another, and are asked for their levels.

    >>> is_of_library(threading.Event()), is_of_library(logging.getLogger())
    (True, False)
    """
    if not hasattr(value, "__dict__") or isinstance(value, _NO_SETTINGS) or callable(value):
        return False
    home = type(value).__module__.partition(".")[0]
    return home in sys.stdlib_module_names and home != "__main__"


def second_of(value: Any) -> Any:
    """Return an iterator at the same position as `value`, None where there can be none.

    >>> numbers = iter([1, 2])
    >>> second = second_of(numbers)
    >>> next(second), next(numbers)
    (1, 1)
    """
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever stands in the way: a generator, a file
        return None
