"""Checkpoints of a module and its optimizer: every rank writes its parts, any mesh reads them.

They are written by torch.distributed.checkpoint under the original names, so that its other readers
understand them. Nothing in them runs as they are read: what is no tensor is in bytes of its own. A
checkpoint appears in its folder at once, when all of it is written: a job that is stopped half-way
leaves the checkpoint before it as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from autoparallel.errors import AutoParallelError, CheckpointError
from autoparallel.parallel.checkpoint_files import (
    find_checkpoint,
    require_intact,
    together,
    write_checkpoint,
)
from autoparallel.parallel.checkpoint_match import (
    EXTRA,
    GROUPS,
    KINDS,
    MODEL,
    OPTIMIZER,
    PLAIN,
    parameter_groups,
    require_optimizers,
    require_same_tensors,
)
from autoparallel.parallel.checkpoint_metadata import CheckpointReader, read_metadata
from autoparallel.parallel.deferred import is_deferred
from autoparallel.parallel.module_state import State
from autoparallel.parallel.pieces import in_pieces
from autoparallel.parallel.plain_values import packed, unpacked
from autoparallel.parallel.saved_optimizers import (
    Optimizers,
    as_optimizers,
    describe,
    entries_of,
    without_absent,
)
from autoparallel.parallel.seeds import rng_state, set_rng_state

__all__ = ["checkpoint_content", "load_checkpoint", "save_checkpoint", "write_content"]


def save_checkpoint(
    folder: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters, buffers, optimizer state, the state of random numbers, and `extra`.

    A collective call. folder: on a file system that all ranks see; an older checkpoint in it is
    replaced only when the new one is complete. module: a parallel one, or a plain one that is the
    same on every rank. optimizer: that of its parameters, or a list of several, if their state is
    to be written. extra: numbers, texts, tensors, lists and dicts of these, such as the number of
    the step, the same on every rank.
    Raises AutoParallelError for a module that has no plan yet, for optimizers whose state cannot be
    saved in parts, for values that only a pickle could hold, and where a file has the folder's
    name; CheckpointError, on all ranks, if writing fails on any. The checkpoint before is then as
    it was.

    Example: `save_checkpoint("run/step-1000", model, optimizer, {"step": 1000})`
    """

    stored = together(
        "preparing the checkpoint", lambda: checkpoint_content(module, optimizer, extra)
    )
    write_content(Path(folder), stored)


