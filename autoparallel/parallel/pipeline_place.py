"""A rank's place in a pipeline: who computes which stages, and who holds which parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from autoparallel.runtime.faults import explained, is_lost

__all__ = ["PipelinePlace", "as_sent"]


@dataclass(frozen=True)
class PipelinePlace:
    """A rank's place in a pipeline.

    group: torch's process group of the ranks that are alike in all but their stages. number: of
    this rank among them. holders: those whose stages read each parameter, by path.
    """

    group: Any
    number: int
    holders: dict[str, tuple[int, ...]]

    @property
    def ranks(self) -> int:
        """The number of ranks that share out the stages."""
        return dist.get_world_size(self.group)

    @property
    def device(self) -> torch.device:
        """The device on which the ranks of the pipeline exchange tensors."""
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def process(self, number: int) -> int:
        """Return the number, among all processes, of a rank of the pipeline."""
        return dist.get_global_rank(self.group, number)

    def from_holder(self, path: str, value: torch.Tensor) -> torch.Tensor:
        """Return a parameter's value as the first rank that has it has it. A collective call of
        the pipeline's ranks.

        value: here, of the same shape; it is overwritten where the rank has none.
        """
        holder = self.holders.get(path, (0,))[0]
        dist.broadcast(as_sent(value), self.process(holder), group=self.group)
        return value

    @contextmanager
    def answered(self, what: str) -> Iterator[None]:
        """Explain the error of this rank where it waits for another in vain. what: it waits in."""
        try:
            yield
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise explained(error, what, self.group) from error

    def holds(self, path: str) -> bool:
        """Return whether this rank has a parameter: a stage of its reads it, or none does."""
        return self.number in self.holders.get(path, (self.number,))


def as_sent(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the same memory, of a type that every library of collectives sends."""
    if value.is_complex():
        return torch.view_as_real(value)
    return value.view(torch.uint8) if value.dtype is torch.bool else value
