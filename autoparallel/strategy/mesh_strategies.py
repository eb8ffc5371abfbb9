"""The strategies of one op on the whole mesh: one strategy per axis, where they fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

from autoparallel.graph.graph import Dim, hint
from autoparallel.placement import Layout, Shard, divides_in_runs
from autoparallel.rules.loop_splits import is_possible
from autoparallel.rules.rule import ShardingRule
from autoparallel.rules.strategies import Strategy

__all__ = ["MeshStrategy", "is_nested", "joint_strategies"]


@dataclass(frozen=True, slots=True)
class MeshStrategy:
    """One strategy per mesh axis, and the layouts that follow from them.

    parts: per axis, outermost first. operands, results: per tensor, its placement on every axis.
    """

    parts: tuple[Strategy, ...]
    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]

    @staticmethod
    def of(parts: tuple[Strategy, ...]) -> MeshStrategy:
        """Return the joint strategy of one strategy per axis."""
        return MeshStrategy(
            parts,
            tuple(zip(*(part.operands for part in parts), strict=True)),
            tuple(zip(*(part.results for part in parts), strict=True)),
        )

    @property
    def kernels(self) -> tuple[str, ...]:
        """Per axis, the name of the kernel that the strategy needs, or ""."""
        return tuple(part.kernel.name if part.kernel else "" for part in self.parts)


def is_nested(shape: Sequence[Dim], layout: Layout, sizes: tuple[int, ...]) -> bool:
    """Say whether axes that split the same dim do it alike, so that inner parts are parts of parts.

    shape: of the whole tensor. sizes: of the mesh axes. The runs must divide evenly by all ranks,
    or an inner axis would cut runs and leave ranks with more work than their share; for a symbolic
    dim, at the size that is planned for.

    >>> layout = (Shard(0), Shard(0))
    >>> is_nested((8, 4), layout, sizes=(2, 2)), is_nested((6, 4), layout, sizes=(2, 2))
    (True, False)
    >>> is_nested((4, 4), (Shard(0),) * 3, sizes=(2, 2, 2))
    False
    """
    for dim, cuts in _shards_by_dim(layout).items():
        if len(cuts) == 1:
            continue
        shard = cuts[0][1]
        if shard.repeat != 1 or any(other != shard for _, other in cuts):
            return False
        # A run is the smallest piece of a block that is dealt out to ranks: `unit` elements
        # together. They are dealt to all axes at once: 4 runs divide by any two axes of 2 ranks,
        # and not by three.
        parts = math.prod(sizes[axis] for axis, _ in cuts)
        if not divides_in_runs(hint(shape[dim]), shard.blocks, shard.unit, parts):
            return False
    return True


def _shards_by_dim(layout: Layout) -> dict[int, list[tuple[int, Shard]]]:
    """Return the axes that split each dim, with the shards, outermost first."""
    shards: dict[int, list[tuple[int, Shard]]] = {}
    for axis, placement in enumerate(layout):
        if isinstance(placement, Shard):
            shards.setdefault(placement.dim, []).append((axis, placement))
    return shards


def joint_strategies(
    rule: ShardingRule,
    per_axis: Sequence[tuple[Strategy, ...]],
    shapes: Sequence[Sequence[Dim]],
    sizes: tuple[int, ...],
) -> tuple[MeshStrategy, ...]:
    """Return all joint strategies of one op, the plainest first.

    rule: of the op. per_axis: its strategies on each axis alone. shapes: of its operands and
    results. sizes: of the axes. A loop may be split on several axes in the same way. Of several
    kernels, all but one must run the op itself on their part, so that they can be put inside each
    other.
    """
    if len(per_axis) == 1:
        return tuple(MeshStrategy.of((part,)) for part in per_axis[0])
    joints = []
    for parts in product(*per_axis):
        if not _together(rule, parts, sizes):
            continue
        joint = MeshStrategy.of(parts)
        layouts = (*joint.operands, *joint.results)
        if all(
            is_nested(shape, layout, sizes) for shape, layout in zip(shapes, layouts, strict=True)
        ):
            joints.append(joint)
    return tuple(joints)


def _together(rule: ShardingRule, parts: tuple[Strategy, ...], sizes: tuple[int, ...]) -> bool:
    """Say whether loops and kernels let one strategy per axis run at the same time."""
    kernels = [part.kernel for part in parts if part.kernel is not None]
    # Two kernels that both replace the op cannot both run.
    if sum(not kernel.wraps for kernel in kernels) > 1:
        return False
    ranks: dict[str, int] = {}
    for first, second in combinations(parts, 2):
        tile = first.tile
        if tile is None or second.tile is None:
            continue
        loops, others = {tile.loop, tile.into} - {""}, {second.tile.loop, second.tile.into}
        if loops & others and any(at.into or at.repeat != 1 for at in (tile, second.tile)):
            return False
        if tile.loop != second.tile.loop:
            continue
        both = [part.kernel for part in (first, second) if part.kernel is not None]
        if tile != second.tile or any(not each.wraps or each.alone for each in both):
            return False
    for part, size in zip(parts, sizes, strict=True):
        if part.tile is not None:
            ranks[part.tile.loop] = ranks.get(part.tile.loop, 1) * size
    # Axes that split one loop split it into the product of their sizes.
    return all(
        is_possible(rule, part.tile, ranks[part.tile.loop])
        for part in parts
        if part.tile is not None
    )
