"""Checkpoints that are written while training goes on.

The tensors are copied at once, which is all that the training waits for. A thread writes the copy;
the threads of all ranks talk to each other through a process group of their own, so that they are
not in the way of the training's collectives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor

from autoparallel.parallel.checkpoint import checkpoint_content, write_content
from autoparallel.parallel.checkpoint_files import is_first_rank, together
from autoparallel.parallel.host_group import require_gloo
from autoparallel.parallel.pieces import Pieces
from autoparallel.support.torch_private import distributed_tensor_like, local_part

__all__ = ["BackgroundCheckpoints"]


class BackgroundCheckpoints:
    """Writes checkpoints, one after the other, beside the training.

    Making it is a collective call of all ranks, as are its methods.

    Example: `BackgroundCheckpoints().save("run/step-1000", model, optimizer, {"step": 1000})`
    """

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        if several:
            # Else the others would wait for a rank that cannot.
            together("making a group of gloo", require_gloo)
        self.group = dist.new_group(backend="gloo") if several else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        folder: str | Path,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        extra: Mapping[str, Any] | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy what save_checkpoint would write, and begin to write it.

        then: is called by the thread of rank 0 when the checkpoint is complete. Other arguments,
        and errors of what is to be written: see save_checkpoint. It waits for the checkpoint before
        it, and raises the error of that one, if writing it has failed.
        """
        self.wait()
        content = together(
            "preparing the checkpoint",
            lambda: _copied(checkpoint_content(module, optimizer, extra)),
        )
        self._thread = threading.Thread(
            target=self._write, args=(Path(folder), content, then), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when everything is written. Raises CheckpointError, on all ranks, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, folder: Path, content: dict[str, Any], then: Callable[[], None]) -> None:
        """Write a copy, in the thread."""
        try:
            write_content(folder, content, self.group)
            # What fails on rank 0 alone is raised on all.
            together("after the checkpoint", then if is_first_rank() else list, self.group)
        # CheckpointException is no Exception, but a BaseException. It is raised by the next call.
        except (Exception, CheckpointException) as error:
            self._error = error


def _copied(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of this rank's tensors, in memory of the host."""
    return {name: _copy(value) for name, value in content.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, Pieces):
        pieces = {at: _on_host(piece) for at, piece in value.pieces.items()}
        local = next(iter(pieces.values()), torch.empty(0, dtype=value.dtype))
        return Pieces(value.size(), pieces, local)
    if isinstance(value, DTensor):
        return distributed_tensor_like(_on_host(local_part(value)), value)
    return value


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
