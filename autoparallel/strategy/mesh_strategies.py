"""How one op may run on a whole mesh: one strategy per axis, where they go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

from autoparallel.graph.graph import Dim, hint
from autoparallel.placement import Layout, Shard
from autoparallel.rules.rule import ShardingRule, Strategy, is_possible

__all__ = ["MeshStrategy", "is_nested", "joint_strategies"]


@dataclass(frozen=True, slots=True)
class MeshStrategy:
    """One strategy per mesh axis. operands, results: the layouts that follow from them."""

    parts: tuple[Strategy, ...]
    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]

    @staticmethod
    def of(parts: tuple[Strategy, ...]) -> MeshStrategy:
        """The strategies of all axes as one."""
        return MeshStrategy(
            parts,
            tuple(zip(*(part.operands for part in parts), strict=True)),
            tuple(zip(*(part.results for part in parts), strict=True)),
        )

    @property
    def kernels(self) -> tuple[str, ...]:
        """Per axis the name of the kernel that it needs, or ""."""
        return tuple(part.kernel.name if part.kernel else "" for part in self.parts)


def is_nested(shape: Sequence[Dim], layout: Layout, sizes: tuple[int, ...]) -> bool:
    """Whether axes that split the same dim do it alike, so that inner parts are parts of parts.

    The runs must divide evenly by all ranks, or an inner axis would cut runs and leave ranks with
    more work than their share; of a dim whose size may change, at the size planned for.
    """
    for (one, first), (two, second) in combinations(enumerate(layout), 2):
        if not (isinstance(first, Shard) and isinstance(second, Shard)):
            continue
        if first.dim != second.dim:
            continue
        runs = hint(shape[first.dim]) // (first.blocks * first.unit)
        if first != second or runs % (sizes[one] * sizes[two]):
            return False
    return True


def joint_strategies(
    rule: ShardingRule,
    per_axis: Sequence[tuple[Strategy, ...]],
    shapes: Sequence[Sequence[Dim]],
    sizes: tuple[int, ...],
) -> tuple[MeshStrategy, ...]:
    """All joint strategies of one op, the plainest first.

    per_axis: its strategies on each axis alone. shapes: of its operands and results. A loop may be
    split on several axes in the same way. Of several kernels, all but one must run the op itself on
    their part, so that they can be put inside each other.
    """
    if len(per_axis) == 1:
        return tuple(MeshStrategy.of((part,)) for part in per_axis[0])
    found = []
    for parts in product(*per_axis):
        if not _together(rule, parts, sizes):
            continue
        joint = MeshStrategy.of(parts)
        layouts = (*joint.operands, *joint.results)
        if all(
            is_nested(shape, layout, sizes) for shape, layout in zip(shapes, layouts, strict=True)
        ):
            found.append(joint)
    return tuple(found)


def _together(rule: ShardingRule, parts: tuple[Strategy, ...], sizes: tuple[int, ...]) -> bool:
    kernels = [part.kernel for part in parts if part.kernel is not None]
    if sum(not kernel.wraps for kernel in kernels) > 1:
        return False
    for (one, first), (two, second) in combinations(enumerate(parts), 2):
        tile = first.tile
        if tile is None or second.tile is None or tile.loop != second.tile.loop:
            continue
        if tile != second.tile or any(p.kernel and not p.kernel.wraps for p in (first, second)):
            return False
        if not is_possible(rule, tile, sizes[one] * sizes[two]):
            return False
    return True
