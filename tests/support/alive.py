"""Watch the memory that is alive while a step runs: every storage from its making to its end."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Alive"]


class Alive(TorchDispatchMode):
    """An Alive mode counts the storages made within it; those of `given` tensors do not count."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}
        self.sizes: list[int] = []
        # Which storage is made (True) or ends, in order.
        self.events: list[tuple[int, bool]] = []
        for tensor in given:
            self._see(tensor)
        self.events.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        pytree.tree_map_only(torch.Tensor, self._see, found)
        return found

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.numbers:
            return
        number = self.numbers[key] = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.events.append((number, True))
        weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self.events.append((self.numbers.pop(key), False))

    def most(self, without: Iterable[torch.Tensor]) -> int:
        """Return the bytes at the worst moment, without the storages of these tensors."""
        left_out = {self.numbers[tensor.untyped_storage()._cdata] for tensor in without}
        now = most = 0
        for number, begins in self.events:
            if number not in left_out:
                now += self.sizes[number] if begins else -self.sizes[number]
                most = max(most, now)
        return most
