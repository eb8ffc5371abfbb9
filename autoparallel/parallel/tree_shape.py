"""The modules and parameters of a running model, so that others in their place are noticed."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from autoparallel.parallel.uncaptured_python import held_by

__all__ = ["TreeShape"]

_DTYPE = operator.attrgetter("dtype")


def _looks(buffer: torch.Tensor | None) -> Any:
    """Return the facts about a buffer that a program depends on."""
    if buffer is None:
        return None
    return (buffer.shape, buffer.dtype, buffer.requires_grad)


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
        self.buffers: list[tuple[dict[str, Any], str]] = []
        self.held: list[Any] = []
        self.looks: list[Any] = []
        for module in members:
            for held in (module._modules, held_by(module)):
                self.dictionaries.append(held)
                for name, item in held.items():
                    self.places.append((held, name))
                    self.seen.append(item)
            self.dictionaries.append(module._buffers)
            for name, buffer in module._buffers.items():
                self.buffers.append((module._buffers, name))
                self.held.append(buffer)
                self.looks.append(_looks(buffer))
        self.sizes = [len(held) for held in self.dictionaries]
        tensors = {id(item): item for item in self.seen if isinstance(item, nn.Parameter)}
        self.tensors = list(tensors.values())
        self.dtypes = list(map(_DTYPE, self.tensors))

    def changed(self) -> bool:
        """Return whether there is another module or parameter now, or a parameter of another type.

        This is asked at every call. All are fetched into a list, which is compared by identity.
        """
        now = [held.get(name) for held, name in self.places]
        if not all(map(operator.is_, now, self.seen)):
            return True
        if list(map(_DTYPE, self.tensors)) != self.dtypes:
            return True
        # A program reads the buffer that is there, which may be another tensor of the same kind.
        for index, (held, name) in enumerate(self.buffers):
            buffer = held.get(name)
            if buffer is not self.held[index]:
                if _looks(buffer) != self.looks[index]:
                    return True
                self.held[index] = buffer
        return list(map(len, self.dictionaries)) != self.sizes
