"""Arguments of calls by names, and taken apart, for calls that are like earlier ones.

Most calls are given tensors by the same names each time. What such a call looks like is remembered,
because to bind the arguments and to describe them takes as long as several ops of a small model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.capture.example_inputs import bind_inputs, described_signature
from autoparallel.support.pytree import Skeleton, emptied, flatten

__all__ = ["FlatCalls"]

# Values that say all of themselves. Zeros of floats have signs, which compare equal.
_SIMPLE = frozenset({bool, int, str, type(None)})
_MOST = 64


class FlatCalls:
    """Takes the arguments of one module's calls apart.

    >>> calls, layer = FlatCalls(), nn.Linear(2, 2)
    >>> names, inputs, skeleton = calls.flattened(layer, (torch.ones(2),), {})
    >>> names, len(inputs), str(skeleton)
    (['input'], 1, "dict('input': *)")
    >>> calls.flattened(layer, (), {"input": torch.ones(3)})[2] == skeleton
    True
    """

    def __init__(self) -> None:
        # By the form of a call: the signature that it was bound to, the names of the arguments, the
        # places of the tensors among those that were given, and the structure.
        self.known: dict[Any, tuple[Any, list[str], list[int], Skeleton]] = {}

    def flattened(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[list[str], list[torch.Tensor], Skeleton]:
        """Return the names of a call's arguments, the tensors among them, and the structure.

        model: whose forward takes them. Raises CaptureError where it does not.
        """
        given = [*args, *kwargs.values()]
        form: list[Any] = [len(args), *kwargs]
        for value in given:
            kind = type(value)
            if kind is torch.Tensor:
                form.append(kind)
            elif kind in _SIMPLE:
                form.append((kind, value))
            else:
                arguments = bind_inputs(model, args, kwargs).arguments
                return list(arguments), *flatten(dict(arguments))
        key = tuple(form)
        known, signature = self.known.get(key), described_signature(model.forward)
        if known is not None and known[0] is signature:
            return known[1], [given[place] for place in known[2]], known[3]
        arguments = bind_inputs(model, args, kwargs).arguments
        names = list(arguments)
        inputs, skeleton = flatten(dict(arguments))
        by_position = list(signature[0].parameters)[: len(args)]
        places = [*by_position, *kwargs]
        kinds = [signature[0].parameters[name].kind for name in by_position]
        several = inspect.Parameter.VAR_POSITIONAL
        # What came by no name of its own is in a container.
        if several not in kinds and set(names) == set(places) and len(places) == len(given):
            order = [places.index(name) for name in names]
            if len(self.known) >= _MOST:
                self.known.clear()
            tensors = [place for place in order if type(given[place]) is torch.Tensor]
            self.known[key] = (signature, names, tensors, emptied(skeleton))
        return names, inputs, skeleton
