"""Repeated layers as one: rows whose paths differ only in an index are folded into one."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Folded", "fold", "index_text"]

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Folded(Generic[Item]):
    """A Folded stands for rows that differ only in the indices of their paths.

    path: common to the rows, with "{0..95}" for an index that differs. items: those of the rows, in
    their order.
    """

    path: str
    items: tuple[Item, ...]

    @property
    def first(self) -> Item:
        """The item that stands for all."""
        return self.items[0]

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.items)


def fold(rows: Iterable[tuple[str, Hashable, Item]]) -> list[Folded[Item]]:
    """Fold rows (path, content, item) with equal content and paths that differ in an index only.

    Paths are taken apart at dots and folded at one position after another, outermost first, so
    that experts within layers fold too. Rows with equal path and content fold as well. The order
    is that of the first rows.

    >>> rows = [(f"layers.{layer}.weight", "split", layer) for layer in range(3)]
    >>> [(row.path, row.items) for row in fold([*rows, ("norm.weight", "whole", 9)])]
    [('layers.{0..2}.weight', (0, 1, 2)), ('norm.weight', (9,))]
    """
    folded = [(tuple(path.split(".")), content, [item]) for path, content, item in rows]
    depth = max((len(parts) for parts, _, _ in folded), default=0)
    for position in range(depth):
        groups: dict[Hashable, list[tuple[str, list[Item]]]] = {}
        for parts, content, items in folded:
            index = parts[position] if position < len(parts) else ""
            # "{}" is no module's name, so a folded position meets only folded ones.
            same = parts if not index.isdigit() else _without(parts, position)
            groups.setdefault((same, content), []).append((index, items))
        folded = []
        for key, group in groups.items():
            parts, content = key  # type: ignore[misc]
            indices = list(dict.fromkeys(int(index) for index, _ in group if index.isdigit()))
            if indices:
                name = index_text(indices)
                parts = (*parts[:position], name, *parts[position + 1 :])
            folded.append((parts, content, [item for _, items in group for item in items]))
    return [Folded(".".join(parts), tuple(items)) for parts, _, items in folded]


def index_text(indices: list[int]) -> str:
    """Write indices as one part of a path: runs from their first to their last.

    >>> index_text([3]), index_text([0, 1, 2]), index_text([0, 1, 2, 7])
    ('3', '{0..2}', '{0..2,7}')
    """
    if len(indices) == 1:
        return str(indices[0])
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return "{" + ",".join(texts) + "}"


def _without(parts: tuple[str, ...], position: int) -> tuple[str, ...]:
    """Return the parts of a path with a hole for the index at a position."""
    return (*parts[:position], "{}", *parts[position + 1 :])
