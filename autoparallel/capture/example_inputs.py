"""What a module is called with: example inputs, and arguments by the names of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.errors import CaptureError, InputsNeededError

__all__ = ["as_given", "bind_inputs", "find_example_inputs", "split_example"]


def find_example_inputs(model: nn.Module) -> Any:
    """The model's own `example_inputs()` or Hugging Face `dummy_inputs`.

    Raises InputsNeededError where there is neither.
    """
    own = getattr(model, "example_inputs", None)
    if callable(own):
        return own()
    try:
        dummies = getattr(model, "dummy_inputs", None)
    except (AttributeError, NotImplementedError, TypeError):
        dummies = None
    if isinstance(dummies, Mapping) and dummies:
        names = inspect.signature(model.forward).parameters
        inputs = {key: value for key, value in dummies.items() if key in names}
        if inputs:
            ids = inputs.get("input_ids")
            if isinstance(ids, torch.Tensor) and "labels" in names and "labels" not in inputs:
                inputs["labels"] = ids.clone()
            return inputs
    raise InputsNeededError(
        f"no example inputs for {type(model).__name__}",
        why="planning follows real shapes through the model, and the model offers none",
        fix="pass example_inputs=(x, ...) or a dict of keyword arguments, or give the model a "
        "method example_inputs()",
    )


def bind_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The call's arguments by the names of the model's forward."""
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the inputs do not fit {type(model).__name__}.forward",
            why=str(error),
            fix="pass a tuple of positional or a dict of keyword arguments: it takes "
            f"({', '.join(_parameters(signature))})",
        ) from None


def _parameters(signature: inspect.Signature) -> list[str]:
    """The arguments with their defaults, without annotations: "labels=None"."""
    bare = (p.replace(annotation=p.empty) for p in signature.parameters.values())
    return [str(parameter) for parameter in bare]


def split_example(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs): a tensor, a sequence or a dict of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def as_given(
    signature: inspect.Signature, arguments: Mapping[str, Any], positional: int
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by name, as they were given: the first `positional` ones by position.

    A decorated forward may have a keyword argument that it must not be given twice.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif len(args) < positional and kind is not inspect.Parameter.KEYWORD_ONLY:
            args.append(value)
        else:
            kwargs[name] = value
    return args, kwargs
