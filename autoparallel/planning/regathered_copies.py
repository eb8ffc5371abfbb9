"""Copies that are gathered for an op: those that it need not keep for its backward pass.

A value of which each rank has a part is kept as that part, and gathered once more when the backward
pass needs the whole (arXiv:2205.05198, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from autoparallel.cost.saved_tensors import SavedTensors
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.placement import Layout
from autoparallel.plan import OpChoice
from autoparallel.strategy.cost_network import CostNetwork

__all__ = ["copies_to_regather"]


def copies_to_regather(
    network: CostNetwork, ops: Sequence[OpChoice], made: Mapping[str, Layout], able: Collection[str]
) -> frozenset[tuple[str, Layout]]:
    """Return the copies, (value, layout), that are larger than what they are gathered from, that
    the backward passes of some of these ops need, and that are read by these alone.

    ops: of the plan. made: the layout in which each value is produced. able: names of the ops that
    can do without. Copies of parameters are none of these: they are gathered by rules of their own.

    Example: `copies_to_regather(network, plan.ops, made, {"mm_3"})`
    """
    graph = network.graph
    sizes = tuple(size for _, size in network.mesh.axes)
    readers: dict[tuple[str, Layout], list[OpChoice]] = {}
    for op in ops:
        for read in zip(op.reads, op.operands, strict=True):
            readers.setdefault(read, []).append(op)
    assert network.recomputation is not None
    saved: SavedTensors | None = None
    found = set()
    for (name, layout), reading in readers.items():
        if layout == made[name] or name in network.weights or name in graph.outputs:
            continue
        shape = graph.values[name].shape
        if layout_fraction(shape, layout, sizes) <= layout_fraction(shape, made[name], sizes):
            continue
        if graph.values[name].requires_grad and all(op.name in able for op in reading):
            saved = saved or network.recomputation.saving()
            if _is_saved(saved, readers, name, layout):
                found.add((name, layout))
    return frozenset(found)


def _is_saved(
    saved: SavedTensors,
    readers: Mapping[tuple[str, Layout], Sequence[OpChoice]],
    name: str,
    layout: Layout,
) -> bool:
    """Return whether the backward pass needs a copy, or a view of it."""
    for op in readers.get((name, layout), ()):
        kept = saved.of(op.name)
        for place, operand in enumerate(op.reads):
            if operand != name or op.operands[place] != layout:
                continue
            if kept.operands[place]:
                return True
            views = zip(op.makes, op.results, kept.aliases, strict=True)
            if any(
                alias == place and _is_saved(saved, readers, view, lies)
                for view, lies, alias in views
            ):
                return True
    return False