def checkpoint_content(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return this rank's part of all that save_checkpoint writes, by the names in the checkpoint.

    Arguments and errors: see save_checkpoint. Tensors share memory with what they are of.
    """
    optimizers, state = as_optimizers(optimizer), _state_of(module)
    stored, _ = _tensors(module, module.state_dict(), optimizers)
    stored[EXTRA] = dict(extra or {})
    if state is None:
        stored["torch_rng"] = torch.get_rng_state()
    else:
        stored["rng"] = rng_state(module)
    if optimizers:
        stored[KINDS] = describe(module, optimizers)
        stored[GROUPS] = [_settings(group) for group in parameter_groups(optimizers)]
    return dict(_as_written(name, value) for name, value in stored.items())


def write_content(folder: Path, content: dict[str, Any], group: Any = None) -> None:
    """Write what checkpoint_content() returned. A collective call of a group, by default of all.

    group: torch's process group. Raises CheckpointError, on all ranks, if it fails on any.
    """
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def write(partial: Path) -> None:
        with _alone():
            dcp.save(content, checkpoint_id=partial, planner=planner, process_group=group)

    write_checkpoint(folder, write, group)


def load_checkpoint(
    folder: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
) -> dict[str, Any]:
    """Fill module and optimizer in place from what save_checkpoint wrote, and return its `extra`.

    A collective call. folder, module, optimizer: as in save_checkpoint. The number of ranks and the
    plan may be others than when it was written: each rank reads the parts that it holds. Parallel
    modules get the state of their random numbers, plain ones torch's.
    Warns where the checkpoint is of a wider type than the module, so that numbers are rounded.
    Raises CheckpointError where there is no whole checkpoint, its files have changed, or it is none
    of save_checkpoint's, and AutoParallelError where it is of another model or optimizer (naming
    what differs), and for a module that has no plan yet. Nothing has been filled then.

    Example: `step = load_checkpoint("run/step-1000", model, optimizer)["step"]`
    """
    target = together("finding the checkpoint", lambda: find_checkpoint(Path(folder)))
    require_intact(target)
    optimizers, state = as_optimizers(optimizer), _state_of(module)
    known = together(
        f"reading the checkpoint in {target}",
        lambda: _contents(target),
    )
    names = (KINDS, GROUPS) if optimizers else ()
    saved: dict[str, Any] = dict.fromkeys(name for name in names if PLAIN + name in known)
    _read(saved, known, target)
    together(
        "checking the optimizer", lambda: require_optimizers(module, optimizers, saved, target)
    )
    has_state = bool(optimizers) and any(name.startswith(OPTIMIZER) for name in known)
    if has_state:
        # Loading is in place, and an optimizer has no state before its first step. This makes it
        # as a step would, with gradients of zero.
        fresh = [each for each in optimizers if not each.state]
        for each in fresh:
            each.zero_grad()
        if fresh:
            with without_absent(fresh):
                get_optimizer_state_dict(module, fresh)
    values = module.state_dict()
    stored, owners = _tensors(module, values, optimizers if has_state else ())
    for name in [name for name in owners if {name, PLAIN + name}.isdisjoint(known)]:
        # Of a parameter that had never had a gradient.
        entries, key = owners.pop(name)
        del stored[name], entries[key]
    absent = {MODEL + path for path, value in values.items() if _is_absent(module, value)}
    together("checking the model", lambda: require_same_tensors(stored, known, target, absent))
    stored[EXTRA] = None
    if state is None and "torch_rng" in known:
        stored["torch_rng"] = torch.get_rng_state()
    if state is not None and PLAIN + "rng" in known:
        stored["rng"] = None
    _read(stored, known, target)
    # Tensors were filled in place. What is no tensor, such as a count of steps, is a new object.
    for name, (entries, key) in owners.items():
        if not isinstance(stored[name], torch.Tensor):
            entries[key] = stored[name]
    for path, value in values.items():
        if not isinstance(value, torch.Tensor):
            values[path] = stored[MODEL + path]
    # A module may make of its state dict what it likes, by hooks or an extra state.
    module.load_state_dict(values)
    for group, settings in zip(parameter_groups(optimizers), saved.get(GROUPS) or (), strict=False):
        for key, setting in settings.items():
            held: Any = group.get(key)
            is_tensor = isinstance(held, torch.Tensor) and isinstance(setting, torch.Tensor)
            group[key] = setting.to(held.device) if is_tensor else setting
    if "rng" in stored:
        set_rng_state(module, stored["rng"])
    if "torch_rng" in stored:
        torch.set_rng_state(stored["torch_rng"])
    loaded: dict[str, Any] = stored[EXTRA]
    return loaded


def _contents(target: Path) -> Mapping[str, Any]:
    """Return torch's metadata of what a checkpoint has, by name.

    Raises CheckpointError for a checkpoint that save_checkpoint() has not written, or an earlier
    release of it.
    """
    known: Mapping[str, Any] = read_metadata(target).state_dict_metadata
    if PLAIN + EXTRA in known:
        return known
    if isinstance(known.get(EXTRA), BytesStorageMetadata):
        raise CheckpointError(
            f"the checkpoint in {target} was written by an earlier release",
            why="it has values in a pickle, and to read one runs the code that is in it",
            fix="load it with the release that wrote it, if you trust the file, and save it with "
            "this one",
        )
    raise CheckpointError(
        f"the checkpoint in {target} is none of save_checkpoint()",
        why=f"it has {', '.join(list(known)[:4]) or 'nothing'}, and no {EXTRA}",
        fix="load it with torch.distributed.checkpoint into full_state_dict(module), and that with "
        "module.load_state_dict",
    )


def _as_written(name: str, value: Any) -> tuple[str, Any]:
    """Return the name and the tensor that a value is written as."""
    if isinstance(value, torch.Tensor):
        return name, value
    return PLAIN + name, _described(packed(value, name))


def _read(stored: dict[str, Any], known: Mapping[str, Any], target: Path) -> None:
    """Fill the tensors in `stored` from the checkpoint, and replace what is no tensor.

    known: torch's metadata of what the checkpoint has, by name.
    """
    if not stored:
        return
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    plain = {
        name: torch.empty(known[PLAIN + name].size, dtype=torch.uint8)
        for name, value in stored.items()
        if not isinstance(value, torch.Tensor)
    }
    wanted = {name: value for name, value in stored.items() if name not in plain}
    wanted.update((PLAIN + name, _described(content)) for name, content in plain.items())

    def read() -> None:
        try:
            with _alone():
                dcp.load(wanted, storage_reader=CheckpointReader(target), planner=planner)
            stored.update((name, unpacked(content)) for name, content in plain.items())
        except (AutoParallelError, OSError):
            raise
        # Files that were changed on purpose, with their digests, fail in any way.
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"the checkpoint in {target} cannot be read",
                why=str(error) or type(error).__name__,
                fix="give a folder that save_checkpoint() wrote, as it was written",
            ) from error

    together(f"reading the checkpoint in {target}", read)


def _state_of(module: nn.Module) -> State | None:
    """Return the state of a parallel module, None for a plain one.

    Raises AutoParallelError for a module that waits for its first call.
    """
    if is_deferred(module):
        raise AutoParallelError(
            f"{type(module).__name__} has no plan yet, so nothing says which parts a rank holds",
            why="it was made without example inputs and not called since",
            fix="pass example_inputs=... to autoparallelize(), or call the module once",
        )
    return module.__dict__.get("_autoparallel")


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimizer's group says besides its parameters, such as the learning rate."""
    return {key: value for key, value in group.items() if key != "params"}


