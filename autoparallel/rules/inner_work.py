"""The work of an op that is several others in one: its products, and the bytes that it moves."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["InnerProduct", "InnerWork"]


@dataclass(frozen=True, slots=True)
class InnerProduct:
    """A product inside of a fused op, in equal groups: (rows, depth) x (depth, columns) of each.

    rows: of one group. row_loops: the loops whose splits share the rows. groups: as many as the
    loop group_loop has. columns, depth: sizes; column_loop, depth_loop: the loops that split them,
    or "". itemsize: bytes of an element.
    """

    rows: float
    row_loops: tuple[str, ...]
    groups: int
    group_loop: str
    columns: int
    column_loop: str
    depth: int
    depth_loop: str
    itemsize: int

    @property
    def points(self) -> float:
        """Multiplications of all groups."""
        return self.groups * self.rows * self.columns * self.depth


@dataclass(frozen=True, slots=True)
class InnerWork:
    """The work of an op that is several others in one.

    products: in it. moved: of everything else, the bytes that it reads and writes forward, those
    of the backward pass, and the loops whose splits share them.
    """

    products: tuple[InnerProduct, ...]
    moved: tuple[tuple[float, float, tuple[str, ...]], ...]
