"""Placements: how a tensor lies on each mesh axis, and the collectives that redistribute it.

The type of a tensor fixes the type of its gradient (`gradient`), so a transition fixes its
backward: moving a value from A to B moves its gradient from gradient(B) to gradient(A). The whole
table of differentiable collectives is therefore the table of forward moves (`movement`). Megatron's
f (arXiv:1909.08053) is I -> R, its g is P -> I; with sequence parallelism (arXiv:2205.05198) they
are S -> R and P -> S.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache

__all__ = [
    "Block",
    "Collective",
    "Counts",
    "Invariant",
    "Layout",
    "Movement",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "Step",
    "backward_steps",
    "block_runs",
    "block_sizes",
    "blocks_and_units",
    "can_be_shared",
    "divides_in_runs",
    "fewest_runs",
    "gradient",
    "is_even",
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


# A number that holds for all blocks of a dim, or one for each of them.
Counts = int | tuple[int, ...]


@dataclass(frozen=True, slots=True, order=True, repr=False)
class Shard:
    """Each rank holds its part of dimension `dim`; its gradient is sharded alike.

    dim: the dimension, counted from 0. blocks: the dim is that many equal blocks laid end to end,
    each split by itself (a fused QKV weight has 3); or the sizes of blocks that are not equal, of
    which only the proportions count, so that they are those of every part of the dim as well. unit:
    each block is split in whole runs of that many elements (a head's width), which matters only
    where the number of runs does not divide by the number of ranks; one for each block, where they
    differ. Within a block, parts are those of `torch.chunk` over its runs.

    repeat: each part is held by so many neighbouring ranks, as four heads of keys are on eight
    ranks of two queries' heads each; one for each block, where they differ. Each of these ranks
    uses the part differently, so that its gradient is pending among them. pending: of the gradient,
    that the sum over the ranks that share a part is its value.

    outermost: the dim lies outermost in the memory of what is gathered or scattered, so that parts
    need no copy. It is the same placement; programs alone say so.

    >>> print(Shard(0), Shard(0, blocks=3), Shard(1, unit=64))
    S(0) S(0, blocks=3) S(1, unit=64)
    >>> print(Shard(0, blocks=(2048, 512, 512)))  # 32 heads of queries, 8 of keys and of values
    S(0, blocks=(4, 1, 1))
    >>> print(Shard(0, blocks=(4, 1, 1), repeat=(1, 2, 2)))  # on 16 ranks
    S(0, blocks=(4, 1, 1), repeat=(1, 2, 2))
    """

    dim: int
    blocks: Counts = 1
    unit: Counts = 1
    repeat: Counts = 1
    pending: bool = False
    outermost: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        # Most have numbers alone, which are in their one form already.
        if type(self.blocks) is type(self.unit) is type(self.repeat) is int and not self.pending:
            return
        blocks, unit, repeat = blocks_and_units(self.blocks, self.unit, self.repeat)
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "unit", unit)
        object.__setattr__(self, "repeat", repeat)
        if self.pending and repeat == 1:
            raise ValueError("a part that one rank alone holds is not pending")

    def __repr__(self) -> str:
        extra = f", repeat={self.repeat}" if self.repeat != 1 else ""
        extra += ", pending=True" if self.pending else ""
        return f"Shard(dim={self.dim}, blocks={self.blocks}, unit={self.unit}{extra})"

    def __str__(self) -> str:
        extra = f", blocks={self.blocks}" if self.blocks != 1 else ""
        extra += f", unit={self.unit}" if self.unit != 1 else ""
        extra += f", repeat={self.repeat}" if self.repeat != 1 else ""
        extra += ", pending" if self.pending else ""
        extra += ", outermost=True" if self.outermost else ""
        return f"S({self.dim}{extra})"


# Blocks that are not cut alike are looked at one by one: more of them than this are refused, as a
# text that was edited may say any number.
_MOST_BLOCKS = 4096


def blocks_and_units(
    blocks: Counts, unit: Counts, repeat: Counts = 1
) -> tuple[Counts, Counts, Counts]:
    """Return blocks, units and repeats in the one form that equal ways of cutting have: proportions
    without a common divisor, and a number where all are equal. Raises ValueError where there is no
    block, one without elements, another number of units or repeats than of blocks, or too many.

    >>> blocks_and_units((64, 16, 16), (8, 8, 8)), blocks_and_units((5, 5), (1, 5))
    (((4, 1, 1), 8, 1), (2, (1, 5), 1))
    """
    count = len(blocks) if isinstance(blocks, tuple) else blocks
    for numbers, allowed in ((blocks, None), (unit, count), (repeat, count)):
        several = numbers if isinstance(numbers, tuple) else (numbers,)
        fits = not isinstance(numbers, tuple) or allowed is None or len(several) == allowed
        if not several or min(several) < 1 or not fits:
            raise ValueError(f"no way to cut a dim: {blocks=!r}, {unit=!r}, {repeat=!r}")
    if count > _MOST_BLOCKS:
        raise ValueError(f"{count} blocks that are not cut alike")
    if isinstance(blocks, tuple):
        divisor = math.gcd(*blocks)
        blocks = tuple([size // divisor for size in blocks])
        blocks = count if set(blocks) == {1} else blocks
    return blocks, _one_if_alike(unit), _one_if_alike(repeat)


def _one_if_alike(numbers: Counts) -> Counts:
    """Return the number that all are equal to, or else all of them."""
    alike = isinstance(numbers, tuple) and len(set(numbers)) == 1
    return numbers[0] if alike and isinstance(numbers, tuple) else numbers


Placement = Invariant | Replicate | Shard | Partial

# How a tensor lies on a mesh: one placement per axis, outermost first. Where two axes split the
# same dim, the outer one cuts it first and the inner one cuts the part.
Layout = tuple[Placement, ...]

# Plain digits without zeros before them, so that one placement has one text; nine of them, as no
# dim is longer than that, and arithmetic on longer numbers takes as long as they are.
_COUNT = r"[1-9][0-9]{0,8}"
_COUNTS = rf"{_COUNT}|\({_COUNT}(?:, {_COUNT}){{1,99}}\)"
_SHARD = re.compile(
    rf"S\((0|{_COUNT})(?:, blocks=({_COUNTS}))?(?:, unit=({_COUNTS}))?"
    rf"(?:, repeat=({_COUNTS})(, pending)?)?\)"
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
    dim, blocks, unit, repeat, pending = match.groups()
    return Shard(int(dim), _counts(blocks), _counts(unit), _counts(repeat), bool(pending))


def _counts(text: str | None) -> Counts:
    """Return the number, or the numbers in parentheses; 1 where there is no text."""
    if text is None or not text.startswith("("):
        return int(text or 1)
    return tuple(map(int, text.strip("()").split(", ")))


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
    places, I and S stay; what several ranks hold is pending among them. gradient(gradient(p)) is p.

    >>> gradient(Replicate()), gradient(Shard(1))
    (Partial(), Shard(dim=1, blocks=1, unit=1))
    >>> print(gradient(Shard(1, repeat=2)))
    S(1, repeat=2, pending)
    """
    if isinstance(placement, Replicate):
        return Partial()
    if isinstance(placement, Partial):
        return Replicate()
    if isinstance(placement, Shard) and placement.repeat != 1:
        return replace(placement, pending=not placement.pending)
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
    blocks, unit = shard.blocks, shard.unit
    if isinstance(blocks, int) and isinstance(unit, int) and shard.repeat == 1:
        # All blocks are cut alike, so that a rank holds as many runs of each.
        start, stop = part_bounds(size // (blocks * unit), world_size, rank)
        return blocks * unit * (stop - start)
    return sum(length for _, length in block_runs(size, shard, world_size, rank))


def is_even(shard: Shard) -> bool:
    """Return whether all blocks of a dim are of one size, and cut in runs of one size, of which
    each is held by one rank.

    >>> is_even(Shard(0, blocks=3)), is_even(Shard(0, blocks=(4, 1, 1)))
    (True, False)
    """
    blocks, unit = shard.blocks, shard.unit
    return isinstance(blocks, int) and isinstance(unit, int) and shard.repeat == 1


# A block of a dim: its elements, unit and repeat.
Block = tuple[int, int, int]


def block_sizes(
    size: int, blocks: Counts, unit: Counts = 1, repeat: Counts = 1
) -> tuple[Block, ...]:
    """Return (elements, unit, repeat) of every block of a dim of `size` elements, which must divide
    so.

    blocks, unit, repeat: as a Shard has them.

    >>> block_sizes(12, (4, 1, 1), 1), block_sizes(12, 2, (3, 1), (1, 2))
    (((8, 1, 1), (2, 1, 1), (2, 1, 1)), ((6, 3, 1), (6, 1, 2)))
    """
    shares = blocks if isinstance(blocks, tuple) else (1,) * blocks
    units, repeats = (
        numbers if isinstance(numbers, tuple) else (numbers,) * len(shares)
        for numbers in (unit, repeat)
    )
    total = sum(shares)
    return tuple(
        (size * share // total, run, times)
        for share, run, times in zip(shares, units, repeats, strict=True)
    )


def block_runs(size: int, shard: Shard, world_size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return (start in the whole dim, length) of what a rank holds of every block.

    size: of the whole dim. shard: how it is cut; its `dim` is not looked at.

    >>> block_runs(12, Shard(0, blocks=(4, 1, 1)), 2, 1)
    ((4, 4), (9, 1), (11, 1))
    >>> [block_runs(12, Shard(0, repeat=2), 4, rank)[0] for rank in range(4)]
    [(0, 6), (0, 6), (6, 6), (6, 6)]
    """
    runs, first = [], 0
    for length, unit, repeat in block_sizes(size, shard.blocks, shard.unit, shard.repeat):
        start, stop = part_bounds(length // unit, world_size // repeat, rank // repeat)
        runs.append((first + start * unit, (stop - start) * unit))
        first += length
    return tuple(runs)


def divides_in_runs(size: int, blocks: Counts, unit: Counts, parts: int = 1) -> bool:
    """Return whether a dim of `size` elements consists of such blocks of whole runs, and every
    block of a number of runs that divides by `parts`.

    >>> divides_in_runs(12, (4, 1, 1), 1, parts=2), divides_in_runs(12, (4, 1, 1), 1, parts=4)
    (True, False)
    """
    if isinstance(blocks, int) and isinstance(unit, int):
        return not size % (blocks * unit * parts)
    shares = blocks if isinstance(blocks, tuple) else (1,) * blocks
    total = sum(shares)
    return not any(size * share % total for share in shares) and not any(
        length % (run * parts) for length, run, _ in block_sizes(size, blocks, unit)
    )


def fewest_runs(size: int, blocks: Counts, unit: Counts) -> int:
    """Return the number of runs of the block that has the fewest.

    >>> fewest_runs(12, (4, 1, 1), 1)
    2
    """
    if isinstance(blocks, int) and isinstance(unit, int):
        return size // (blocks * unit)
    return min(length // run for length, run, _ in block_sizes(size, blocks, unit))


def can_be_shared(shard: Shard, size: int, world_size: int) -> bool:
    """Return whether each part can be held by as many ranks as `shard.repeat` says: groups of equal
    size, of which each has as many runs.

    size: of the whole dim, which must consist of such blocks and runs.

    >>> can_be_shared(Shard(0, repeat=2), 4, 8), can_be_shared(Shard(0, repeat=2), 4, 6)
    (True, False)
    """
    return shard.repeat == 1 or all(
        times == 1 or (world_size % times == 0 and length // unit % (world_size // times) == 0)
        for length, unit, times in block_sizes(size, shard.blocks, shard.unit, shard.repeat)
    )


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
    the value; so it does among the ranks that share a part.
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
    pending = isinstance(source, Shard) and source.pending
    if isinstance(target, Shard) and target.repeat != 1:
        if isinstance(source, Partial):
            return Movement.ALL_REDUCE  # each rank then keeps its part of the sum
        if target.pending and not pending and source == gradient(target):
            return Movement.KEEP_ON_FIRST
    if pending and isinstance(target, (Invariant, Replicate)):
        return Movement.ALL_REDUCE
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
