"""Models that are refused: those that are wrapped already, and those that torch.export refuses."""

from __future__ import annotations

import functools
import inspect
import itertools
import traceback
import types

import torch
from torch import nn

from autoparallel.capture.branch_ways import ValueBranchError
from autoparallel.capture.source_files import HANDS_ON
from autoparallel.errors import AliasError, AutoParallelError, CaptureError, WrappedModelError
from autoparallel.support.memory_writes import memory_of
from autoparallel.support.pytree import Skeleton, leaf_paths

__all__ = ["export_failure", "refuse_running", "refuse_shared_memory", "refuse_wrapped"]


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
        if isinstance(module, torch.jit.ScriptModule):
            raise WrappedModelError(
                "a module is compiled by torch.jit",
                where=path or "the model itself",
                why="its forward is no Python that could be traced, and its class takes no other",
                fix="pass the module as it was before torch.jit.script or torch.jit.trace",
            )
        # module.compile() keeps code that computes with the weights of this very module.
        if name == "OptimizedModule" or vars(module).get("_compiled_call_impl") is not None:
            raise WrappedModelError(
                "a module is compiled by torch.compile",
                where=path or "the model itself",
                why="its forward is code for the whole module, which has no parts to split",
                fix="pass the module as it was before, and compile the split one: "
                "torch.compile(model), or model.compile()",
            )
    for path, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise WrappedModelError(
                "a parameter has no size yet",
                where=path,
                why="a lazy module makes its weights when it is called, and they are split before",
                fix="call the model once, then split it",
            )
        if isinstance(parameter, DTensor):
            raise WrappedModelError(
                "the model's parameters are already distributed (DTensor)",
                where=path,
                why="another engine, or autoparallelize itself, has split it",
                fix="pass the plain module",
            )
    refuse_shared_memory(model)


def refuse_running(outputs: Skeleton, model: nn.Module) -> None:
    """Raise CaptureError where a forward returns something that goes on running.

    outputs: the skeleton of what it returned. A generator runs the rest of the forward later, and a
    function may hold tensors of the trace.

    >>> from autoparallel.support.pytree import flatten
    >>> refuse_running(flatten([1, torch.ones(2)])[1], nn.Linear(2, 2))
    """
    for path, constant in leaf_paths(outputs, "constant").items():
        function = isinstance(constant, (types.FunctionType, functools.partial))
        if function or hasattr(type(constant), "__next__") or inspect.iscoroutine(constant):
            raise CaptureError(
                f"{type(model).__name__}.forward returns a {type(constant).__name__}",
                where=path,
                why="what it computes when it is used is not part of the trace",
                fix="return tensors, in containers of any kind",
            )


def refuse_shared_memory(model: nn.Module) -> None:
    """Raise AliasError for a parameter whose memory is another tensor's of the model, too.

    One tensor in several places is tied, and stays so. Two tensors in one memory would become two
    of their own, each on its ranks, and a step of one would no longer change the other.

    >>> refuse_shared_memory(nn.Linear(2, 2))
    """
    held: dict[int, tuple[str, torch.Tensor]] = {}
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        held.setdefault(id(tensor), (path, tensor))
    ranges: dict[int, list[tuple[int, int, str, bool]]] = {}
    for path, tensor in held.values():
        memory = memory_of(tensor)
        if memory is None or not tensor.numel():
            continue
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        first = int(tensor.storage_offset()) * tensor.element_size()
        span = 1 + sum((int(n) - 1) * int(step) for n, step in strides)
        last = first + span * tensor.element_size()
        trained = isinstance(tensor, nn.Parameter)
        ranges.setdefault(memory, []).append((first, last, path, trained))
    for places in ranges.values():
        places.sort()
        for (_, end, path, one), (begin, _, other, two) in itertools.pairwise(places):
            if begin < end and (one or two):
                raise AliasError(
                    f"{path} and {other} lie in the same memory",
                    where=f"{path}, {other}",
                    why="they are two tensors: each would be split by itself, and no longer follow "
                    "the other",
                    fix=f"make them one: let {other} be the same nn.Parameter as {path}; or copy "
                    "one of them",
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
    theirs = [
        frame
        for frame in frames
        if not frame.filename.startswith((root, here, "<")) and frame.name != HANDS_ON
    ]
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
        return ValueBranchError(
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
