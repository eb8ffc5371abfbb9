"""Placements of a tensor on each mesh axis: the four kinds, their texts, and their gradients."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from functools import cache

__all__ = [
    "Counts",
    "Invariant",
    "Layout",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "blocks_and_units",
    "gradient",
    "layout_gradient",
    "layout_text",
    "parse_layout",
    "parse_placement",
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
