"""The tensors among what a function of torch is called with, and others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["replaced_tensors", "tensors_among", "without_own_device", "written_argument"]


def tensors_among(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among a function's arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_among(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_among(item)


def replaced_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return arguments or results with another tensor for each."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)([replaced_tensors(item, change) for item in value])
    if type(value) is dict:
        return {key: replaced_tensors(item, change) for key, item in value.items()}
    # A result such as that of `max` is a tuple with names.
    if isinstance(value, tuple):
        return type(value)([replaced_tensors(item, change) for item in value])
    return value


def without_own_device(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the arguments without the device on which the tensor lies already.

    "cpu:0" is "cpu", too. DTensor tries what is given a device on the meta device, and raises
    "Cannot copy out of meta tensor".
    """
    here = args[0].device

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.device | str):
            return value
        to = torch.device(value)
        same = to.type == here.type and (here.type == "cpu" or to.index in (None, here.index))
        return None if same else value

    if "device" in kwargs:
        kwargs = {**kwargs, "device": moved(kwargs["device"])}
    return (*args[:1], *map(moved, args[1:])), kwargs


def written_argument(args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a function, to which it writes if it writes to any."""
    return args[0] if args else next(iter(kwargs.values()), None)
