"""Functions of torch.autograd that are given gradients, on split tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autoparallel.parallel.cut_values import without_sums
from autoparallel.parallel.function_arguments import replaced_tensors
from autoparallel.parallel.recorded_gathers import recorded_part, recorded_whole

__all__ = ["derived"]


def derived(function: Any, args: Any, kwargs: dict[str, Any], kind: type[DTensor]) -> Any:
    """Run a function of torch.autograd, with the gradients that it is given split as what they are
    of: whole ones are those of a user who knows of no parts.

    kind: the class of DTensor that parts of gradients are of.
    """
    names = _GIVEN_GRADIENTS[function]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    outputs, given = named.get(names[0]), named.get(names[-1])
    if isinstance(outputs, torch.Tensor):
        named[names[-1]] = replaced_tensors(given, lambda one: _as_given(one, outputs, kind))
    elif given is not None and outputs is not None:
        given = [given] if isinstance(given, torch.Tensor) else given
        named[names[-1]] = [
            _as_given(one, output, kind) for one, output in zip(given, outputs, strict=False)
        ]
    positional = [named.pop(name) for name in names] if len(args) > len(names) else []
    return function(*positional, *args[len(names) :], **named)


# The first parameters of functions that are given gradients: from what these are of to them.
_GIVEN_GRADIENTS: dict[Any, tuple[str, ...]] = {
    torch.autograd.grad: ("outputs", "inputs", "grad_outputs"),
    torch.autograd.backward: ("tensors", "grad_tensors"),
    torch.Tensor.backward: ("self", "gradient"),
}


def _as_given(gradient: Any, output: Any, kind: type[DTensor]) -> Any:
    """Return a gradient in the form of the tensor that it is of: split alike, or whole."""
    if isinstance(gradient, DTensor) and not isinstance(output, DTensor):
        return recorded_whole(gradient, kind)
    whole = isinstance(gradient, torch.Tensor) and not isinstance(gradient, DTensor)
    if whole and isinstance(output, DTensor) and gradient.shape == output.shape:
        return recorded_part(gradient, output.device_mesh, without_sums(output.placements), kind)
    return gradient
