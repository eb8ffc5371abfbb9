"""Models that are refused: those that are wrapped already, and those that torch.export refuses."""

from __future__ import annotations

import traceback

import torch
from torch import nn

from autoparallel.errors import AutoParallelError, CaptureError, WrappedModelError

__all__ = ["export_failure", "refuse_wrapped"]


def refuse_wrapped(model: object) -> None:
    """Raise WrappedModelError for a model that another engine has already split or wrapped.

    model: what the user passes as one. Raises AutoParallelError for what is no module at all.

    >>> refuse_wrapped(nn.Linear(2, 3))
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(model, nn.Module):
        text = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise AutoParallelError(
            f"the model is no nn.Module but {text}",
            fix="pass a module: an instance of a class, or a function wrapped in one's forward",
        )
    for path, module in model.named_modules():
        name = type(module).__name__
        wrapped = name in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
        if wrapped or name.startswith("FSDP"):
            raise WrappedModelError(
                f"the model is already wrapped in {name}",
                where=path or "the model itself",
                why="its parameters or its forward are already another engine's",
                fix="pass the plain module (model.module for DistributedDataParallel)",
            )
    for path, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise WrappedModelError(
                "the model's parameters are already distributed (DTensor)",
                where=path,
                why="another engine, or autoparallelize itself, has split it",
                fix="pass the plain module",
            )


def export_failure(error: BaseException, model: nn.Module) -> CaptureError:
    """Return the error for an export that failed, with the user's own line and the likely cause.

    error: as torch.export has raised it. model: that was exported.

    >>> print(export_failure(ValueError("no"), nn.Linear(2, 3)).what)
    Linear.forward could not be traced
    """
    text = str(error)
    frames = traceback.extract_tb(error.__traceback__)
    root = torch.__path__[0]
    here = __file__.rsplit("/", 2)[0]
    theirs = [f for f in frames if not f.filename.startswith((root, here, "<"))]
    where = ""
    if theirs:
        last = theirs[-1]
        where = f"{last.filename}:{last.lineno}  {last.line}"
    # Torch has many exceptions for this, some without a type of their own; "u0" is what it calls a
    # size that depends on values.
    dependent = any(
        sign in f"{type(error).__name__} {text}"
        for sign in ("GuardOnDataDependent", "data-dependent", "Could not guard", "unbacked", "u0")
    )
    if dependent:
        return CaptureError(
            f"{type(model).__name__}.forward branches on the values of a tensor",
            where=where,
            why="a graph has one path for all data"
            + ("" if where else "; " + text.strip().split("\n")[0][:200]),
            fix="write the choice with torch.where, or move it out of the module that is split",
        )
    return CaptureError(
        f"{type(model).__name__}.forward could not be traced",
        where=where,
        why=f"{type(error).__name__}: {text.strip().splitlines()[0][:300] if text else ''}",
        fix="see whether torch.export takes it, with strict=False",
    )
