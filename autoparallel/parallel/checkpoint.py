"""Checkpoints of a module and its optimizer: every rank writes its parts, any mesh reads them.

They are torch.distributed.checkpoint's own, under the original names, so that its other readers
understand them. A checkpoint appears in its folder at once, when all of it is written.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.parallel.deferred import is_deferred
from autoparallel.parallel.module_state import State
from autoparallel.parallel.seeds import rng_state, set_rng_state
from autoparallel.placement import Layout, whole_layout
from autoparallel.runtime.ranks import Ranks, single_rank
from autoparallel.runtime.tensor_parts import layout_pieces
from autoparallel.support.torch_private import wrapper_tensor

__all__ = ["load_checkpoint", "save_checkpoint"]

_OPTIMIZER = "optimizer.state."
_REPLACED = ".replaced"
_PARTIAL = ".partial"


class Pieces(torch.Tensor):
    """A whole tensor of which this rank holds some rectangles, each with its true offset.

    It is what torch.distributed.checkpoint asks for its items (its protocol `_Checkpointable`),
    and does nothing else. A DTensor cannot say this of a dim that is split block by block.
    """

    pieces: dict[torch.Size, torch.Tensor]

    @staticmethod
    def __new__(
        cls, whole: torch.Size, pieces: dict[torch.Size, torch.Tensor], local: torch.Tensor
    ) -> Pieces:
        made: Pieces = wrapper_tensor(cls, whole, local.dtype, local.device)
        made.pieces = pieces
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a tensor that only describes a checkpoint")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(at, piece.size()) for at, piece in self.pieces.items()]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.pieces[index.offset]


def in_pieces(local: torch.Tensor, whole: torch.Size, layout: Layout, ranks: Ranks) -> Pieces:
    """What this rank holds of a tensor of size `whole`, sharing memory with `local`.

    A split dim of k blocks gives k pieces, a whole tensor one, the same on every rank.
    """
    pieces = {}
    for start, at, lengths in layout_pieces(whole, layout, ranks.sizes, ranks.coordinates):
        part = local
        for dim, (first, length) in enumerate(zip(at, lengths, strict=True)):
            part = part.narrow(dim, first, length)
        pieces[torch.Size(start)] = part
    return Pieces(whole, pieces, local)


def save_checkpoint(
    folder: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters, buffers, optimizer state, the state of random numbers, and `extra`.

    A collective call. module: a parallel one, or a plain one that is the same on every rank.
    extra: anything that can be pickled, the same on every rank. An older checkpoint in `folder`
    is replaced only when the new one is complete.
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
    _wait()
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _alone():
        dcp.save(stored, checkpoint_id=partial, planner=planner)
    _wait()
    if first:
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    _wait()


def load_checkpoint(
    folder: str | Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Fill module and optimizer in place from what save_checkpoint wrote; returns its `extra`.

    A collective call. The numbers of ranks and the plans may differ: each rank reads the parts
    that it holds. Parallel modules get the state of their random numbers, plain ones torch's.
    Raises AutoParallelError where there is no whole checkpoint, or for another model.
    """
    target = find_checkpoint(Path(folder))
    state = _state_of(module)
    known = dcp.FileSystemReader(target).read_metadata().state_dict_metadata
    made = optimizer is not None and any(name.startswith(_OPTIMIZER) for name in known)
    if optimizer is not None and made and not optimizer.state:
        optimizer.zero_grad()
        get_optimizer_state_dict(module, optimizer)  # makes the state that a first step makes
    stored, owners = _tensors(module, optimizer if made else None, state)
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
    for name, (owner, key) in owners.items():
        if not isinstance(stored[name], Pieces):
            owner[key] = stored[name]
    if optimizer is not None:
        saved = stored.get("optimizer.groups", ())
        for group, settings in zip(optimizer.param_groups, saved, strict=bool(saved)):
            group.update(settings)
    if "rng" in stored:
        set_rng_state(module, stored["rng"])
    if "torch_rng" in stored:
        torch.set_rng_state(stored["torch_rng"])
    extra: dict[str, Any] = stored["extra"]
    return extra


def find_checkpoint(folder: Path) -> Path:
    """The whole checkpoint of that name, also if its replacement was interrupted.

    Raises AutoParallelError if there is none.
    """
    for path in (folder, folder.with_name(folder.name + _REPLACED)):
        if (path / ".metadata").exists():
            return path
    raise AutoParallelError(
        f"no checkpoint in {folder}",
        why="there is no such folder, or save_checkpoint() never came to its end",
        fix="pass the folder that was given to save_checkpoint()",
    )


def _state_of(module: nn.Module) -> State | None:
    """Of a parallel module; None for a plain one."""
    if is_deferred(module):
        raise AutoParallelError(
            f"{type(module).__name__} has no plan yet, so nothing says which parts a rank holds",
            why="it was made without example inputs and not called since",
            fix="pass example_inputs=... to autoparallelize(), or call the module once",
        )
    return module.__dict__.get("_autoparallel")


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, state: State | None
) -> tuple[dict[str, Any], dict[str, tuple[dict[Any, Any], Any]]]:
    """All tensors of module and optimizer by the names that they are saved under.

    Also, for the optimizer's, the dict and the key where each is found.
    """
    ranks = single_rank(Mesh(alone=1)) if state is None else state.ranks
    whole = whole_layout(len(ranks.sizes))
    layouts: Mapping[str, Layout] = {} if state is None else state.layouts

    def pieces(value: torch.Tensor, path: str) -> Pieces:
        local = value.to_local() if isinstance(value, DTensor) else value
        return in_pieces(local.detach(), value.size(), layouts.get(path, whole), ranks)

    stored: dict[str, Any] = {
        f"model.{path}": pieces(value, path)
        for path, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    owners: dict[str, tuple[dict[Any, Any], Any]] = {}
    for path, parameter in module.named_parameters() if optimizer is not None else ():
        assert optimizer is not None
        own = optimizer.state.get(parameter, {})
        for key, value in own.items():
            name = f"{_OPTIMIZER}{path}.{key}"
            owners[name] = (own, key)
            stored[name] = value
            if isinstance(value, torch.Tensor):
                alike = value.size() == parameter.size()
                stored[name] = pieces(value, path if alike else "")
    return stored, owners


def _require_same(stored: Mapping[str, Any], known: Mapping[str, Any], folder: Path) -> None:
    """Raises AutoParallelError naming all tensors that are not in the checkpoint as they are."""
    wrong = []
    for name, value in stored.items():
        found = known.get(name)
        if found is None:
            wrong.append(f"{name} is not in it")
        elif isinstance(value, torch.Tensor) and found.size != value.size():
            wrong.append(f"{name} is {tuple(value.size())}, there {tuple(found.size)}")
    if wrong:
        raise AutoParallelError(
            f"the checkpoint in {folder} is of another model or optimizer",
            why="; ".join(wrong[:8]) + (f"; {len(wrong) - 8} more" if len(wrong) > 8 else ""),
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that there is one process, which is nothing to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _wait() -> None:
    """Until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()
