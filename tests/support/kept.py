"""Count the bytes that autograd really saves when an emitted program runs, rank by rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from autoparallel.rewrite.emit import Program, emit
from autoparallel.rewrite.program import drops_copies
from autoparallel.runtime import dropped_copies as again

__all__ = ["Kept", "watching"]


class Kept:
    """A Kept is the saved bytes per rank of the last program that ran, and its graph and plan.

    What the caller has anyway (parameters, buffers, constants, inputs) does not count; memory that
    several tensors share counts once.
    """

    def __init__(self) -> None:
        self.nbytes: dict[int, int] = {}
        self.graph: Any = None
        self.plan: Any = None


class _Watched(threading.local):
    """A _Watched collects the tensors that the program in this thread gives to autograd to save."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor


def watching(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Program]:
    """Return `emit` with programs that tell `kept` the tensors that they save."""
    seen = _Watched()
    pack = again.Copies.pack

    def packed(copies: Any, tensor: torch.Tensor) -> Any:
        """Note a saved tensor; for a dropped copy, what it is recomputed from."""
        made = pack(copies, tensor)
        items = [made]
        while items:
            item = items.pop()
            if isinstance(item, again._View):
                copy = item.copy
                items += copy.sources if isinstance(copy, again._Made) else [copy.source]
            else:
                seen.keep(item[0] if isinstance(item, tuple) else item)
        return made

    monkeypatch.setattr(again.Copies, "pack", packed)

    def watched(graph: Any, plan: Any, ranks: Any, *args: Any, **options: Any) -> Program:
        program = emit(graph, plan, ranks, *args, **options)
        kept.graph, kept.plan = graph, plan
        drops = drops_copies(program.source)
        hooks = nullcontext() if drops else saved_tensors_hooks(seen.keep, lambda tensor: tensor)

        def run(*given: Any) -> Any:
            seen.storages.clear()
            with hooks:
                made = program.run(*given)
            for tensor in (tensor for tensors in given[:4] for tensor in tensors):
                seen.storages.pop(tensor.untyped_storage()._cdata, None)
            kept.nbytes[ranks.rank] = sum(s.nbytes() for s in seen.storages.values())
            return made

        return replace(program, run=run)

    return watched
