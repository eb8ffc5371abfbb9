"""Pytrees: any object that holds tensors, taken apart into tensors and a skeleton, and rebuilt."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from autoparallel.support.module_paths import join_path

__all__ = [
    "SYMBOLIC",
    "Skeleton",
    "emptied",
    "flatten",
    "leaf_paths",
    "rebuild",
    "with_constants",
]

# Numbers that a tracer does not know, such as sizes of inputs. They look like plain objects.
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Skeleton:
    """A structure without its tensors: a tree of containers and constants.

    kind: "tensor", "constant", or the container's: "dict", "sequence", "namedtuple", "dataclass" or
    "object". sample: the object that was taken apart, which tells the class when it is rebuilt.
    keys, children: of a container, in one order.

    Two skeletons are equal when their texts are: the same containers with the same constants.
    Constants that are neither numbers nor texts are compared by their type alone.
    """

    kind: str
    sample: Any = None
    keys: tuple[Any, ...] = ()
    children: tuple[Skeleton, ...] = ()

    @property
    def tensors(self) -> int:
        """The number of tensors in the structure."""
        return (self.kind == "tensor") + sum(child.tensors for child in self.children)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        """The text by which skeletons are compared, in every call of a parallel module."""
        if self.kind == "tensor":
            return "*"
        if self.kind == "constant":
            simple = isinstance(self.sample, (bool, int, float, complex, str, bytes, type(None)))
            return repr(self.sample) if simple else f"<{type(self.sample).__name__}>"
        inside = ", ".join(
            f"{key!r}: {child}" for key, child in zip(self.keys, self.children, strict=True)
        )
        return f"{type(self.sample).__qualname__}({inside})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


def flatten(structure: Any) -> tuple[list[torch.Tensor], Skeleton]:
    """Return the tensors of `structure`, in order, and the skeleton that puts them together again.

    Dicts, lists, tuples, named tuples, dataclasses and plain objects (a key/value cache, say) are
    containers; everything else is a constant. An object that holds no tensor is a constant too.

    >>> tensors, skeleton = flatten({"x": torch.zeros(2), "y": [3, None]})
    >>> len(tensors), str(skeleton)
    (1, "dict('x': *, 'y': list(0: 3, 1: None))")
    """
    tensors: list[torch.Tensor] = []
    return tensors, _flatten(structure, tensors, ())


def leaf_paths(skeleton: Skeleton, kind: str, path: str = "") -> dict[str, Any]:
    """Return the leaves of one kind by the keys that lead to them, in order: "past_key_values.0.1".

    >>> leaf_paths(flatten({"ids": torch.zeros(2), "cache": [torch.zeros(2)]})[1], "tensor")
    {'ids': None, 'cache.0': None}
    """
    if not skeleton.children:
        return {path: skeleton.sample} if skeleton.kind == kind else {}
    found: dict[str, Any] = {}
    for key, child in zip(skeleton.keys, skeleton.children, strict=True):
        found |= leaf_paths(child, kind, join_path(path, str(key)))
    return found


def _flatten(item: Any, tensors: list[torch.Tensor], above: tuple[int, ...]) -> Skeleton:
    """Return the skeleton of one item.

    tensors: appended to. above: ids of the containers around it.
    """
    if isinstance(item, torch.Tensor):
        tensors.append(item)
        return Skeleton("tensor")
    kind, keys, values = _open(item)
    # An object that contains itself (a module's parent, say) would never end.
    if kind == "constant" or id(item) in above:
        return Skeleton("constant", item)
    before = len(tensors)
    children = tuple(_flatten(value, tensors, (*above, id(item))) for value in values)
    # Rebuilding copies an object, and one without tensors (a config) must stay the one it is.
    if kind == "object" and len(tensors) == before:
        return Skeleton("constant", item)
    return Skeleton(kind, item, tuple(keys), children)


def _open(item: Any) -> tuple[str, list[Any], list[Any]]:
    """Return the kind, the keys and the values of a container; ("constant", [],
    []) for anything else.
    """
    if isinstance(item, SYMBOLIC):
        return "constant", [], []
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        keys = [field.name for field in dataclasses.fields(item) if field.init]
        return "dataclass", keys, [getattr(item, key) for key in keys]
    if isinstance(item, dict):
        return "dict", list(item), list(item.values())
    # Before plain tuples, whose classes take one sequence and not each value by itself.
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return "namedtuple", list(item._fields), list(item)
    if isinstance(item, (list, tuple)):
        return "sequence", list(range(len(item))), list(item)
    if hasattr(item, "__dict__") and not isinstance(item, (type, torch.nn.Module)):
        return "object", list(vars(item)), list(vars(item).values())
    return "constant", [], []


def rebuild(skeleton: Skeleton, tensors: list[torch.Tensor]) -> Any:
    """Return the structure with `tensors` in their places. Inverse of `flatten`.

    skeleton: of the structure. tensors: as many as it has places, in the order that `flatten` gave.

    >>> tensors, skeleton = flatten((1, torch.zeros(2)))
    >>> rebuild(skeleton, ["replaced"])
    (1, 'replaced')
    """
    return _rebuild(skeleton, iter(tensors))


# A rebuilt one is a new one, of which the sample tells no more than the class.
_EMPTY: dict[Any, Any] = {dict: {}, list: [], tuple: ()}


def emptied(skeleton: Skeleton) -> Skeleton:
    """Return an equal skeleton whose samples of dicts, lists and tuples hold nothing.

    That of a call holds the call's tensors, with all that autograd has recorded of them: who keeps
    it for later calls keeps its structure alone. Other objects are left as they are.

    >>> skeleton = flatten([torch.zeros(2), 1])[1]
    >>> emptied(skeleton) == skeleton, len(skeleton.sample), len(emptied(skeleton).sample)
    (True, 2, 0)
    """
    if not skeleton.children:
        return skeleton
    sample = _EMPTY.get(type(skeleton.sample), skeleton.sample)
    return replace(skeleton, sample=sample, children=tuple(map(emptied, skeleton.children)))


def with_constants(skeleton: Skeleton, change: Callable[[Any], Any]) -> Skeleton:
    """Return the skeleton with other constants.

    change: a function from each constant to the one in its place.

    >>> str(with_constants(flatten([1, {"x": 2}])[1], lambda constant: constant + 1))
    "list(0: 2, 1: dict('x': 3))"
    """
    if skeleton.kind == "constant":
        return replace(skeleton, sample=change(skeleton.sample))
    children = tuple(with_constants(child, change) for child in skeleton.children)
    return replace(skeleton, children=children)


def _rebuild(skeleton: Skeleton, tensors: Any) -> Any:
    """Return one item of the structure. tensors: an iterator, of which the item takes its own."""
    if skeleton.kind == "tensor":
        return next(tensors)
    if skeleton.kind == "constant":
        return skeleton.sample
    values = [_rebuild(child, tensors) for child in skeleton.children]
    named = dict(zip(skeleton.keys, values, strict=True))
    kind = type(skeleton.sample)
    if skeleton.kind == "dataclass":
        return kind(**named)
    if skeleton.kind == "dict":
        return named if kind is dict else _refill(skeleton.sample, named)
    if skeleton.kind == "namedtuple":
        return kind(**named)
    if skeleton.kind == "sequence":
        return kind(values)
    # Not by its __init__, of which nothing is known; the copy shares the sample's class alone.
    rebuilt_object = copy.copy(skeleton.sample)
    rebuilt_object.__dict__ = named
    return rebuilt_object


def _refill(sample: Any, named: dict[Any, Any]) -> Any:
    """Return a dict of a class of its own (an OrderedDict, a model's output) with other values."""
    filled = copy.copy(sample)
    filled.update(named)
    return filled
