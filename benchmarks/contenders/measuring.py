"""The figures of one contender's step: seconds, collectives, bytes, and memory at its worst."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autoparallel.runtime.collective_counter import CollectiveCounter
from autoparallel.support.torch_private import (
    TorchDispatchMode,
    local_part,
    storage_key,
    tree_leaves,
)

__all__ = ["collectives", "peak_nbytes", "seconds"]


def seconds(step: Callable[[], Any], count: int) -> tuple[float, float]:
    """Return the seconds of a step that this process computes, and those of the clock on the wall.

    All threads of the process count, those that communicate too; waiting for others does not.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count


def collectives(step: Callable[[], Any]) -> tuple[int, int]:
    """Return the number of collectives of a step, and the bytes of their whole tensors."""
    with CollectiveCounter() as counter:
        step()
    return counter.calls, counter.nbytes


def peak_nbytes(step: Callable[[], Any], held: Iterable[torch.Tensor]) -> int:
    """Return the bytes of all tensors at the worst moment of a step.

    held: the tensors that were there before, such as parameters and the optimizer's state. What a
    kernel of torch needs while it runs is not seen.
    """
    with _Alive(held) as alive:
        step()
    return alive.most


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are alive."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0
        for tensor in held:
            self.see(tensor)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes here again with the parts
        result = function(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor):
                self.see(item)
        return result

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it ends."""
        if isinstance(tensor, DTensor):
            tensor = local_part(tensor)
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, nbytes = storage_key(tensor), storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.end, key, nbytes)

    def end(self, key: int, nbytes: int) -> None:
        """Take off a storage that has ended."""
        self.known.discard(key)
        self.now -= nbytes
