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

__all__ = ["asking_module", "recorded_write", "refuse_memory", "refuse_recorded_write"]
__all__ += ["refuse_version"]


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
    caller = asking_module(3, function.__name__)
    if function.__name__ == "__get__":
        refuse_version(caller)
        return function(*args, **kwargs)
    if _is_ours(caller):
        return function(*args, **kwargs)
    raise AutoParallelError(
        f"{caller} asks for the memory of a split tensor",
        why="this rank holds a part of it, which is not what the whole tensor's memory would be",
        fix="pass whole tensors: autoparallel.full_state_dict(model), on every rank; or "
        "tensor.full_tensor()",
    )


def asking_module(depth: int, name: str = "") -> str:
    """Return the name of the module whose code calls a function of torch.

    depth: of the frame that is called, seen from the caller. name: of a function that may stand
    between.
    """
    frame: Any = sys._getframe(depth + 1)
    # Torch's own Python, or a mode that watches calls, may stand between.
    between = ("__torch_function__", "handle_torch_function", name)
    while frame.f_back is not None and frame.f_code.co_name in between:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))


def refuse_version(caller: str, path: str = "") -> None:
    """Raise AutoParallelError where a user's code asks how often a parameter was written to.

    caller: the module that asks; torch and this package know what the count is worth. path: of the
    parameter, where it is known.
    """
    if _is_ours(caller):
        return
    raise AutoParallelError(
        f"{caller} asks for the version of {path or 'a split tensor'} (tensor._version)",
        where=path,
        why="optimizers and others write to the parts that ranks hold, and the whole tensor does "
        "not count what is written to them",
        fix="compare the values, or count the steps in an attribute: model.step += 1",
    )


def _is_ours(caller: str) -> bool:
    """Return whether a module is one of torch or of this package."""
    return f"{caller}.".startswith(("torch.", "autoparallel."))
