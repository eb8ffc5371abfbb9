"""Things in a running model that guards list, to compare what is there with what was there."""

from __future__ import annotations

import gc
import itertools
import operator
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.graph.attribute_read import SIMPLE, Contents
from autoparallel.parallel.frozen_values import is_looked_into, variable_in
from autoparallel.support.bare_values import container_kind
from autoparallel.support.object_state import own_attributes

__all__ = [
    "Attributes",
    "Functions",
    "HeldTensor",
    "Inside",
    "LeftValues",
    "Names",
    "attributes_now",
]
__all__ += ["dictionary_of"]

_PARTS = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_OWN = object.__getattribute__
_VARIABLE = operator.attrgetter("cell_contents")
# Names that modules have from torch and from this project.
_LEFT_OUT = {*vars(nn.Module()), "_autoparallel", "_generator"}


class LeftValues:
    """The values that programs have left last in attributes of modules, such as a mask that the
    first call makes and others find.

    >>> left, layer = LeftValues(), nn.Linear(2, 2)
    >>> layer.mask = torch.ones(2)
    >>> left.follow(vars(layer), "mask")
    >>> left.note(vars(layer), "mask", layer.mask)
    >>> before = left.are(vars(layer), "mask", layer.mask)
    >>> layer.mask.zero_()
    tensor([0., 0.])
    >>> before, left.are(vars(layer), "mask", layer.mask)
    (True, False)
    """

    def __init__(self) -> None:
        # By the module's dictionary and the name: a function that returns the value, and how often
        # it had been written to. A tensor is not kept alive: a whole graph may hang on it.
        self.last: dict[tuple[int, str], tuple[Callable[[], Any], int]] = {}

    def follow(self, own: Mapping[Any, Any], name: str) -> None:
        """Note from now on what programs leave at this place. own: the attributes of a module."""
        self.last.setdefault((id(own), name), (lambda: self, 0))

    def note(self, own: Mapping[Any, Any], name: str, value: Any) -> None:
        """Note what a program has left, if somebody follows it."""
        if (id(own), name) in self.last:
            kept = weakref.ref(value) if isinstance(value, torch.Tensor) else lambda: value
            self.last[id(own), name] = kept, _writes_to(value)

    def are(self, own: Mapping[Any, Any], name: str, value: Any) -> bool:
        """Return whether a value is the one that was left there, as it was."""
        last, writes = self.last[id(own), name]
        return last() is value and _writes_to(value) == writes


def _writes_to(value: Any) -> int:
    """Return how often something has been written to the memory of a value, if it is a tensor."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def dictionary_of(mapping: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the dictionary behind a view, such as a class has of its own; else the mapping.

    To look into a dictionary takes half the time, and at every call there are many of them. It is
    only read: what is written to it past the class would not be noticed by the interpreter.

    >>> type(vars(nn.Linear)).__name__, type(dictionary_of(vars(nn.Linear))).__name__
    ('mappingproxy', 'dict')
    """
    if isinstance(mapping, types.MappingProxyType):
        behind = gc.get_referents(mapping)
        if len(behind) == 1 and isinstance(behind[0], dict):
            return behind[0]
    return mapping


class _OfThisThread(Mapping[str, Any]):
    """The attributes that a threading.local has in the thread that asks. local: the object."""

    def __init__(self, local: threading.local) -> None:
        self.local = local

    def __getitem__(self, name: str) -> Any:
        return vars(self.local)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self.local))

    def __len__(self) -> int:
        return len(vars(self.local))


def attributes_now(item: Any) -> Any:
    """Return the attributes that an object has of its own, as they are at every look; None for an
    object that has none.

    >>> attributes_now(types.SimpleNamespace(tau=1.0))["tau"], attributes_now(1)
    (1.0, None)
    """
    own = getattr(item, "__dict__", None)
    return _OfThisThread(item) if isinstance(item, threading.local) else own


class HeldTensor:
    """A tensor of a module, whichever it is at the time, never as the user's Python is shown it.

    tensors: the dictionary that has it. name: its key there.
    """

    def __init__(self, tensors: Mapping[str, Any], name: str = "") -> None:
        self.tensors, self.name = tensors, name

    def __getitem__(self, name: str) -> HeldTensor:
        return HeldTensor(self.tensors, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensors[self.name], name)


class Names:
    """The names of the attributes that an object was given, but for those that torch gives."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        self.own = own

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __iter__(self) -> Any:
        return (name for name in self.own if name not in _LEFT_OUT)


class Functions:
    """A list of what functions refer to in the variables of one another, as decorators do.

    functions: each with what its code finds around it.
    """

    def __init__(self, functions: list[types.FunctionType]) -> None:
        self.functions = functions
        self.cells = [cell for each in functions for cell in each.__closure__ or ()]

    @classmethod
    def around(cls, function: types.FunctionType) -> Functions | None:
        """Return those that a function leads to; None where one refers to what can change."""
        functions: list[types.FunctionType] = []
        todo = [function]
        while todo:
            each = todo.pop()
            if any(each is one for one in functions):
                continue
            functions.append(each)
            values = [variable_in(cell) for cell in each.__closure__ or ()]
            values += [*(each.__defaults__ or ()), *(each.__kwdefaults__ or {}).values()]
            for value in values:
                if isinstance(value, types.FunctionType):
                    todo.append(value)
                elif not isinstance(value, (*SIMPLE, type, types.ModuleType)):
                    return None
        return cls(functions)

    def __len__(self) -> int:
        return 3 * len(self.functions) + len(self.cells)

    def __iter__(self) -> Iterator[Any]:
        parts = itertools.chain.from_iterable(map(_PARTS, self.functions))
        try:
            return iter([*parts, *map(_VARIABLE, self.cells)])
        except ValueError:  # one has no value now
            parts = itertools.chain.from_iterable(map(_PARTS, self.functions))
            return itertools.chain(parts, map(variable_in, self.cells))


class Inside:
    """The items of a list, or the keys and then the values of a dict, whatever its class says."""

    def __init__(self, container: Any) -> None:
        self.container, self.kind = container, container_kind(container)
        self.pairs = isinstance(container, dict)

    def __len__(self) -> int:
        count: int = self.kind.__len__(self.container)
        return 2 * count if self.pairs else count

    def __iter__(self) -> Iterator[Any]:
        keys: Iterator[Any] = self.kind.__iter__(self.container)
        return itertools.chain(keys, self.kind.values(self.container)) if self.pairs else keys


class Attributes:
    """The class of an object, and the names and values of its attributes, which are simple.

    owner: the object.

    >>> tau = types.SimpleNamespace(tau=1.0)
    >>> list(Attributes(tau))
    [<class 'types.SimpleNamespace'>, 'tau', 1.0]
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    @classmethod
    def fit(cls, value: Any) -> bool:
        """Return whether an object is nothing but attributes, of simple values and such containers.

        >>> Attributes.fit(types.SimpleNamespace(a=[1])), Attributes.fit([1])
        (True, False)
        """
        if not is_looked_into(value) or type(getattr(value, "__dict__", None)) is not dict:
            return False
        own = _OWN(value, "__dict__")
        return own_attributes(value).keys() == own.keys() and all(
            isinstance(item, SIMPLE) or Contents.fit(item) for item in own.values()
        )

    def __len__(self) -> int:
        return 1 + 2 * len(_OWN(self.owner, "__dict__"))

    def __iter__(self) -> Iterator[Any]:
        own = _OWN(self.owner, "__dict__")
        return itertools.chain((type(self.owner),), own, own.values())
