"""Notes of the dropped copies that the ops of each rank save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from autoparallel.runtime.dropped_copies import Copies

__all__ = ["noted_copies"]


@contextmanager
def noted_copies() -> Iterator[list[list[int]]]:
    """Note, for each forward pass that drops copies, which of them its ops save, in their order.

    The passes of ranks that are threads are noted apart. Copies have numbers in the order in which
    they are made. The lists are there when the context ends.
    """
    saved: dict[Copies, list[int]] = {}
    counts: dict[Copies, int] = {}

    def know(copies: Copies, tensor: torch.Tensor, copy: Any) -> None:
        counts[copies] = counts.get(copies, 0) + 1
        copy.number = counts[copies]
        saved.setdefault(copies, [])
        known(copies, tensor, copy)

    def pack(copies: Copies, tensor: torch.Tensor) -> Any:
        copy: Any = copies.find(tensor)
        if copy is not None:
            saved[copies].append(copy.number)
        return packed(copies, tensor)

    known, packed = Copies.know, Copies.pack
    notes: list[list[int]] = []
    with patch.object(Copies, "know", know), patch.object(Copies, "pack", pack):
        yield notes
    notes += saved.values()
