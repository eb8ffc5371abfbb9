"""Any Python object that holds tensors, taken apart into tensors and a skeleton, and put together.

Dicts, lists, tuples, named tuples, dataclasses and plain objects (a key/value cache, say) are
containers; everything else is a constant. This is what lets the parallel module take and return
what the original does.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Skeleton", "flatten", "rebuild"]


@dataclass(frozen=True)
class Skeleton:
    """kind: "tensor", "constant" or a container's. keys: of the children. sample: the object.

    Two skeletons are equal when their texts are: same containers, same constants.
    """

    kind: str
    sample: Any = None
    keys: tuple[Any, ...] = ()
    children: tuple[Skeleton, ...] = ()

    def __str__(self) -> str:
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
    """The tensors of `structure`, in order, and the skeleton that puts them together again."""
    tensors: list[torch.Tensor] = []
    return tensors, _flatten(structure, tensors, ())


def _flatten(item: Any, tensors: list[torch.Tensor], above: tuple[int, ...]) -> Skeleton:
    if isinstance(item, torch.Tensor):
        tensors.append(item)
        return Skeleton("tensor")
    kind, keys, values = _open(item)
    if kind == "constant" or id(item) in above:
        return Skeleton("constant", item)
    before = len(tensors)
    children = tuple(_flatten(value, tensors, (*above, id(item))) for value in values)
    if kind == "object" and len(tensors) == before:
        return Skeleton("constant", item)
    return Skeleton(kind, item, tuple(keys), children)


def _open(item: Any) -> tuple[str, list[Any], list[Any]]:
    """Kind, keys and values of a container."""
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        keys = [field.name for field in dataclasses.fields(item) if field.init]
        return "dataclass", keys, [getattr(item, key) for key in keys]
    if isinstance(item, dict):
        return "dict", list(item), list(item.values())
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return "namedtuple", list(item._fields), list(item)
    if isinstance(item, (list, tuple)):
        return "sequence", list(range(len(item))), list(item)
    if hasattr(item, "__dict__") and not isinstance(item, (type, torch.nn.Module)):
        return "object", list(vars(item)), list(vars(item).values())
    return "constant", [], []


def rebuild(skeleton: Skeleton, tensors: list[torch.Tensor]) -> Any:
    """The structure with `tensors` in their places. Inverse of `flatten`."""
    return _rebuild(skeleton, iter(tensors))


def _rebuild(skeleton: Skeleton, tensors: Any) -> Any:
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
    made = copy.copy(skeleton.sample)
    made.__dict__ = named
    return made


def _refill(sample: Any, named: dict[Any, Any]) -> Any:
    made = copy.copy(sample)
    made.update(named)
    return made
