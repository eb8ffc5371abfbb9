"""One read of a plain attribute by a traced forward: where it was found, and its value."""

from __future__ import annotations

import copy
import enum
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoparallel.support.made_classes import is_made_class

__all__ = [
    "ABSENT",
    "CONSTANTS",
    "SIMPLE",
    "UNKNOWN",
    "Answer",
    "AttributeRead",
    "Cell",
    "Contents",
]
__all__ += ["LEFT", "TensorRead", "Where", "kept_of", "name_of"]

# Values that a program may put where the forward has put them.
CONSTANTS = (
    *(bool, int, float, complex, str, bytes, type(None), enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class _Simple(type):
    """The class of `Simple`: it says what is an instance."""

    def __instancecheck__(cls, value: object) -> bool:
        kind = type(value)
        if kind in _EXACT or not issubclass(kind, CONSTANTS):
            return kind in _EXACT
        return not is_made_class(kind) or kind.__module__.partition(".")[0] in _LIBRARIES


class Simple(metaclass=_Simple):
    """Values that are the same if they are equal and of one type: numbers, texts and the like.

    A number, a text or a member of an enumeration that is of a class of a program's may have
    attributes, and its class methods, as any object: it is none of these.

    >>> isinstance(1.5, Simple), isinstance(type("Length", (float,), {})(1.5), Simple)
    (True, False)
    """


_EXACT = frozenset(CONSTANTS)
_LIBRARIES = {"torch", "numpy", *sys.stdlib_module_names} - {"__main__"}
SIMPLE = (Simple,)


class _Mark:
    """A value that stands for none of a program's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str:
        return self.name  # it stays one object, also in copies and files


ABSENT = _Mark("ABSENT")  # there is no attribute of this name
LEFT = _Mark("LEFT")  # among `others`: whatever a program has left there last
UNKNOWN = _Mark("UNKNOWN")  # it is no simple value, and is compared by what the object has


class Contents:
    """The contents of a small container of simple values, as they were when it was read.

    >>> Contents([1, 2]) == Contents([1, 2]), Contents([1]) == Contents((1,))
    (True, False)
    """

    MOST = 1024  # items of a container that are compared at each call

    def __init__(self, value: Any) -> None:
        self.value = copy.deepcopy(value)

    @classmethod
    def fit(cls, value: Any) -> bool:
        """Return whether a value is a small container of simple values, or of such containers.

        Named tuples are containers, too.
        """
        named = isinstance(value, tuple) and hasattr(value, "_fields")
        if not (named or type(value) in (list, tuple, dict)) or len(value) > cls.MOST:
            return False
        items = value.values() if isinstance(value, dict) else value
        return all(isinstance(item, SIMPLE) or cls.fit(item) for item in items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contents) and repr(other) == repr(self)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return repr(self.value)


def kept_of(value: Any) -> Any:
    """Return the value that a read of an attribute keeps: UNKNOWN for what cannot be compared.

    >>> kept_of(0.5), kept_of([1]), kept_of(object())
    (0.5, [1], UNKNOWN)
    """
    if value is ABSENT or isinstance(value, SIMPLE):
        return value
    return Contents(value) if Contents.fit(value) else UNKNOWN


def name_of(kind: type) -> str:
    """Return the name of a class with that of its Python module.

    >>> name_of(types.CellType)
    'builtins.cell'
    """
    return f"{kind.__module__}.{kind.__qualname__}"


class Cell(Mapping[str, Any]):
    """A variable of a function around some code, by whatever name, as a mapping has it.

    cell: as functions have them in `__closure__`.

    >>> Cell(types.CellType(0.5))["tau"]
    0.5
    """

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, name: str) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # it has no value now
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and other.cell is self.cell

    def __hash__(self) -> int:
        return id(self.cell)


class Answer(Mapping[str, Any]):
    """The answer of a function that takes no arguments, by whatever name, as a mapping has it.

    ask: is called at each look. It may raise LookupError where there is no answer now.

    >>> Answer(lambda: 0.5)["tau"]
    0.5
    """

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ask = ask

    def __getitem__(self, name: str) -> Any:
        try:
            return self.ask()
        except LookupError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answer) and other.ask == self.ask

    def __hash__(self) -> int:
        return hash(self.ask)


class Where(enum.Enum):
    """The place of an attribute: the object's own dictionary, its class, or known by asking; or it
    is a global variable, or one of a function around the code that reads it. NAMES stands for the
    names of all attributes that an object has of its own. NAMED is a name of which only the object
    counts that it refers to, whatever that holds. LISTED stands for all that a holder lists.
    """

    INSTANCE = "instance"
    CLASS = "class"
    ASKED = "asked"
    GLOBAL = "global"
    ENCLOSED = "enclosed"
    NAMES = "names"
    NAMED = "named"
    LISTED = "listed"


@dataclass(frozen=True)
class TensorRead:
    """One property of an input tensor that a forward has read, such as `requires_grad`.

    number: of the input, in the order of the graph's inputs. name: of the property, or of an
    attribute that the caller has set on the tensor. value: a simple one, or ABSENT. order: of
    memory, where the forward has asked whether the tensor lies in that one. other: the number of
    another input, where it matters whether both are one object; value says that.
    """

    number: int
    name: str
    value: Any
    order: torch.memory_format | None = None
    other: int | None = None

    def holds_among(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Return whether the inputs of a call are in this respect like those of the trace.

        >>> x = torch.ones(2)
        >>> TensorRead(1, "is", True, other=0).holds_among([x, x.clone()])
        False
        """
        if self.other is None:
            return self.holds(inputs[self.number])
        return (inputs[self.number] is inputs[self.other]) is self.value

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether another tensor has this property with the same value.

        >>> TensorRead(0, "is_contiguous", True).holds(torch.ones(2, 3).t())
        False
        """
        value = getattr(tensor, self.name, ABSENT)
        if callable(value):  # such as is_inference
            value = value() if self.order is None else value(memory_format=self.order)
        return type(value) is type(self.value) and repr(value) == repr(self.value)


@dataclass(frozen=True)
class AttributeRead:
    """One attribute that a forward has read.

    path: of the module from which the object was reached. route: the steps from there, each
    ("attribute", name) or ("item", key); none where it is the module itself. The way to a global
    variable, or to an attribute of its value, begins with ("global", name of the Python module)
    instead, that to a variable of a function around with ("cell", its cell), and so do those to
    other things that are asked for; path is empty then. ("class", name) leads to a base class.
    name: of the attribute. where: its place. value: see `kept_of`.
    others: further values with which the program is right, because the forward itself sets them.
    """

    path: str
    route: tuple[tuple[str, Any], ...]
    name: str
    where: Where
    value: Any
    others: tuple[Any, ...] = ()

    def at(self, path: str) -> AttributeRead:
        """Return the same read of another module, which is equal to this one."""
        return replace(self, path=path)

    @property
    def place(self) -> str:
        """The path of the attribute of a module by which the value was reached."""
        if self.where in (Where.GLOBAL, Where.ENCLOSED, Where.NAMED, Where.LISTED):
            return self.name  # by none
        name = self.route[0][1] if self.route else self.name
        return f"{self.path}.{name}" if self.path else name

    def __str__(self) -> str:
        steps = [step if kind == "attribute" else f"[{step!r}]" for kind, step in self.route]
        return ".".join(filter(None, (self.path, *map(str, steps), self.name)))
