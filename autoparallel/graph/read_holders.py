"""Things that a forward's code refers to and that no dictionary of the user's holds.

Code and defaults of functions, the order of base classes and the classes of objects are exchanged
seldom, and then without a trace. Each holder lists what there is now, by loops that run in C, so
that a call can compare it by identity with what there was.
"""

from __future__ import annotations

import itertools
import operator
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["ClassParts", "FunctionParts", "GivenNames", "Held", "Items", "Methods", "Namespace"]
__all__ += ["ObjectKinds", "Version"]

_PARTS = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_GIVEN = operator.attrgetter("__name__", "__qualname__", "__module__", "__doc__")
_ORDER = operator.attrgetter("__mro__")


class Namespace:
    """The attributes of a class or of a Python module, as a step of the way to one of them.

    >>> Namespace(types.SimpleNamespace(x=1)).mapping["x"]
    1
    """

    def __init__(self, owner: Any) -> None:
        self.mapping: Mapping[str, Any] = vars(owner)


class Held:
    """An object that a function, a class or a method has, as the beginning of a way from there.

    >>> Held("a") == Held("a"), Held([]) == Held([])
    (True, False)
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class FunctionParts:
    """The code and the defaults of functions.

    functions: those that are watched. before: the parts that they had when this was made.

    >>> def scaled(x, scale=1.0):
    ...     return x * scale
    >>> parts = FunctionParts([scaled])
    >>> scaled.__defaults__ = (2.0,)
    >>> list(parts) == parts.before
    False
    """

    def __init__(self, functions: Iterable[types.FunctionType]) -> None:
        self.functions = list(functions)
        self.before = list(self)

    def __len__(self) -> int:
        return 3 * len(self.functions)

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(_PARTS, self.functions))


class ClassParts:
    """The classes that each of some classes inherits from. kinds: all of them.

    before: see FunctionParts.

    >>> list(ClassParts([int]))
    [(<class 'int'>, <class 'object'>)]
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        self.kinds = list(kinds)
        self.before = list(self)

    def __len__(self) -> int:
        return len(self.kinds)

    def __iter__(self) -> Iterator[Any]:
        return map(_ORDER, self.kinds)


class GivenNames:
    """The names that functions and classes have, and what they say of themselves. owners: these.

    before: see FunctionParts.

    >>> list(GivenNames([int]))[0]
    'int'
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        self.owners = list(owners)
        self.before = list(self)

    def __len__(self) -> int:
        return 4 * len(self.owners)

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(_GIVEN, self.owners))


class Methods:
    """Some methods of a class. kind: the class. names: of the methods. before: see FunctionParts.

    >>> list(Methods(str, ["upper"])) == [str.upper]
    True
    """

    def __init__(self, kind: type, names: Iterable[str]) -> None:
        self.kind, self.names = kind, tuple(names)
        # With one name alone it would not return a tuple.
        self.get = operator.attrgetter("__mro__", *self.names)
        self.before = list(self)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.get(self.kind)[1:])


class ObjectKinds:
    """The classes that objects are of. objects: the objects. before: see FunctionParts.

    >>> list(ObjectKinds([1, "a"]))
    [<class 'int'>, <class 'str'>]
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self.objects = list(objects)
        self.before = list(self)

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[Any]:
        return map(type, self.objects)


class Items:
    """The objects in a list or a dictionary. container: the one. before: see FunctionParts.

    >>> list(Items({"a": 1}))
    [1]
    """

    def __init__(self, container: list[Any] | dict[Any, Any]) -> None:
        self.container = container
        self.before = list(self)

    def __len__(self) -> int:
        return len(self.container)

    def __iter__(self) -> Iterator[Any]:
        some = self.container
        return iter(some.values() if isinstance(some, dict) else some)


class Version(Mapping[str, Any]):
    """The count of what was written to a tensor, whose numbers Python has read.

    >>> Version(torch.ones(1))["_version"]
    0
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, name: str) -> Any:
        return 0 if self.tensor.is_inference() else self.tensor._version

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)
