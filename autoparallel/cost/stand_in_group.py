"""A process group without processes, in which a split op runs as on one of its ranks."""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.placement import Invariant
from autoparallel.runtime.groups import Group
from autoparallel.runtime.ranks import Ranks

__all__ = ["StandInGroup", "random_arguments"]


class StandInGroup(Group):
    """A process group without processes: collectives return memory of the right size.

    Kernels that communicate can so be run as on one of `world_size` ranks.
    """

    def __init__(self, world_size: int, rank: int = 0) -> None:
        self.rank, self.world_size = rank, world_size

    # What is run with equal ones is the same run.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StandInGroup):
            return NotImplemented
        return (self.rank, self.world_size) == (other.rank, other.world_size)

    def __hash__(self) -> int:
        return hash((self.rank, self.world_size))

    def all_reduce(self, tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        """Return zeros of the tensor's shape."""
        return torch.zeros_like(tensor, memory_format=torch.contiguous_format)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return zeros with the ranks' parts along a new first dim."""
        return tensor.new_zeros((self.world_size, *tensor.shape))

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return zeros of one rank's part: the tensor without its first dim."""
        return tensor.new_zeros(tensor.shape[1:])

    def all_to_all(
        self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        """Return zeros of the shapes that the other ranks would send."""
        return [tensors[0].new_zeros(shape) for shape in shapes]


def random_arguments(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the arguments of a random op besides its own, for an unsplit tensor of this shape."""
    alone = StandInGroup(1)
    ranks = Ranks(("",), (alone,), alone)
    return {"key": 0, "shape": torch.Size(shape), "placements": (Invariant(),), "ranks": ranks}
