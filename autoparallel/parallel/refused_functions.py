"""Functions that a split tensor refuses: writes that autograd records, and reads of its memory."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.function_arguments import (
    tensors_among,
)

__all__ = ["recorded_write", "refuse_memory", "refuse_recorded_write"]


def refuse_recorded_write(function: Any, target: Any) -> None:
    """Raise an error for a function that writes to a split tensor where autograd records it."""
    for tensor in tensors_among(target):
        if not torch.is_grad_enabled() or not isinstance(tensor, DTensor):
            continue
        if tensor.is_leaf and tensor.requires_grad:
            # In torch's own words, because it is the user's mistake, and not one of splitting.
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation."
            )
        if tensor.requires_grad:
            raise recorded_write(function)


def recorded_write(function: Any) -> AutoParallelError:
    """Return the error for a function that writes in place what autograd is to record."""
    return AutoParallelError(
        f"{function.__name__} writes to a split tensor in place, which autograd records",
        why="it was run on the whole value, of which each rank keeps a part",
        fix="use the function that returns its result: tensor = tensor.add(other)",
    )


def refuse_memory(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Refuse libraries that read a split tensor's memory; torch itself knows that it has none."""
    frame: Any = sys._getframe(3)
    # Torch's own Python, or a mode that watches calls, may stand between.
    between = ("__torch_function__", "handle_torch_function", function.__name__)
    while frame.f_back is not None and frame.f_code.co_name in between:
        frame = frame.f_back
    caller = str(frame.f_globals.get("__name__"))
    if caller.startswith(("torch.", "autoparallel.")):
        return function(*args, **kwargs)
    raise AutoParallelError(
        f"{caller} asks for the memory of a split tensor",
        why="this rank holds a part of it, which is not what the whole tensor's memory would be",
        fix="pass whole tensors: autoparallel.full_state_dict(model), on every rank; or "
        "tensor.full_tensor()",
    )