def _tensors(
    module: nn.Module, values: Mapping[str, Any], optimizers: Optimizers
) -> tuple[dict[str, Any], dict[str, tuple[dict[Any, Any], Any]]]:
    """Return all that is saved of module and optimizers, by the names that it is saved under.

    values: the module's state dict. Return also, for the optimizers' state, the dict and the key
    where each value is to be put back.
    """
    # What the ranks of other stages hold, they save and load.
    held = {path: value for path, value in values.items() if not _is_absent(module, value)}
    stored = {f"{MODEL}{path}": _described(value) for path, value in held.items()}
    owners: dict[str, tuple[dict[Any, Any], Any]] = {}
    for name, entries, key in entries_of(module, optimizers):
        stored[OPTIMIZER + name] = _described(entries[key])
        owners[OPTIMIZER + name] = (entries, key)
    return stored, owners


def _is_absent(module: nn.Module, value: Any) -> bool:
    """Return whether a value of a module's state dict is on the ranks of other stages alone."""
    state: State | None = module.__dict__.get("_autoparallel")
    if state is None or state.tree.pipeline is None:
        return False
    return isinstance(value, torch.Tensor) and value.is_meta


def _described(value: Any) -> Any:
    """Return a tensor as torch.distributed.checkpoint writes it and fills it in place.

    A DTensor says itself where its part lies. Any other is whole, and the same on every rank.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, DTensor):
        return value.detach()
    return in_pieces(value.detach(), value.size(), (), (), ())


@contextmanager
def _alone() -> Iterator[None]:
    """Silence torch's warning that there is one process only, which is nothing to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
