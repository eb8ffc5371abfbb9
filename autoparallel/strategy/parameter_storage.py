"""The ways to store a parameter between steps, with its gradient and the optimizer's state."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice, product

from autoparallel.cost.op_costs import nbytes
from autoparallel.cost.optimizer_state import state_bytes_per_element
from autoparallel.graph.graph import Value, hint
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.placement import Invariant, Layout, Placement, Shard
from autoparallel.plan.kept_layouts import kept_layout
from autoparallel.strategy.mesh_strategies import is_nested

__all__ = ["ParameterStorage", "storage_choices", "stored_bytes"]


@dataclass(frozen=True, slots=True)
class ParameterStorage:
    """Layout of the parameter, and of what goes with it, between optimizer steps.

    storage: of the parameter (ZeRO-3 shards it). gradient: of the finished gradient (ZeRO-2 shards
    it). state: of the optimizer's state, and so of the part that a rank updates (ZeRO-1 shards it).
    On every axis all are Invariant or the same Shard.
    """

    storage: Layout
    gradient: Layout
    state: Layout

    @staticmethod
    def as_used(layout: Layout) -> ParameterStorage:
        """Return the storage in which parameter, gradient and state lie alike."""
        return ParameterStorage(layout, layout, layout)


def storage_choices(
    value: Value,
    shards: Sequence[Sequence[Shard]],
    sizes: tuple[int, ...],
    spread_state: bool,
    scattered_gradients: bool,
) -> tuple[ParameterStorage, ...]:
    """Return all ways to store one parameter, the plainest first.

    value: the parameter. shards: per mesh axis, the splits that some op could use. sizes: of the
    axes. spread_state: whether the optimizer's state may be split where the parameter is whole (on
    one dim that divides evenly). scattered_gradients: whether its gradient may be too, and a
    parameter that no op can use split.
    """
    invariant = Invariant()
    per_axis: list[tuple[Placement, ...]] = [(invariant, *axis_shards) for axis_shards in shards]
    if scattered_gradients and value.requires_grad:
        # What no op uses in parts may be stored in parts all the same.
        for axis, axis_shards in enumerate(shards):
            if not axis_shards and sizes[axis] > 1:
                per_axis[axis] += _even(value, sizes[axis])
    choices: dict[ParameterStorage, None] = {}
    # A dict instead of a set: the order decides ties, and must be the same in every run.
    layouts = [layout for layout in product(*per_axis) if is_nested(value.shape, layout, sizes)]
    for layout in layouts:
        choices[ParameterStorage.as_used(layout)] = None
    if spread_state and value.requires_grad:
        for layout in layouts:
            for state in _spread(value, layout, sizes):
                choices[ParameterStorage(layout, layout, state)] = None
                if scattered_gradients:
                    choices[ParameterStorage(layout, state, state)] = None
    return tuple(choices)


def _spread(value: Value, layout: Layout, sizes: tuple[int, ...]) -> list[Layout]:
    """Return the layout with one or more whole axes split along a dim that divides evenly.

    Each such axis takes the first dim that no other axis splits.
    """
    options: list[tuple[Placement, ...]] = []
    for axis, placement in enumerate(layout):
        choices = [placement]
        if isinstance(placement, Invariant) and sizes[axis] > 1:
            taken_dims = {p.dim for p in layout if isinstance(p, Shard)}
            choices += _even(value, sizes[axis], taken_dims)
        options.append(tuple(choices))
    return [
        state
        for state in product(*options)
        if state != layout and is_nested(value.shape, state, sizes)
    ]


def _even(value: Value, ranks: int, taken_dims: Collection[int] = ()) -> tuple[Shard, ...]:
    """Return a shard of the first dim that divides evenly and is not taken, or none."""
    able = (
        Shard(dim)
        for dim, size in enumerate(value.shape)
        if dim not in taken_dims and hint(size) and hint(size) % ranks == 0
    )
    return tuple(islice(able, 1))


def fixed_shape(value: Value) -> tuple[int, ...]:
    """Return the shape of a parameter, whose sizes no input decides."""
    return tuple(hint(size) for size in value.shape)


def stored_bytes(
    value: Value, stored: ParameterStorage, sizes: tuple[int, ...], optimizer: str
) -> tuple[float, float, float]:
    """Return the bytes per rank of the parameter, of its gradient and of the optimizer's state.

    value: the parameter. stored: how it is stored. sizes: of the mesh axes. optimizer: its name, as
    of `state_bytes_per_element`.
    Where the state is split and the parameter is not, the part that the optimizer updates is a copy
    of its own, unless it is the master copy that the state counts; so it is, always, where the
    optimizer cannot be told of the parts that compute.
    """
    whole = nbytes(value)
    share = layout_fraction(value.shape, stored.state, sizes)
    parameter = whole * layout_fraction(value.shape, stored.storage, sizes)
    itemsize = value.dtype.itemsize
    per_element, has_master = state_bytes_per_element(optimizer, itemsize)
    kept = kept_layout(stored.state, fixed_shape(value), sizes)
    if (stored.state != stored.storage and not has_master) or kept != stored.state:
        parameter += whole * share
    if not value.requires_grad:
        return parameter, 0.0, 0.0
    gradient = whole * layout_fraction(value.shape, stored.gradient, sizes)
    # The optimizer's state is counted per element, because it may be of another dtype.
    return parameter, gradient, share * whole / itemsize * per_element
