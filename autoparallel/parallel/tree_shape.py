"""The modules and parameters of a running model, so that others in their place are noticed."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import nn

from autoparallel.parallel.uncaptured_python import held_by

__all__ = ["TreeShape"]


class TreeShape:
    """The modules, parameters and names of buffers that a split module had when it was looked at.

    members: the module and all in it.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> shape = TreeShape(model.modules())
    >>> before = shape.changed()
    >>> model[1] = nn.Tanh()
    >>> before, shape.changed()
    (False, True)
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        self.places: list[tuple[dict[str, Any], str]] = []
        self.seen: list[Any] = []
        self.dictionaries: list[dict[str, Any]] = []
        for module in members:
            for held in (module._modules, held_by(module)):
                self.dictionaries.append(held)
                for name, item in held.items():
                    self.places.append((held, name))
                    self.seen.append(item)
            self.dictionaries.append(module._buffers)
        self.sizes = [len(held) for held in self.dictionaries]

    def changed(self) -> bool:
        """Return whether there is another module or parameter now, or another number of any.

        This is asked at every call. All are fetched into a list, which is compared by identity.
        """
        now = [held.get(name) for held, name in self.places]
        if not all(map(operator.is_, now, self.seen)):
            return True
        return list(map(len, self.dictionaries)) != self.sizes

    def parameters(self) -> dict[tuple[int, str], Any]:
        """Return the parameters that were seen, by the dictionary's id and the name."""
        return {
            (id(held), name): item
            for (held, name), item in zip(self.places, self.seen, strict=True)
            if isinstance(item, nn.Parameter)
        }
