"""What autograd really keeps when an emitted program runs, rank by rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from autoparallel.rewrite.emit import Program, emit

__all__ = ["Kept", "watching"]


class Kept:
    """Bytes per rank of the last program that ran, and what it was emitted from.

    What the caller has anyway (parameters, buffers, constants, inputs) does not count; memory that
    several tensors share counts once.
    """

    def __init__(self) -> None:
        self.nbytes: dict[int, int] = {}
        self.graph: Any = None
        self.plan: Any = None


def watching(kept: Kept) -> Callable[..., Program]:
    """`emit`, of which every program tells `kept` what it keeps."""

    def watched(graph: Any, plan: Any, group: Any, *args: Any, **options: Any) -> Program:
        program = emit(graph, plan, group, *args, **options)
        kept.graph, kept.plan = graph, plan

        def run(*given: Any) -> Any:
            saved: list[torch.Tensor] = []

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                saved.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                made = program.run(*given)
            storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
            for tensors in given[:4]:
                for tensor in tensors:
                    storages.pop(tensor.untyped_storage()._cdata, None)
            kept.nbytes[group.rank] = sum(storages.values())
            return made

        return replace(program, run=run)

    return watched
