"""Placements: how a tensor lies on each mesh axis, and the collectives that redistribute it.

The type of a tensor fixes the type of its gradient (`gradient`), so a transition fixes its
backward: moving a value from A to B moves its gradient from gradient(B) to gradient(A). The whole
table of differentiable collectives is therefore the table of forward moves (`movement`). Megatron's
f (arXiv:1909.08053) is I -> R, its g is P -> I; with sequence parallelism (arXiv:2205.05198) they
are S -> R and P -> S.
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
    """The value is the same on all ranks, as one logical computation; so is its gradient,
    on every rank in full.
    """

    def __str__(self) -> str:
        return "I"


@dataclass(frozen=True, slots=True, order=True)
class Replicate:
    """The value is the same on all ranks, but each rank uses it differently (Megatron's f: its
    gradient is a partial sum).

    DTensor's Replicate covers both I and R; telling them apart is what makes every backward follow
    from its forward.
    """

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True, order=True)
class Partial:
    """The sum over the ranks is the value (DTensor's Partial("sum")); its gradient is Replicate."""

    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Each rank holds its part of dimension `dim`; its gradient is sharded alike.

    dim: the dimension, counted from 0. blocks: the dim is that many equal blocks laid end to end,
    each split by itself (a fused QKV weight has 3). unit: each block is split in whole runs of that
    many elements (a head's width), which matters only where the number of runs does not divide by
    the number of ranks. Within a block, parts are those of `torch.chunk` over its runs.

    >>> print(Shard(0), Shard(0, blocks=3), Shard(1, unit=64))
    S(0) S(0, blocks=3) S(1, unit=64)
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

# Plain digits without zeros before them, so that one placement has one text; nine of them, as no
# dim is longer than that, and arithmetic on longer numbers takes as long as they are.
_SHARD = re.compile(
    r"S\((0|[1-9][0-9]{0,8})"
    r"(?:, blocks=([1-9][0-9]{0,8}))?(?:, unit=([1-9][0-9]{0,8}))?\)"
)


def parse_placement(text: str) -> Placement:
    """Return the placement that prints as `text`. Raises ValueError for anything else.

    >>> parse_placement("S(1, unit=64)")
    Shard(dim=1, blocks=1, unit=64)
    """
    simple: dict[str, Placement] = {"I": Invariant(), "R": Replicate(), "P": Partial()}
    if text in simple:
        return simple[text]
    match = _SHARD.fullmatch(text)
    if match is None:
        raise ValueError(f"not a placement: {text!r} (I, R, P, S(0), S(0, blocks=3))")
    dim, blocks, unit = match.groups()
    return Shard(int(dim), int(blocks or 1), int(unit or 1))


def layout_text(layout: Layout) -> str:
    """Return the layout as text: "S(0)" on a mesh of one axis, "S(0) | R" on one of two.

    Inverse of `parse_layout`.

    >>> layout_text((Shard(0), Replicate()))
    'S(0) | R'
    """
    return " | ".join(map(str, layout))


def parse_layout(text: str) -> Layout:
    """Return the layout that prints as `text`: its placements, outermost mesh axis first. Raises
    ValueError for anything else.

    >>> parse_layout("I | S(1)")
    (Invariant(), Shard(dim=1, blocks=1, unit=1))
    """
    return tuple(map(parse_placement, text.split(" | ")))


@cache
def whole_layout(axes: int) -> Layout:
    """Return the layout of an unsharded value on a mesh of `axes` axes: Invariant on every one.

    axes: their number.
    """
    return (Invariant(),) * axes


def gradient(placement: Placement) -> Placement:
    """Return the placement of the gradient of a tensor that lies as `placement`: R and P change
    places, I and S stay. gradient(gradient(p)) is p.

    >>> gradient(Replicate()), gradient(Shard(1))
    (Partial(), Shard(dim=1, blocks=1, unit=1))
    """
    if isinstance(placement, Replicate):
        return Partial()
    if isinstance(placement, Partial):
        return Replicate()
    return placement


def layout_gradient(layout: Layout) -> Layout:
    """Return the layout of the gradient of a tensor that lies as `layout`, axis by axis.

    >>> layout_text(layout_gradient((Shard(0), Replicate())))
    'S(0) | P'
    """
    return tuple(map(gradient, layout))


def part_bounds(count: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return the bounds [start, stop) of a rank's part of `count` things, as torch.chunk cuts them:
    every part is count / world_size rounded up, and the last ones are shorter or empty.

    >>> [part_bounds(5, 4, rank) for rank in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    step = -(-count // world_size)
    start = min(rank * step, count)
    return start, min(start + step, count)


def local_size(size: int, shard: Shard, world_size: int, rank: int = 0) -> int:
    """Return the number of elements that `rank` holds of a dim of `size` elements;
    rank 0 holds the largest part.

    size: of the whole dim. shard: how it is cut; its `dim` is not looked at. world_size: ranks on
    the mesh axis.

    >>> [local_size(25 * 64, Shard(0, unit=64), 8, rank) for rank in (0, 6, 7)]
    [256, 64, 0]
    """
    # All blocks are cut alike, so that a rank holds as many runs of each.
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
    """Return the number of elements along `dim`, `size` in all, that one rank holds under a layout.

    layout: a placement for each mesh axis; those that do not shard `dim` do not matter. sizes: the
    mesh axes' sizes. ranks: the rank's place on each axis; by default 0, which holds the largest
    part.

    >>> local_layout_size(12, 0, (Shard(0), Shard(0)), (2, 3))
    2
    """
    # Outermost first: where two axes cut one dim, the inner one cuts what the outer one left.
    for axis, placement in enumerate(layout):
        if isinstance(placement, Shard) and placement.dim == dim:
            size = local_size(size, placement, sizes[axis], ranks[axis] if ranks else 0)
    return size


class Collective(Enum):
    """The collectives that cross the links.

    Their bytes are counted on the full (unsharded) tensor.
    """

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"


class Movement(Enum):
    """One move of a tensor on a mesh axis, named by what it does
    in the direction in which it is made.

    NONE and SLICE send nothing. PAD puts a part amid zeros (S -> P), and KEEP_ON_FIRST keeps the
    value on the first rank and zeros elsewhere (I or R -> P), so that the sum over the ranks stays
    the value.
    """

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
        """The collective that the move makes; None where nothing crosses the links."""
        return Collective(self.value) if self.value in _COLLECTIVES else None


_COLLECTIVES = {collective.value for collective in Collective}

# Nothing leads from P to P, I to I or R to R but staying; S to S of another dim or of other blocks
# is a real move. `movement` handles equality before it looks here.
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


def movement(source: Placement, target: Placement) -> Movement:
    """Return the move that brings a tensor that lies as `source` to lie as `target`, forward only.

    The backward of the differentiable move is movement(gradient(target), gradient(source)). Every
    pair of placements has a move.

    >>> movement(Partial(), Shard(0)).value
    'reduce_scatter'
    """
    if source == target:
        return Movement.NONE
    return _MOVEMENTS[type(source), type(target)]


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """One redistribution of a tensor on one mesh axis; its placements on the other axes stay."""

    axis: int
    source: Placement
    target: Placement

    def __str__(self) -> str:
        return f"{self.axis}: {self.source} -> {self.target}"

    @property
    def forward(self) -> Movement:
        """The move that the step makes of the value."""
        return movement(self.source, self.target)

    @property
    def backward(self) -> Movement:
        """The move that the step makes of the gradient, in the backward pass."""
        return movement(gradient(self.target), gradient(self.source))

    def applied(self, layout: Layout) -> Layout:
        """Return the layout after the step. The layout must have the step's source on its axis."""
        assert layout[self.axis] == self.source, (layout, self)
        return (*layout[: self.axis], self.target, *layout[self.axis + 1 :])


def is_possible_step(layout: Layout, step: Step) -> bool:
    """Return whether the part that a step moves is one piece of its dim, which it is if no inner
    axis cuts that dim too.

    layout: before the step. Where an inner axis has cut the dim, a rank holds a part of a part, and
    a collective on the outer axis would put pieces together in the wrong order.

    >>> is_possible_step((Shard(0), Shard(0)), Step(0, Shard(0), Replicate()))
    False
    """
    dims = {end.dim for end in (step.source, step.target) if isinstance(end, Shard)}
    return not any(
        isinstance(inner, Shard) and inner.dim in dims for inner in layout[step.axis + 1 :]
    )


def backward_steps(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Return the steps by which the gradient travels when the value travels by `steps`: the same
    ones in reverse, each from gradient(target) to gradient(source).

    >>> [str(step) for step in backward_steps((Step(0, Invariant(), Replicate()),))]
    ['0: P -> I']
    """
    return tuple(
        Step(step.axis, gradient(step.target), gradient(step.source)) for step in reversed(steps)
    )
