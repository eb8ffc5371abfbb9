"""The memory that the backward pass of one call needs while it runs, besides the gradients."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from autoparallel.support.torch_private import (
    TorchDispatchMode,
    storage_key,
)

__all__ = ["backward_workspace", "nested_tensors"]


def nested_tensors(structure: Any) -> list[torch.Tensor]:
    """Return the tensors in nested tuples and lists, in order."""
    if isinstance(structure, torch.Tensor):
        return [structure]
    if isinstance(structure, (tuple, list)):
        return [tensor for item in structure for tensor in nested_tensors(item)]
    return []


class _LiveMemory(TorchDispatchMode):
    """Counts bytes of storages allocated within and not yet freed.

    live: bytes by storage. most: the largest sum at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = {storage_key(tensor) for tensor in nested_tensors(args)}
        results = func(*args, **(kwargs or {}))
        for tensor in nested_tensors(results):
            storage = tensor.untyped_storage()
            # Views and in-place results lie in an operand's storage: nothing was allocated.
            if storage_key(storage) not in before and storage_key(storage) not in self.live:
                self.live[storage_key(storage)] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage_key(storage))
        self.most = max(self.most, sum(self.live.values()))
        return results


def backward_workspace(results: list[torch.Tensor], operands: list[torch.Tensor]) -> int:
    """Return the bytes that a call's backward needs at its worst moment besides its gradients.

    0 where the backward cannot be run without data.
    """
    ends = [tensor for tensor in results if tensor.requires_grad and tensor.grad_fn is not None]
    starts = [tensor for tensor in operands if tensor.requires_grad]
    if not ends or not starts:
        return 0
    incoming = [torch.empty_like(tensor) for tensor in ends]
    memory = _LiveMemory()
    try:
        with torch.no_grad(), memory:
            gradients = torch.autograd.grad(ends, starts, incoming, allow_unused=True)
    except Exception:  # any op may refuse to run without data, in any way
        return 0
    returned = {storage_key(tensor) for tensor in gradients if tensor is not None}
    returned_nbytes = sum(nbytes for key, nbytes in memory.live.items() if key in returned)
    return max(memory.most - returned_nbytes, 0)
