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
    "Layout",
    "Movement",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "Step",
    "backward_steps",
    "gradient",
    "is_possible_step",
    "layout_gradient",
    "layout_text",
    "local_layout_size",
    "local_size",
    "movement",
    "parse_layout",
    "parse_placement",
    "part_bounds",
    "whole_layout",
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

# How a tensor lies on a mesh: one placement per axis, outermost first. Where two axes split the
# same dim, the outer one cuts it first and the inner one cuts the part.
Layout = tuple[Placement, ...]

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


def layout_text(layout: Layout) -> str:
    """ "S(0)" on a mesh of one axis, "S(0) | R" on two."""
    return " | ".join(map(str, layout))


def parse_layout(text: str) -> Layout:
    """The layout that prints as `text`. Raises ValueError for anything else."""
    return tuple(map(parse_placement, text.split(" | ")))


@cache
def whole_layout(axes: int) -> Layout:
    """Invariant on every axis."""
    return (Invariant(),) * axes


def gradient(placement: Placement) -> Placement:
    """The placement of the gradient of a tensor that lies as `placement`."""
    if isinstance(placement, Replicate):
        return Partial()
    if isinstance(placement, Partial):
        return Replicate()
    return placement


def layout_gradient(layout: Layout) -> Layout:
    """The layout of the gradient of a tensor that lies as `layout`."""
    return tuple(map(gradient, layout))


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


def local_layout_size(
    size: int,
    dim: int,
    layout: Layout,
    sizes: tuple[int, ...],
    ranks: tuple[int, ...] | None = None,
) -> int:
    """Elements along `dim`, `size` in all, that one rank holds.

    sizes: of the mesh axes. ranks: the rank's place on each; by default 0, which holds the largest
    part.
    """
    for axis, placement in enumerate(layout):
        if isinstance(placement, Shard) and placement.dim == dim:
            size = local_size(size, placement, sizes[axis], ranks[axis] if ranks else 0)
    return size


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


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """One move of a tensor on one mesh axis; its placements on the other axes stay."""

    axis: int
    source: Placement
    target: Placement

    def __str__(self) -> str:
        return f"{self.axis}: {self.source} -> {self.target}"

    @property
    def forward(self) -> Movement:
        """What it does to the value."""
        return movement(self.source, self.target)

    @property
    def backward(self) -> Movement:
        """What it does to the gradient."""
        return movement(gradient(self.target), gradient(self.source))

    def applied(self, layout: Layout) -> Layout:
        """The layout after the step."""
        assert layout[self.axis] == self.source, (layout, self)
        return (*layout[: self.axis], self.target, *layout[self.axis + 1 :])


def is_possible_step(layout: Layout, step: Step) -> bool:
    """Whether the part that a step moves is one piece of its dim: no inner axis cuts that dim."""
    dims = {end.dim for end in (step.source, step.target) if isinstance(end, Shard)}
    return not any(
        isinstance(inner, Shard) and inner.dim in dims for inner in layout[step.axis + 1 :]
    )


def backward_steps(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """How the gradient travels when the value travels by `steps`."""
    return tuple(
        Step(step.axis, gradient(step.target), gradient(step.source)) for step in reversed(steps)
    )
