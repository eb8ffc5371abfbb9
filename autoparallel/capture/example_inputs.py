"""Example inputs of a model, and arguments of a call by the names of the model's forward."""

from __future__ import annotations

import inspect
import operator
import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.errors import CaptureError, InputsNeededError

__all__ = [
    "as_given",
    "bind_inputs",
    "described_signature",
    "example_call",
    "find_example_inputs",
    "split_example",
]


def find_example_inputs(model: nn.Module) -> Any:
    """Return the result of the model's own `example_inputs()`, or Hugging Face's `dummy_inputs`.

    model: dummy inputs are a dict, of which those are kept that the forward takes; where it takes
    labels, they are the tokens, so that the loss is part of what is traced. Raises
    InputsNeededError where the model has neither.
    """
    example_inputs = getattr(model, "example_inputs", None)
    if callable(example_inputs):
        return example_inputs()
    # It is a property, which fails for models that Hugging Face has no dummies for.
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
    """Return the arguments of a call by the names of the model's forward, without defaults.

    args, kwargs: of the call. Raises CaptureError where the forward does not take them.

    >>> bind_inputs(nn.Linear(4, 2), (1,), {}).arguments
    {'input': 1}
    """
    signature, names, needed = described_signature(model.forward)
    # The same for arguments of the usual kind, in a third of the time: this is asked at each call.
    if names and len(args) <= len(names):
        arguments = dict(zip(names, args, strict=False))
        arguments.update((name, kwargs[name]) for name in names[len(args) :] if name in kwargs)
        if len(arguments) == len(args) + len(kwargs) and needed <= arguments.keys():
            return inspect.BoundArguments(signature, arguments)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the inputs do not fit {type(model).__name__}.forward",
            why=str(error),
            fix="pass a tuple of positional or a dict of keyword arguments: it takes "
            f"({', '.join(_parameters(signature))})",
        ) from None


# A signature, the names of its parameters where they may all be given by position or by name (else
# none), and those of the parameters without a default.
_Signature = tuple[inspect.Signature, tuple[str, ...], frozenset[str]]


def described_signature(forward: Any) -> _Signature:
    """Return the signature of a forward, with what is asked of it at every call.

    It is the same object while the forward is: that of a method is remembered while its function,
    and all that it wraps, have the same code and defaults.

    >>> layer = nn.Linear(2, 2)
    >>> described_signature(layer.forward) is described_signature(layer.forward)
    True
    """
    function = getattr(forward, "__func__", None)
    facts = _facts(function) if type(forward) is types.MethodType else None
    if facts is None:
        return _described(inspect.signature(forward))
    known = _signatures.get(function)
    if (
        known is not None
        and len(facts) == len(known[0])
        and all(map(operator.is_, facts, known[0]))
    ):
        return known[1]
    signature = _described(inspect.signature(forward))
    _signatures[function] = (facts, signature)
    return signature


def _facts(function: Any) -> list[Any] | None:
    """Return the objects that a function's signature follows from; None where others may count.

    A function that wraps another one has the signature of that one.
    """
    facts: list[Any] = []
    while type(function) is types.FunctionType:
        own = function.__dict__
        if "__signature__" in own or "__text_signature__" in own or len(facts) > _MOST_FACTS:
            return None
        facts += (function.__code__, function.__defaults__, function.__kwdefaults__)
        if "__wrapped__" not in own:
            return facts
        function = own["__wrapped__"]
    return None


# So many facts about functions that wrap each other: a function may wrap itself.
_MOST_FACTS = 64

_signatures: weakref.WeakKeyDictionary[Any, tuple[Any, _Signature]] = weakref.WeakKeyDictionary()


def _described(signature: inspect.Signature) -> _Signature:
    """Return a signature with what is asked of it at every call."""
    parameters = signature.parameters.values()
    usual = all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)
    names = tuple(each.name for each in parameters) if usual else ()
    return signature, names, frozenset(p.name for p in parameters if p.default is p.empty)


def _parameters(signature: inspect.Signature) -> list[str]:
    """Return the parameters of a forward with defaults, without annotations: "labels=None"."""
    bare = (p.replace(annotation=p.empty) for p in signature.parameters.values())
    return [str(parameter) for parameter in bare]


def example_call(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of a call with the example inputs, the model's own where they are None.

    Raises InputsNeededError where there are none.

    >>> example_call(nn.Linear(4, 2), {"input": 1})
    ((), {'input': 1})
    """
    return split_example(find_example_inputs(model) if example_inputs is None else example_inputs)


def split_example(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as (args, kwargs).

    example_inputs: a dict of keyword arguments, a sequence of positional ones, or the only one.

    >>> split_example((1, 2)), split_example({"x": 1}), split_example(3)
    (((1, 2), {}), ((), {'x': 1}), ((3,), {}))
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def as_given(
    signature: inspect.Signature, arguments: Mapping[str, Any], positional: int
) -> tuple[list[Any], dict[str, Any]]:
    """Return bound arguments as (args, kwargs) again: the first `positional` ones by position.

    signature: of the forward. arguments: by name, as `bind_inputs` returns them. A decorated
    forward may add a keyword argument of its own, so that what came by position goes by position.

    >>> as_given(inspect.signature(lambda x, y=0: x), {"x": 1, "y": 2}, positional=1)
    ([1], {'y': 2})
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
