"""The local tensors of all parameters of a program, asked for at every call.

To ask each parameter takes three microseconds, which for a small model is as much as its ops take.
Here all are looked at together, by loops that run in C.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autoparallel.parallel.gradients_together import local_together
from autoparallel.parallel.parameters import LocalParameter
from autoparallel.support.seen_places import SeenPlaces
from autoparallel.support.torch_private import local_parts

__all__ = ["LocalParameters"]

_SAME = operator.is_
_DTYPE, _TRAINED = operator.attrgetter("dtype"), operator.attrgetter("requires_grad")
_ADDRESS = torch.Tensor.data_ptr


class LocalParameters:
    """The local tensors of a program's parameters, in the order in which it takes them.

    leaves: the parameters one by one; they say what each local tensor is, and when it is made anew.
    """

    def __init__(self, leaves: Sequence[LocalParameter]) -> None:
        self.leaves = leaves
        self.copies = [leaf.copy for leaf in leaves if leaf.copy is not None]
        # A copy that was gathered may be another one at each call.
        self.copied = [index for index, leaf in enumerate(leaves) if leaf.copy is not None]
        self.forget()

    def forget(self) -> None:
        """Ask every parameter by itself at the next call."""
        self.places: SeenPlaces | None = None
        self.locals: list[torch.Tensor] = []
        self.stream: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the local tensors, which cannot be copied apart from their parameters."""
        return {**vars(self), "places": None, "locals": [], "stream": None}

    def get(self, stream: Any = None) -> list[torch.Tensor]:
        """Return the local tensors of the parameters as they are now; see `LocalParameter.get`.

        Functions of split tensors must be off: `without_function_overrides`.
        """
        if self.stream == stream and self._unchanged():
            if not self.copied:
                return self.locals
            result = list(self.locals)
            for index in self.copied:
                result[index] = self.leaves[index].get(stream)
            return result
        self.locals = [leaf.get(stream) for leaf in self.leaves]
        parameters = [leaf.owner[leaf.name] for leaf in self.leaves]
        ways = [
            None if local is parameter or leaf.copy is not None else leaf.way
            for leaf, local, parameter in zip(self.leaves, self.locals, parameters, strict=True)
        ]
        for index, local in local_together(ways, parameters, self.locals).items():
            self.locals[index] = local
        self.places, self.stream = SeenPlaces(), stream
        for leaf, parameter in zip(self.leaves, parameters, strict=True):
            self.places.add(leaf.owner, leaf.name, parameter)
        # What is a parameter itself needs no more than to be the same one.
        made = [
            parameter
            for parameter, local in zip(parameters, self.locals, strict=True)
            if local is not parameter
        ]
        self.split = [each for each in made if isinstance(each, DTensor)]
        self.whole = [each for each in made if not isinstance(each, DTensor)]
        self.own = not made
        self.parts = list(local_parts(self.split))
        self.facts = self._facts()
        return self.locals

    def _unchanged(self) -> bool:
        """Return whether the same parameters have the same memory, types and need of gradients."""
        if self.places is None or not self.places.same():
            return False
        # A parameter that is not split is mostly its own local tensor.
        return self.own or (
            all(map(_SAME, local_parts(self.split), self.parts)) and self._facts() == self.facts
        )

    def _facts(self) -> list[Any]:
        """Return what makes local tensors others, if it changes, of the same parameters."""
        return [
            *map(type, self.split),
            # A DTensor has an address of its own only once it was given other memory.
            *map(_ADDRESS, self.split),
            *map(_ADDRESS, self.parts),
            *map(_DTYPE, self.parts),
            *map(_ADDRESS, self.whole),
            *map(_DTYPE, self.whole),
            *map(_TRAINED, self.split),
            *map(_TRAINED, self.whole),
        ]
