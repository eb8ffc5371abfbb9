"""Names in an emitted program: of values, mesh axes, placements and layouts."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable

from autoparallel.placement import Layout, Placement, Shard

__all__ = ["Names", "layout_name", "placement_name"]

# What an emitted program calls by name besides values, placements and mesh axes.
RESERVED = frozenset(
    """
    F again alike buffers constants convert convert_again device forward functools inputs kernels
    math move parameters part parts_are_alike pending_sum ranks recomputed rng torch
    """.split()
)
_PATTERNS = re.compile(r"[IRP]|S\d+(_blocks\d+)?(_unit\d+)?|constant_\d+|block_\d+")


class Names:
    """Distinct identifiers: of the mesh axes first, then of values, which keep theirs if they can.

    symbols: names of sizes, which no value may have.
    """

    def __init__(self, axes: Iterable[str], symbols: Iterable[str], values: Iterable[str]) -> None:
        self.taken = set(symbols)
        self.axes = tuple(self.fresh(name) for name in axes)
        self.values = {name: self.fresh(name) for name in values}

    def fresh(self, name: str) -> str:
        """`name`, or with underscores behind it where it means something else."""
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
    """S0, S0_blocks3, R: the placement as an identifier."""
    if not isinstance(placement, Shard):
        return str(placement)
    extra = f"_blocks{placement.blocks}" if placement.blocks != 1 else ""
    extra += f"_unit{placement.unit}" if placement.unit != 1 else ""
    return f"S{placement.dim}{extra}"


def layout_name(layout: Layout) -> str:
    """S0_R: the layout as part of an identifier."""
    return "_".join(map(placement_name, layout))
