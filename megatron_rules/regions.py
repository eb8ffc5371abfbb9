"""Tensors split over a process group, and the collectives where regions meet, by hand.

Every function takes a process group (None: all processes) and communicates nothing when the group
has one rank or no group was started. Sequence parallelism splits dim 0, where the parts of the
ranks lie end to end in memory.

Sources: Shoeybi et al. 2019, arXiv:1909.08053 (f and g); Korthikanti et al. 2022, arXiv:2205.05198
(their sequence-parallel forms).
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
    """Return the number of ranks in the group; 1 where no process group was started."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def group_rank(group: Group = None) -> int:
    """Return this process's rank within the group; 0 where no process group was started."""
    return dist.get_rank(group) if dist.is_initialized() else 0


@dataclass(frozen=True, slots=True)
class Split:
    """The layout of a parameter of which one dim is split over the ranks.

    dim, size: the dim that is split and its whole size. blocks: the dim is this many equal blocks
    end to end, each split by itself (a fused query-key-value weight has 3). unit: this many
    neighbouring indices stay together (a head's width). size = blocks * units per block * unit;
    ValueError otherwise.

    >>> fused = Split(dim=0, size=12, blocks=3)
    >>> fused.local(torch.arange(12), rank=0, world_size=2)
    tensor([0, 1, 4, 5, 8, 9])
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
        """Return first index and end of the rank's part within one block.

        The parts are those of torch.chunk: the last ones may be smaller or empty.

        >>> [Split(0, 5).bounds(rank, 3) for rank in range(3)]
        [(0, 2), (2, 4), (4, 5)]
        """
        units = self.size // (self.blocks * self.unit)
        largest = -(-units // world_size)
        first = min(units, rank * largest)
        return first * self.unit, min(units, first + largest) * self.unit

    def local_size(self, rank: int, world_size: int) -> int:
        """Return the size of the dim on the rank, all blocks together."""
        first, end = self.bounds(rank, world_size)
        return self.blocks * (end - first)

    def local(self, whole: Tensor, rank: int, world_size: int) -> Tensor:
        """Return the rank's part of the whole tensor, in memory of its own."""
        first, end = self.bounds(rank, world_size)
        parts = [block[..., first:end] for block in self._by_block(whole)]
        return torch.cat(parts, dim=-1).movedim(-1, self.dim).contiguous()

    def gather(self, local: Tensor, group: Group = None) -> Tensor:
        """Return the whole tensor from the parts of all ranks.

        local: this rank's part. One all-gather, padded to the largest part, because an all-gather
        needs equal sizes.
        """
        world_size = group_size(group)
        sizes = [self.local_size(rank, world_size) for rank in range(world_size)]
        last = local.detach().movedim(self.dim, -1)
        padded = F.pad(last, (0, sizes[0] - last.shape[-1])).contiguous()
        received = gathered(padded[None], group) if world_size > 1 else padded[None]
        parts = [part[..., :size] for part, size in zip(received, sizes, strict=True)]
        if self.blocks > 1:
            # Received rank by rank; wanted block by block, the ranks' parts of each in order.
            by_block = zip(*(part.chunk(self.blocks, dim=-1) for part in parts), strict=True)
            parts = [piece for block in by_block for piece in block]
        return torch.cat(parts, dim=-1).movedim(-1, self.dim).contiguous()

    def _by_block(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor's blocks, with the split dim moved last."""
        return whole.movedim(self.dim, -1).chunk(self.blocks, dim=-1)


# Collectives on plain tensors.


def _unchanged(x: Tensor, group: Group) -> Tensor:
    """Return x as it is; a view, because autograd refuses an input that is returned itself."""
    return x.view_as(x)


def _all_reduced(x: Tensor, group: Group) -> Tensor:
    """Return the sum over the ranks, leaving x as it is."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gathered(x: Tensor, group: Group) -> Tensor:
    """Return the ranks' parts end to end along dim 0."""
    whole, work = start_gather(x, group)
    work.wait()
    return whole


def reduce_scattered(x: Tensor, group: Group) -> Tensor:
    """Return this rank's part, along dim 0, of the sum over the ranks."""
    part, work = start_reduce_scatter(x, group)
    work.wait()
    return part


def _own_part(x: Tensor, group: Group) -> Tensor:
    """Return this rank's part of dim 0."""
    length = _sequence_part(x, group)
    return x.narrow(0, group_rank(group) * length, length).contiguous()


def _sequence_part(x: Tensor, group: Group) -> int:
    """Return the length of a rank's part of dim 0. Raises ValueError if it is uneven."""
    world_size = group_size(group)
    if x.shape[0] % world_size:
        raise ValueError(
            "sequence parallelism needs a sequence that is a multiple of the ranks: "
            f"{x.shape[0]} positions / {world_size} ranks"
        )
    return x.shape[0] // world_size


def start_gather(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """Start an all-gather along dim 0; return its result and the work to wait for."""
    whole = x.new_empty((group_size(group) * x.shape[0], *x.shape[1:]))
    return whole, _all_gather(whole, x.contiguous(), group=group, async_op=True)


def start_reduce_scatter(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """Start a reduce-scatter along dim 0; return its result and the work to wait for."""
    part = x.new_empty((_sequence_part(x, group), *x.shape[1:]))
    return part, _reduce_scatter(part, x.contiguous(), group=group, async_op=True)


# Crossings between the regions. Each pair of forward and backward is the other's transpose.


class _Crossing(torch.autograd.Function):
    """One collective forward and another one backward, on the same group.

    The two are each other's transpose as linear maps over all ranks: that makes the gradient right.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Callable[[Tensor, Group], Tensor],
        backward: Callable[[Tensor, Group], Tensor],
        group: Group,
    ) -> Tensor:
        """Apply the forward collective, and remember the backward one."""
        ctx.collective, ctx.group = backward, group
        return forward(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Apply the backward collective to the gradient."""
        return ctx.collective(gradient, ctx.group), None, None, None


def _cross(
    x: Tensor,
    forward: Callable[[Tensor, Group], Tensor],
    backward: Callable[[Tensor, Group], Tensor],
    group: Group,
) -> Tensor:
    """Return x after a crossing; x itself on one rank."""
    return _Crossing.apply(x, forward, backward, group) if group_size(group) > 1 else x


def copy_to_tensor_parallel(x: Tensor, group: Group = None) -> Tensor:
    """Return x: Megatron's f, nothing forward, all-reduce backward.

    x: the same on all ranks. Each rank uses it in its own way, so that its gradient is a sum.
    """
    return _cross(x, _unchanged, _all_reduced, group)


def reduce_from_tensor_parallel(x: Tensor, group: Group = None) -> Tensor:
    """Return the sum over the ranks: Megatron's g, all-reduce forward, nothing backward.

    x: one term of the sum on each rank.
    """
    return _cross(x, _all_reduced, _unchanged, group)


def gather_from_sequence_parallel(x: Tensor, group: Group = None) -> Tensor:
    """Return the whole sequence, (s/p, ...) -> (s, ...): f of sequence parallelism.

    An all-gather forward, a reduce-scatter backward.
    """
    return _cross(x, gathered, reduce_scattered, group)


def reduce_scatter_to_sequence_parallel(x: Tensor, group: Group = None) -> Tensor:
    """Return this rank's positions of the sum, (s, ...) -> (s/p, ...): g of sequence parallelism.

    A reduce-scatter forward, an all-gather backward. Raises ValueError if s is no multiple of p.
    """
    return _cross(x, reduce_scattered, gathered, group)


def scatter_to_sequence_parallel(x: Tensor, group: Group = None) -> Tensor:
    """Return this rank's positions, (s, ...) -> (s/p, ...): nothing forward, all-gather backward.

    x: the same on all ranks. Raises ValueError if s is no multiple of p.
    """
    return _cross(x, _own_part, gathered, group)
