"""Checkpoints of a module and its optimizer: every rank writes its parts, any mesh reads them.

They are written by torch.distributed.checkpoint under the original names, so that its other readers
understand them. A checkpoint appears in its folder at once, when all of it is written: a job that
is stopped half-way leaves the checkpoint before it as it was.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.parallel.deferred import is_deferred
from autoparallel.parallel.module_state import State
from autoparallel.parallel.pieces import Pieces, in_pieces
from autoparallel.parallel.seeds import rng_state, set_rng_state
from autoparallel.placement import Layout, whole_layout
from autoparallel.runtime.ranks import single_rank

__all__ = ["load_checkpoint", "save_checkpoint"]

# What comes before the names of the optimizer's tensors.
_OPTIMIZER = "optimizer.state."
# Ends of the folders in which the checkpoint before, and the one that is being written, lie.
_REPLACED = ".replaced"
_PARTIAL = ".partial"


def save_checkpoint(
    folder: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters, buffers, optimizer state, the state of random numbers, and `extra`.

    A collective call. folder: on a file system that all ranks see; an older checkpoint in it is
    replaced only when the new one is complete. module: a parallel one, or a plain one that is the
    same on every rank. optimizer: that of its parameters, if its state is to be written. extra:
    anything that can be pickled, such as the number of the step, the same on every rank.
    Raises AutoParallelError for a module that has no plan yet.

    Example: `save_checkpoint("run/step-1000", model, optimizer, {"step": 1000})`
    """
    target = Path(folder)
    partial, replaced = (target.with_name(target.name + end) for end in (_PARTIAL, _REPLACED))
    state = _state_of(module)
    stored, _ = _tensors(module, optimizer, state)
    stored["extra"] = dict(extra or {})
    if state is None:
        stored["torch_rng"] = torch.get_rng_state()
    else:
        stored["rng"] = rng_state(module)
    if optimizer is not None:
        stored["optimizer.groups"] = [_settings(group) for group in optimizer.param_groups]
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    # No rank writes into a folder that rank 0 has still to empty, renames what another still
    # writes, or goes on before the checkpoint can be read.
    _wait()
    # Nothing is flattened: `extra` and the optimizer's groups are one entry each, of which a reader
    # need not know beforehand what is inside.
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _alone():
        dcp.save(stored, checkpoint_id=partial, planner=planner)
    _wait()
    if first:
        # Between the two renames there is no `folder`: find_checkpoint then takes the one before.
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    _wait()


