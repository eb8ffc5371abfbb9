"""One write of a traced forward to what a module holds, and how it is done again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from autoparallel.support.object_state import own_attributes, put_attribute

__all__ = ["AttributeWrite", "Step"]

Step = tuple[str, Any]  # what is set, and under which name or key


def _set_item(owner: Any, key: Any, value: Any) -> None:
    owner[key] = value


def _set_content(owner: Any, _: Any, value: Any) -> None:
    # Of a dict, a list or a deque: it stays the object that others may hold too.
    owner.clear()
    (owner.update if isinstance(owner, dict) else owner.extend)(value)


_ENTER: Mapping[str, Callable[[Any, Any], Any]] = {
    "attribute": lambda owner, name: own_attributes(owner)[name],
    "item": lambda owner, key: owner[key],
}
_SET: Mapping[str, Callable[[Any, Any, Any], None]] = {
    "attribute": put_attribute,
    "item": _set_item,
    "content": _set_content,
}


@dataclass(frozen=True)
class AttributeWrite:
    """A place to which a forward writes at every call.

    path: of the module by which the place is reached. route: the steps from there, each
    ("attribute", name) or ("item", key); the last one is set, and may be ("content", None) for all
    that a list or a dict holds.
    """

    path: str
    route: tuple[Step, ...]

    def put(self, model: nn.Module, value: Any) -> None:
        """Write a value to this place in a model.

        >>> model = nn.Linear(2, 2)
        >>> AttributeWrite("", (("attribute", "penalty"),)).put(model, 0.5)
        >>> model.penalty
        0.5
        """
        kind, key = self.route[-1]
        _SET[kind](self.owner(model), key, value)

    def owner(self, model: nn.Module) -> Any:
        """Return the module, object or container in a model that holds this place."""
        owner: Any = model.get_submodule(self.path)
        for kind, key in self.route[:-1]:
            owner = _ENTER[kind](owner, key)
        return owner

    def __str__(self) -> str:
        steps = [
            f"[{key!r}]" if kind == "item" else f".{key}"
            for kind, key in self.route
            if kind != "content"
        ]
        return "".join([self.path, *steps]).removeprefix(".")
