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
    they are made. Results that are made again of tensors which are there are left out: to make them
    a rank needs no other one. The lists are there when the context ends.
    """
    saved: dict[Copies, list[int]] = {}
    counts: dict[Copies, int] = {}

    def know(copies: Copies, tensor: torch.Tensor, copy: Any) -> None:
        sources = getattr(copy, "sources", None)
        asks = sources is None or any(
            not isinstance(source, torch.Tensor) and source.copy.number for source in sources
        )
        counts[copies] = counts.get(copies, 0) + asks
        copy.number = counts[copies] if asks else 0
        saved.setdefault(copies, [])
        known(copies, tensor, copy)

    def pack(copies: Copies, tensor: torch.Tensor) -> Any:
        copy: Any = copies.find(tensor)
        if copy is not None and copy.number:
            saved[copies].append(copy.number)
        return packed(copies, tensor)

    known, packed = Copies.know, Copies.pack
    notes: list[list[int]] = []
    with patch.object(Copies, "know", know), patch.object(Copies, "pack", pack):
        yield notes
    notes += saved.values()
