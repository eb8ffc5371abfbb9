"""Tensors split over a process group, and the crossings between its regions.

Every function takes a process group (None: all processes) and communicates nothing when the group
has one rank or no group was started. Sequence parallelism splits dim 0, where the parts of the
ranks lie end to end in memory.

Sources: Shoeybi et al. 2019 (f and g); Korthikanti et al. 2022 (their sequence-parallel forms).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "Group",
    "Split",
    "copy_to_tensor_parallel",
    "gather_from_sequence_parallel",
    "group_rank",
    "group_size",
    "reduce_from_tensor_parallel",
    "reduce_scatter_to_sequence_parallel",
    "scatter_to_sequence_parallel",
]

# The collectives of one tensor: torch 2.11 has them under their older names, 2.15 deprecates those.
_NEW_NAMES = hasattr(dist, "all_gather_single")
_all_gather = dist.all_gather_single if _NEW_NAMES else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if _NEW_NAMES else dist.reduce_scatter_tensor

Group = dist.ProcessGroup | None


def group_size(group: Group = None) -> int:
    """Number of ranks in the group; 1 where no process group was started."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def group_rank(group: Group = None) -> int:
    """This process's rank within the group; 0 where no process group was started."""
    return dist.get_rank(group) if dist.is_initialized() else 0


@dataclass(frozen=True, slots=True)
class Split:
    """How one dim of a parameter lies on the ranks.

    dim, size: the dim that is split and its whole size. blocks: the dim is this many equal blocks
    end to end, each split by itself (a fused query-key-value weight has 3). unit: this many
    neighbouring indices stay together (a head's width). size = blocks * units per block * unit.
    """

    dim: int
    size: int
    blocks: int = 1
    unit: int = 1

    def __post_init__(self) -> None:
        if self.size % (self.blocks * self.unit):
            raise ValueError(
                f"size must be a multiple of blocks * unit: "
                f"{self.size} size / ({self.blocks} blocks * {self.unit} unit)"
            )

    def bounds(self, rank: int, world_size: int) -> tuple[int, int]:
        """First index and end of the rank's part within one block."""
        units = self.size // (self.blocks * self.unit)
        largest = -(-units // world_size)
        first = min(units, rank * largest)
        return first * self.unit, min(units, first + largest) * self.unit

    def local_size(self, rank: int, world_size: int) -> int:
        """Size of the dim on the rank."""
        first, end = self.bounds(rank, world_size)
        return self.blocks * (end - first)

    def local(self, whole: Tensor, rank: int, world_size: int) -> Tensor:
        """The rank's part of the whole tensor, in memory of its own."""
        first, end = self.bounds(rank, world_size)
        parts = [block[..., first:end] for block in self._by_block(whole)]
        return torch.cat(parts, dim=-1).movedim(-1, self.dim).contiguous()

    def gather(self, local: Tensor, group: Group = None) -> Tensor:
        """The whole tensor from the parts of all ranks: one all-gather, padded to the largest."""
        world_size = group_size(group)
        sizes = [self.local_size(rank, world_size) for rank in range(world_size)]
        last = local.detach().movedim(self.dim, -1)
        padded = F.pad(last, (0, sizes[0] - last.shape[-1])).contiguous()
        received = gathered(padded[None], group) if world_size > 1 else padded[None]
        parts = [part[..., :size] for part, size in zip(received, sizes, strict=True)]
        if self.blocks > 1:
            by_block = zip(*(part.chunk(self.blocks, dim=-1) for part in parts), strict=True)
            parts = [piece for block in by_block for piece in block]
        return torch.cat(parts, dim=-1).movedim(-1, self.dim).contiguous()

    def _by_block(self, whole: Tensor) -> tuple[Tensor, ...]:
        return whole.movedim(self.dim, -1).chunk(self.blocks, dim=-1)


# Collectives on plain tensors.


def _unchanged(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _all_reduced(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gathered(x: Tensor, group: Group) -> Tensor:
    whole, work = start_gather(x, group)
    work.wait()
    return whole


def reduce_scattered(x: Tensor, group: Group) -> Tensor:
    part, work = start_reduce_scatter(x, group)
    work.wait()
    return part


def _own_part(x: Tensor, group: Group) -> Tensor:
    length = _sequence_part(x, group)
    return x.narrow(0, group_rank(group) * length, length).contiguous()


def _sequence_part(x: Tensor, group: Group) -> int:
    world_size = group_size(group)
    if x.shape[0] % world_size:
        raise ValueError(
            "sequence parallelism needs a sequence that is a multiple of the ranks: "
            f"{x.shape[0]} positions / {world_size} ranks"
        )
    return x.shape[0] // world_size


def start_gather(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    whole = x.new_empty((group_size(group) * x.shape[0], *x.shape[1:]))
    return whole, _all_gather(whole, x.contiguous(), group=group, async_op=True)


def start_reduce_scatter(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    part = x.new_empty((_sequence_part(x, group), *x.shape[1:]))
    return part, _reduce_scatter(part, x.contiguous(), group=group, async_op=True)


# Crossings between the regions. Each pair of forward and backward is the other's transpose.


class _Crossing(torch.autograd.Function):
    """One collective forward and another one backward, on the same group."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Callable[[Tensor, Group], Tensor],
        backward: Callable[[Tensor, Group], Tensor],
        group: Group,
    ) -> Tensor:
        ctx.collective, ctx.group = backward, group
        return forward(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.collective(gradient, ctx.group), None, None, None


def _cross(
    x: Tensor,
    forward: Callable[[Tensor, Group], Tensor],
    backward: Callable[[Tensor, Group], Tensor],
    group: Group,
) -> Tensor:
    return _Crossing.apply(x, forward, backward, group) if group_size(group) > 1 else x


def copy_to_tensor_parallel(x: Tensor, group: Group = None) -> Tensor:
    """f: nothing forward, all-reduce backward. x: the same on all ranks."""
    return _cross(x, _unchanged, _all_reduced, group)


def reduce_from_tensor_parallel(x: Tensor, group: Group = None) -> Tensor:
    """g: all-reduce forward, nothing backward. x: one term of a sum over the ranks."""
    return _cross(x, _all_reduced, _unchanged, group)


def gather_from_sequence_parallel(x: Tensor, group: Group = None) -> Tensor:
    """f of sequence parallelism, (s/p, ...) -> (s, ...): all-gather, backward reduce-scatter."""
    return _cross(x, gathered, reduce_scattered, group)


def reduce_scatter_to_sequence_parallel(x: Tensor, group: Group = None) -> Tensor:
    """g of sequence parallelism, (s, ...) -> (s/p, ...): reduce-scatter, backward all-gather."""
    return _cross(x, reduce_scattered, gathered, group)


def scatter_to_sequence_parallel(x: Tensor, group: Group = None) -> Tensor:
    """(s, ...), the same on all ranks -> (s/p, ...): own part, backward all-gather."""
    return _cross(x, _own_part, gathered, group)
