"""Placements: how one tensor lies on one mesh axis, and what moves it from one to another.

The type of a tensor fixes the type of its gradient (`gradient`), so a transition fixes its
backward: moving a value from A to B moves its gradient from gradient(B) to gradient(A). The
whole table of differentiable collectives is therefore the table of forward moves (`movement`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import cache

__all__ = [
    "Collective",
    "Invariant",
    "Movement",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "gradient",
    "local_size",
    "movement",
    "parse_placement",
    "part_bounds",
]


@dataclass(frozen=True, slots=True, order=True)
class Invariant:
    """Same on all ranks, one logical computation; so is its gradient."""

    def __str__(self) -> str:
        return "I"


@dataclass(frozen=True, slots=True, order=True)
class Replicate:
    """Same on all ranks, each rank uses it differently; its gradient is Partial."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True, order=True)
class Partial:
    """The sum over ranks is the value; its gradient is Replicate."""

    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Each rank holds its part of dimension `dim`; so does its gradient.

    blocks: the dim is that many equal blocks laid end to end, each split by itself (a fused QKV
    weight has 3). unit: each block is split in whole runs of that many elements (a head's width),
    which matters only where the number of runs does not divide by the number of ranks.
    Within a block, parts are those of `torch.chunk` over its runs.
    """

    dim: int
    blocks: int = 1
    unit: int = 1

    def __str__(self) -> str:
        extra = f", blocks={self.blocks}" if self.blocks != 1 else ""
        extra += f", unit={self.unit}" if self.unit != 1 else ""
        return f"S({self.dim}{extra})"


Placement = Invariant | Replicate | Shard | Partial

_SHARD = re.compile(r"S\((\d+)(?:, blocks=(\d+))?(?:, unit=(\d+))?\)")


def parse_placement(text: str) -> Placement:
    """The placement that prints as `text`. Raises ValueError for anything else."""
    simple: dict[str, Placement] = {"I": Invariant(), "R": Replicate(), "P": Partial()}
    if text in simple:
        return simple[text]
    match = _SHARD.fullmatch(text)
    if match is None:
        raise ValueError(f"not a placement: {text!r} (I, R, P, S(0), S(0, blocks=3))")
    dim, blocks, unit = match.groups()
    return Shard(int(dim), int(blocks or 1), int(unit or 1))


def gradient(placement: Placement) -> Placement:
    """The placement of the gradient of a tensor that lies as `placement`."""
    if isinstance(placement, Replicate):
        return Partial()
    if isinstance(placement, Partial):
        return Replicate()
    return placement


def part_bounds(count: int, world_size: int, rank: int) -> tuple[int, int]:
    """[start, stop) of a rank's part of `count` things, as torch.chunk cuts them."""
    step = -(-count // world_size)
    start = min(rank * step, count)
    return start, min(start + step, count)


def local_size(size: int, shard: Shard, world_size: int, rank: int = 0) -> int:
    """Elements of a dim of `size` elements that `rank` holds. Rank 0 holds the largest part."""
    runs = size // (shard.blocks * shard.unit)
    start, stop = part_bounds(runs, world_size, rank)
    return shard.blocks * shard.unit * (stop - start)


class Collective(Enum):
    """What crosses the links. Bytes are counted on the full (unsplit) tensor."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"


class Movement(Enum):
    """What a move does in the direction it is made."""

    NONE = "none"
    SLICE = "slice"
    PAD = "pad"
    KEEP_ON_FIRST = "keep_on_first"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"

    @property
    def collective(self) -> Collective | None:
        """The collective that it is, None where nothing crosses the links."""
        return Collective(self.value) if self.value in _COLLECTIVES else None


_COLLECTIVES = {collective.value for collective in Collective}

_MOVEMENTS: dict[tuple[type, type], Movement] = {
    (Invariant, Replicate): Movement.NONE,
    (Invariant, Shard): Movement.SLICE,
    (Invariant, Partial): Movement.KEEP_ON_FIRST,
    (Replicate, Invariant): Movement.NONE,
    (Replicate, Shard): Movement.SLICE,
    (Replicate, Partial): Movement.KEEP_ON_FIRST,
    (Shard, Invariant): Movement.ALL_GATHER,
    (Shard, Replicate): Movement.ALL_GATHER,
    (Shard, Shard): Movement.ALL_TO_ALL,
    (Shard, Partial): Movement.PAD,
    (Partial, Invariant): Movement.ALL_REDUCE,
    (Partial, Replicate): Movement.ALL_REDUCE,
    (Partial, Shard): Movement.REDUCE_SCATTER,
}


@cache
def movement(source: Placement, target: Placement) -> Movement:
    """What brings a tensor that lies as `source` to lie as `target`, forward only.

    The backward of the differentiable move is movement(gradient(target), gradient(source)).
    """
    if source == target:
        return Movement.NONE
    return _MOVEMENTS[type(source), type(target)]
