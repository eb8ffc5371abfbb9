"""The modules and parameters of a running model, so that others in their place are noticed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.shown_parameters import held_by
from autoparallel.support.seen_places import SeenPlaces
from autoparallel.support.torch_private import without_function_overrides

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
        members = list(members)
        self.members, self.kinds = members, list(map(type, members))
        self.dictionaries: list[dict[str, Any]] = []
        self.items = SeenPlaces()
        self.buffers = SeenPlaces()
        for module in members:
            for held in (module._modules, held_by(module)):
                for name, item in held.items():
                    self.items.add(held, name, item)
                # A forward that walks through a list meets what is added; one that has no list of
                # such does not.
                if held:
                    self.dictionaries.append(held)
            for name, buffer in module._buffers.items():
                self.buffers.add(module._buffers, name, buffer)
        self.names = list(itertools.chain.from_iterable(self.dictionaries))
        self.looks = list(map(_looks, self.buffers.seen))
        parameters = {id(one): one for one in self.items.seen if isinstance(one, nn.Parameter)}
        self.parameters = list(parameters.values())
        self.dtypes = list(map(_DTYPE, self.parameters))

    def changed(self) -> bool:
        """Return whether there is another module or parameter now, or a parameter of another type.

        This is asked at every call.
        """
        if not self.items.same():
            return True
        # What is missing was found above, so that this tells of what is new, and of another order.
        if list(itertools.chain.from_iterable(self.dictionaries)) != self.names:
            return True
        with without_function_overrides():
            dtypes = list(map(_DTYPE, self.parameters))
        if dtypes != self.dtypes:
            return True
        if self.buffers.same():
            return False
        # A program reads the buffer that is there, which may be another tensor of the same kind.
        buffers = self.buffers.now()
        for index, buffer in enumerate(buffers):
            self.buffers.see(index, buffer)
        return list(map(_looks, buffers)) != self.looks

    def refuse_classes(self) -> None:
        """Raise AutoParallelError where a module was given another class in place of its own.

        This is asked at every call, too.
        """
        kinds = list(map(type, self.members))
        if all(map(operator.is_, kinds, self.kinds)):
            return
        for now, before in zip(kinds, self.kinds, strict=True):
            if now != before:  # a split module's class is equal to the user's
                raise AutoParallelError(
                    f"a module of the split model was given the class {now.__name__}",
                    why=f"its program was made of its forward as a {before.__name__}",
                    fix="put another module in its place, or set the class before the model is "
                    "split",
                )
        self.kinds = kinds

    def has_same_modules(self) -> bool:
        """Return whether the modules, and the names of all that is in them, are the same."""
        if list(itertools.chain.from_iterable(self.dictionaries)) != self.names:
            return False
        pairs = zip(self.items.now(), self.items.seen, strict=True)
        return (
            all(
                now is seen or (isinstance(now, nn.Parameter) and isinstance(seen, nn.Parameter))
                for now, seen in pairs
            )
            and list(map(_looks, self.buffers.now())) == self.looks
        )

    def dtypes_by_id(self) -> dict[int, torch.dtype]:
        """Return the types that the parameters had, by their ids."""
        return {id(one): dtype for one, dtype in zip(self.parameters, self.dtypes, strict=True)}
