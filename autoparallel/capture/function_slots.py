"""The arguments of a call of an autograd.Function: what an op is given, and what is part of it."""

from __future__ import annotations

import enum
import gc
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoparallel.capture.function_examination import ResultSlot
from autoparallel.errors import CaptureError

__all__ = [
    "PLAIN",
    "Slot",
    "Slots",
    "containers",
    "content",
    "filled",
    "is_held_elsewhere",
    "is_same",
    "refused",
]

PLAIN: tuple[type, ...] = (type(None), bool, float, complex, str, bytes, enum.Enum)
PLAIN = (*PLAIN, torch.dtype, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Slot:
    """The place of a tensor, an integer or a device among arguments or results.

    kind: "tensor", "integer" or "device". index: among those of its kind.
    """

    kind: str
    index: int


class Slots:
    """The tensors and integers in the arguments of one call of a Function, in order.

    >>> slots = Slots(torch.autograd.Function)
    >>> slots.template(({"scale": 0.5, "count": 3},))
    ({'scale': 0.5, 'count': Slot(kind='integer', index=0)},)
    >>> slots.integers
    [3]
    """

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        self.tensors: list[torch.Tensor] = []
        self.integers: list[Any] = []

    def template(self, item: Any, depth: int = 0) -> Any:
        """Return an argument with slots in it; remember what belongs into them.

        depth: how many containers the argument is in, that of all arguments among them. Raises
        CaptureError for what an op cannot be given.
        """
        if isinstance(item, torch.Tensor):
            if depth > 1:
                why = "autograd does not look at tensors in lists, and gives them no gradient"
                raise refused(self.cls, why, "pass each tensor as an argument of its own")
            self.tensors.append(item)
            return Slot("tensor", len(self.tensors) - 1)
        if isinstance(item, (int, torch.SymInt)) and not isinstance(item, (bool, enum.Enum)):
            self.integers.append(item)
            return Slot("integer", len(self.integers) - 1)
        if isinstance(item, torch.device):
            return Slot("device", 0)
        if isinstance(item, (list, tuple)):
            kind = list if isinstance(item, list) else tuple
            return kind(self.template(part, depth + 1) for part in item)
        if type(item) is dict and all(isinstance(key, (int, *PLAIN)) for key in item):
            return {key: self.template(part, depth + 1) for key, part in item.items()}
        if isinstance(item, PLAIN) or _is_plain_function(item):
            return item
        raise refused(
            self.cls,
            f"one of its arguments is a {type(item).__name__}",
            "pass the tensors that it reads as arguments of their own",
        )


def _is_plain_function(item: Any) -> bool:
    """Return whether it is a function by whose code all is said: none with variables around it."""
    if isinstance(item, types.BuiltinFunctionType):
        return True
    return isinstance(item, types.FunctionType) and not item.__closure__


def filled(
    template: Any, tensors: Sequence[Any], integers: Sequence[Any], device: torch.device | None
) -> Any:
    """Return a template with tensors, integers and a device in the places of its slots.

    >>> filled(["mean", Slot("integer", 0)], (), (3,), None)
    ['mean', 3]
    """
    if isinstance(template, ResultSlot):
        return tensors[template.index]
    if isinstance(template, Slot):
        if template.kind == "device":
            return device
        return (tensors if template.kind == "tensor" else integers)[template.index]
    if isinstance(template, (list, tuple)):
        return type(template)(filled(part, tensors, integers, device) for part in template)
    if isinstance(template, dict):
        return {key: filled(v, tensors, integers, device) for key, v in template.items()}
    return template


def containers(items: Iterable[Any]) -> list[Any]:
    """Return the lists and dicts among arguments, also those inside of others.

    >>> containers((1, {"a": [2]}))
    [{'a': [2]}, [2]]
    """
    result: list[Any] = []
    for item in items:
        if isinstance(item, (list, tuple, dict)):
            result += [] if isinstance(item, tuple) else [item]
            result += containers(item.values() if isinstance(item, dict) else item)
    return result


def is_held_elsewhere(args: Sequence[Any]) -> bool:
    """Return whether a list or a dict among arguments is also in an object, or in a variable that
    more than one function has: others may change it later.

    >>> kept = {"notes": [1.0]}
    >>> is_held_elsewhere((kept["notes"],)), is_held_elsewhere(([1.0],))
    (True, False)
    """
    inside = containers(args)
    known = {id(inside), id(args), *map(id, inside)}
    passing = (tuple, types.FrameType, types.GeneratorType, types.CoroutineType)
    for container in inside:
        for holder in gc.get_referrers(container):
            if id(holder) not in known and not isinstance(holder, passing):
                return True
    return False


def content(item: Any) -> Any:
    """Return what is in nested containers, as tuples of a kind, keys and contents.

    >>> content([1.0, {"a": True}])
    (<class 'list'>, 2, (1.0, (<class 'dict'>, ('a',), (True,))))
    """
    if isinstance(item, dict):
        return (dict, tuple(item), tuple(map(content, item.values())))
    if isinstance(item, (list, tuple)):
        return (type(item), len(item), tuple(map(content, item)))
    return item


def is_same(one: Any, other: Any) -> bool:
    """Return whether two contents have the same things in the same places.

    >>> notes = [1.0]
    >>> before = content(notes)
    >>> is_same(content(notes), before), notes.append(2.0), is_same(content(notes), before)
    (True, None, False)
    """
    if not isinstance(one, tuple) or not isinstance(other, tuple):
        return one is other
    return one[:2] == other[:2] and all(map(is_same, one[2], other[2]))


def refused(cls: Any, why: str, fix: str = "") -> CaptureError:
    """Return the error for a Function that no op can stand for.

    Example: `raise refused(cls, "it returns no tensor")`.
    """
    return CaptureError(
        f"the autograd.Function {cls.__name__} cannot be an op of a graph",
        why=why,
        fix=fix or "keep it in a submodule of its own, which then stays Python",
    )
