"""The layouts in which a split graph may return its values, as states of a cost network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from autoparallel.placement import Invariant, Layout, Partial, Placement, Replicate, Shard
from autoparallel.strategy.candidate_splits import CandidateSplits
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.equal_axes import AxisGroups, arranged_layout
from autoparallel.strategy.mesh_strategies import is_nested

__all__ = ["add_outputs"]


def add_outputs(
    network: CostNetwork,
    axis_splits: Sequence[CandidateSplits],
    axes_in_time: tuple[bool, ...],
    equal: AxisGroups,
    groups: AxisGroups,
) -> None:
    """Add the layouts in which a value may be returned: whole; beside a loss, also split.

    A caller that takes a loss trains; one that takes no loss reads the outputs, which must then be
    whole. Only plain shards are returned (no blocks), as a caller would expect them.

    axis_splits, axes_in_time: per mesh axis, the candidate splits, and whether micro-batches are
    its ranks. equal: axes by which layouts are the same but for their order. groups: axes whose
    order is left open.
    """
    sizes = tuple(size for _, size in network.mesh.axes)
    values = [network.graph.values[name] for name in network.graph.outputs]
    has_loss = any(not value.shape and value.requires_grad for value in values)
    for value in values:
        free = bool(has_loss and value.shape and not network.whole_outputs)
        plain: list[tuple[Placement, ...]] = []
        for size, splits, in_time in zip(sizes, axis_splits, axes_in_time, strict=True):
            shards = tuple(
                shard
                for shard in (splits.shards[value.name] if size > 1 else ())
                if shard.blocks == shard.unit == shard.repeat == 1
            )
            # Who runs the micro-batches puts together what they return, however it lies.
            if in_time:
                same = Replicate() if value.requires_grad else Invariant()
                plain.append((same, *shards, Partial()))
            else:
                plain.append((Invariant(), *(shards if free else ())))
        layouts = tuple(
            layout
            for layout in product(*plain)
            if is_nested(value.shape, layout, sizes) and not _is_mixed(layout, axes_in_time)
        )
        if groups:
            layouts = tuple(dict.fromkeys(arranged_layout(layout, groups) for layout in layouts))
        elif network.only is not None:
            wanted = network.only[f"return:{value.name}"]
            layouts = tuple(
                layout for layout in layouts if arranged_layout(layout, equal) in wanted
            )
        network.outputs[value.name] = layouts


def _is_mixed(layout: Layout, axes_in_time: tuple[bool, ...]) -> bool:
    """Return whether ranks hold a part of every micro-batch along the dim of the batch: put
    together, these are no part that a caller would expect.
    """
    cuts = {
        placement.dim
        for placement, in_time in zip(layout, axes_in_time, strict=True)
        if in_time and isinstance(placement, Shard)
    }
    return any(
        isinstance(placement, Shard) and placement.dim in cuts and not in_time
        for placement, in_time in zip(layout, axes_in_time, strict=True)
    )
