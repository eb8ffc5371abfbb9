"""Identifiers in an emitted program: of values, mesh axes, placements and layouts."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable

from autoparallel.placement import Layout, Placement, Shard

__all__ = ["Names", "layout_name", "placement_name"]

# Names that an emitted program reads besides those of values, placements and mesh axes.
RESERVED = frozenset(
    """
    F again alike begin buffers constants convert convert_again device end end_again forward
    functools inputs kernels math move parameters part parts_are_alike pending_sum ranks recomputed
    remade rng torch
    """.split()
)
# Names of placements, constants and recomputed blocks, which the writers below make up.
_PATTERNS = re.compile(
    r"[IRP]|S\d+(_(blocks|unit|repeat)\d+(_\d+)*)*(_pending)?|constant_\d+|block_\d+|made_\d+"
)
# What no identifier has.
_NO_LETTERS = re.compile(r"[^0-9A-Za-z_]")


class Names:
    """Distinct identifiers: of the mesh axes first, then of values, which keep theirs if they can.

    axes: the mesh axes' names. symbols: names of sizes, which no value may have. values: their
    names in the graph. The attributes `axes` and `values` are their identifiers; `taken` are all
    that are in use.
    """

    def __init__(self, axes: Iterable[str], symbols: Iterable[str], values: Iterable[str]) -> None:
        self.taken = set(symbols)
        self.axes = tuple(self.fresh(name) for name in axes)
        self.values = {name: self.fresh(name) for name in values}

    def fresh(self, name: str) -> str:
        """Return `name`, with underscores behind it where it means something else,
        and reserved from now on.

        >>> names = Names(["tp"], [], ["x", "class"])
        >>> names.fresh("x"), names.values["class"], names.fresh("é; 1")
        ('x_', 'class_', '___1')
        """
        # Whatever the graph and the mesh call a thing, what the text has is an identifier.
        name = _NO_LETTERS.sub("_", name)
        name = name if name.isidentifier() else f"_{name}"
        while (
            name in self.taken
            or name in RESERVED
            or keyword.iskeyword(name)
            or hasattr(builtins, name)
            or _PATTERNS.fullmatch(name)
        ):
            name += "_"
        self.taken.add(name)
        return name


def placement_name(placement: Placement) -> str:
    """Return the placement as an identifier.

    >>> placement_name(Shard(0, blocks=3))
    'S0_blocks3'
    >>> placement_name(Shard(0, blocks=(4, 1, 1)))
    'S0_blocks4_1_1'
    """
    if not isinstance(placement, Shard):
        return str(placement)
    extra = f"_blocks{_counts(placement.blocks)}" if placement.blocks != 1 else ""
    extra += f"_unit{_counts(placement.unit)}" if placement.unit != 1 else ""
    extra += f"_repeat{_counts(placement.repeat)}" if placement.repeat != 1 else ""
    extra += "_pending" if placement.pending else ""
    extra += "_outer" if placement.outermost else ""
    return f"S{placement.dim}{extra}"


def _counts(numbers: int | tuple[int, ...]) -> str:
    """Return a number, or several joined by underscores."""
    return "_".join(map(str, numbers)) if isinstance(numbers, tuple) else str(numbers)


def layout_name(layout: Layout) -> str:
    """Return the layout as part of an identifier, its placements joined by underscores.

    >>> layout_name((Shard(0), Shard(1)))
    'S0_S1'
    """
    return "_".join(map(placement_name, layout))