def load_checkpoint(
    folder: str | Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Fill module and optimizer in place from what save_checkpoint wrote, and return its `extra`.

    A collective call. folder, module, optimizer: as in save_checkpoint. The number of ranks and the
    plan may be others than when it was written: each rank reads the parts that it holds. Parallel
    modules get the state of their random numbers, plain ones torch's.
    Raises AutoParallelError where there is no whole checkpoint, where it is of another model or
    optimizer (naming all tensors that differ), and for a module that has no plan yet.

    Example: `step = load_checkpoint("run/step-1000", model, optimizer)["step"]`
    """
    target = find_checkpoint(Path(folder))
    state = _state_of(module)
    known = dcp.FileSystemReader(target).read_metadata().state_dict_metadata
    has_state = optimizer is not None and any(name.startswith(_OPTIMIZER) for name in known)
    if optimizer is not None and has_state and not optimizer.state:
        # Loading is in place, and an optimizer has no state before its first step. This makes it
        # as a step would, with gradients of zero.
        optimizer.zero_grad()
        get_optimizer_state_dict(module, optimizer)
    stored, owners = _tensors(module, optimizer if has_state else None, state)
    for name in [name for name in owners if name not in known]:
        del stored[name], owners[name]  # of a parameter that never had a gradient
    _require_same(stored, known, target)
    others = ["extra", "torch_rng" if state is None else "rng"]
    others += ["optimizer.groups"] if optimizer is not None else []
    for name in others:
        if name in known:
            stored[name] = torch.get_rng_state() if name == "torch_rng" else None
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _alone():
        dcp.load(stored, checkpoint_id=target, planner=planner)
    # Tensors were filled in place; numbers, such as a count of steps, are new objects.
    for name, (owner, key) in owners.items():
        if not isinstance(stored[name], Pieces):
            owner[key] = stored[name]
    if optimizer is not None:
        _set_groups(optimizer, stored.get("optimizer.groups", ()), target)
    if "rng" in stored:
        set_rng_state(module, stored["rng"])
    if "torch_rng" in stored:
        torch.set_rng_state(stored["torch_rng"])
    extra: dict[str, Any] = stored["extra"]
    return extra


def find_checkpoint(folder: Path) -> Path:
    """Return the folder of the complete checkpoint of that name, be it the one before.

    Where a job was stopped while it replaced a checkpoint, the older one is still complete. Raises
    AutoParallelError if there is none.
    """
    for path in (folder, folder.with_name(folder.name + _REPLACED)):
        # Rank 0 writes this file last.
        if (path / ".metadata").exists():
            return path
    raise AutoParallelError(
        f"no checkpoint in {folder}",
        why="there is no such folder, or save_checkpoint() never came to its end",
        fix="pass the folder that was given to save_checkpoint()",
    )


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


def _set_groups(
    optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Give the optimizer's groups the settings that were saved, if any were.

    Raises AutoParallelError where there are more or fewer groups than were saved.
    """
    groups = optimizer.param_groups
    if saved and len(saved) != len(groups):
        raise AutoParallelError(
            f"the optimizer has {len(groups)} groups of parameters, and that of the checkpoint in "
            f"{folder} had {len(saved)}",
            why="learning rate and other settings are saved for each group",
            fix="make the optimizer with as many groups as it was saved with",
        )
    for group, settings in zip(groups, saved, strict=False):
        group.update(settings)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimizer's group says besides its parameters, such as the learning rate."""
    return {key: value for key, value in group.items() if key != "params"}


def _tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, state: State | None
) -> tuple[dict[str, Any], dict[str, tuple[dict[Any, Any], Any]]]:
    """Return all tensors of module and optimizer by the names that they are saved under.

    Return also, for the optimizer's, the dict and the key where each is to be put back.
    """
    ranks = single_rank(Mesh(alone=1)) if state is None else state.ranks
    whole = whole_layout(len(ranks.sizes))
    layouts: Mapping[str, Layout] = {} if state is None else state.layouts

    def pieces(value: torch.Tensor, path: str) -> Pieces:
        """Describe a tensor that lies like the parameter at `path`; "" stands for unsharded."""
        local = value.to_local() if isinstance(value, DTensor) else value
        layout = layouts.get(path, whole)
        return in_pieces(local.detach(), value.size(), layout, ranks.sizes, ranks.coordinates)

    stored: dict[str, Any] = {
        f"model.{path}": pieces(value, path)
        for path, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    owners: dict[str, tuple[dict[Any, Any], Any]] = {}
    for path, parameter in module.named_parameters() if optimizer is not None else ():
        assert optimizer is not None
        entries = optimizer.state.get(parameter, {})
        for key, value in entries.items():
            name = f"{_OPTIMIZER}{path}.{key}"
            owners[name] = (entries, key)
            stored[name] = value
            if isinstance(value, torch.Tensor):
                # Adam's moments have the parameter's shape and lie as it does; its count of steps
                # is a scalar, the same on every rank.
                alike = value.size() == parameter.size()
                stored[name] = pieces(value, path if alike else "")
    return stored, owners


def _require_same(stored: Mapping[str, Any], known: Mapping[str, Any], folder: Path) -> None:
    """Raise AutoParallelError that names all tensors that are not in the checkpoint as they are.

    stored: what is to be filled. known: torch's metadata of what the checkpoint has, by name.
    """
    wrong = []
    for name, value in stored.items():
        saved = known.get(name)
        if saved is None:
            wrong.append(f"{name} is not in it")
        elif isinstance(value, torch.Tensor) and saved.size != value.size():
            wrong.append(f"{name} is {tuple(value.size())}, there {tuple(saved.size)}")
    if wrong:
        raise AutoParallelError(
            f"the checkpoint in {folder} is of another model or optimizer",
            why="; ".join(wrong[:8]) + (f"; {len(wrong) - 8} more" if len(wrong) > 8 else ""),
            fix="pass the model and the optimizer that were given to save_checkpoint()",
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Silence torch's warning that there is one process only, which is nothing to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _wait() -> None:
    """Return when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()
