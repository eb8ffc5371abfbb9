"""Buffers that a forward assigns (`self.mean = ...`) are written in place, as graphs have it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from autoparallel.capture.module_tensors import MODULE_ATTRIBUTES
from autoparallel.errors import CaptureError
from autoparallel.support.memory_writes import memory_of
from autoparallel.support.module_paths import join_path
from autoparallel.support.pytree import flatten

__all__ = ["writing_assigned_buffers"]

_Place = tuple[str, nn.Module, str, torch.Tensor]


@contextlib.contextmanager
def writing_assigned_buffers(model: nn.Module, results: list[Any]) -> Iterator[None]:
    """Have the buffers be the same tensors at the end, with the values of those assigned within.

    results: the list to which the forward's result is appended, in here. Raises CaptureError where
    writing to the tensor that was there would be something else than putting another in its place.

    >>> norm, results = nn.BatchNorm1d(2), []
    >>> before = norm.running_mean
    >>> with writing_assigned_buffers(norm, results):
    ...     norm.running_mean = torch.ones(2)
    >>> norm.running_mean is before, before.tolist()
    (True, [1.0, 1.0])
    """
    places = list(_places(model))
    yield
    assigned = [row for row in places if _is_other(*row[1:])]
    if not assigned:
        return
    left = _left(model, results)
    # All are read before one is written: a forward may exchange two.
    values = [_value(*row, left) for row in assigned]
    for (_, module, name, before), value in zip(assigned, values, strict=True):
        with torch.no_grad():
            before.copy_(value)
        module._buffers[name] = before


def _places(model: nn.Module) -> Iterator[_Place]:
    """Yield (path, module, name, tensor) of the buffers, past classes that hide some."""
    for path, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                yield join_path(path, name), module, name, buffer


def _is_other(module: nn.Module, name: str, before: torch.Tensor) -> bool:
    """Return whether a buffer is another tensor now; one that was taken away is none."""
    after = module._buffers.get(name)
    return after is not None and after is not before


def _left(model: nn.Module, results: list[Any]) -> set[int]:
    """Return the memory of the tensors that a forward returns, or leaves in attributes."""
    tensors, _ = flatten(results)
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in MODULE_ATTRIBUTES and isinstance(value, torch.Tensor):
                tensors.append(value)
    return {memory for tensor in tensors if (memory := memory_of(tensor)) is not None}


def _value(
    path: str, module: nn.Module, name: str, before: torch.Tensor, left: set[int]
) -> torch.Tensor:
    """Return a copy of the tensor that was assigned to a buffer. Raises CaptureError, see above.

    path: of the buffer. before: the tensor that was there. left: memory that is seen afterwards.
    """
    after: Any = module._buffers[name]
    why = None
    if after.shape != before.shape or after.dtype != before.dtype:
        why = f"it was {list(before.shape)} of {before.dtype}, and becomes {list(after.shape)} of "
        why += str(after.dtype)
    elif after.requires_grad:
        why = "a gradient flows through the tensor that is assigned, into the calls before"
    elif memory_of(before) in left:
        why = "the tensor that was there is returned or kept, and would be written to"
    if why is not None:
        raise CaptureError(
            f"the forward assigns another tensor to buffer {path}",
            why=why,
            fix=f"write to it in place: {path.rpartition('.')[2]}.copy_(value), of a value without "
            "a gradient (value.detach())",
        )
    return after.clone()
