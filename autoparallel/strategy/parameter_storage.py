"""How a parameter may be stored between steps, with its gradient and the optimizer's state."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice, product

from autoparallel.cost.op_costs import nbytes
from autoparallel.cost.optimizer_state import state_bytes_per_element
from autoparallel.graph.graph import Value, hint
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.placement import Invariant, Layout, Placement, Shard
from autoparallel.strategy.mesh_strategies import is_nested

__all__ = ["ParameterStorage", "storage_choices", "stored_bytes"]


@dataclass(frozen=True, slots=True)
class ParameterStorage:
    """storage: what is there between steps. gradient: how the finished gradient is held.
    state: what the optimizer updates. On every axis all are Invariant or the same Shard."""

    storage: Layout
    gradient: Layout
    state: Layout

    @staticmethod
    def as_used(layout: Layout) -> ParameterStorage:
        """Parameter, gradient and state lie alike."""
        return ParameterStorage(layout, layout, layout)


def storage_choices(
    value: Value,
    shards: Sequence[Sequence[Shard]],
    sizes: tuple[int, ...],
    spread_state: bool,
    scattered_gradients: bool,
) -> tuple[ParameterStorage, ...]:
    """All ways to store one parameter, the plainest first.

    shards: per mesh axis, the splits that some op could use. spread_state: whether the optimizer's
    state may be split where the parameter is whole (on one dim that divides evenly).
    scattered_gradients: whether its gradient may be too, and a parameter that no op can use split.
    """
    invariant = Invariant()
    per_axis: list[tuple[Placement, ...]] = [(invariant, *own) for own in shards]
    if scattered_gradients and value.requires_grad:
        # What no op uses in parts may be stored in parts all the same.
        for axis, own in enumerate(shards):
            if not own and sizes[axis] > 1:
                per_axis[axis] += _even(value, sizes[axis])
    found: dict[ParameterStorage, None] = {}
    layouts = [layout for layout in product(*per_axis) if is_nested(value.shape, layout, sizes)]
    for layout in layouts:
        found[ParameterStorage.as_used(layout)] = None
    if spread_state and value.requires_grad:
        for layout in layouts:
            for state in _spread(value, layout, sizes):
                found[ParameterStorage(layout, layout, state)] = None
                if scattered_gradients:
                    found[ParameterStorage(layout, state, state)] = None
    return tuple(found)


def _spread(value: Value, layout: Layout, sizes: tuple[int, ...]) -> list[Layout]:
    """The layout with one or more whole axes split along the first dim that divides evenly."""
    options: list[tuple[Placement, ...]] = []
    for axis, placement in enumerate(layout):
        choices = [placement]
        if isinstance(placement, Invariant) and sizes[axis] > 1:
            taken = {p.dim for p in layout if isinstance(p, Shard)}
            choices += _even(value, sizes[axis], taken)
        options.append(tuple(choices))
    return [
        state
        for state in product(*options)
        if state != layout and is_nested(value.shape, state, sizes)
    ]


def _even(value: Value, ranks: int, taken: Collection[int] = ()) -> tuple[Shard, ...]:
    """The first dim that divides evenly, but for those that are taken."""
    able = (
        Shard(dim)
        for dim, size in enumerate(value.shape)
        if dim not in taken and hint(size) % ranks == 0
    )
    return tuple(islice(able, 1))


def stored_bytes(
    value: Value, stored: ParameterStorage, sizes: tuple[int, ...], optimizer: str
) -> tuple[float, float, float]:
    """Bytes per rank of the parameter, of its gradient and of the optimizer's state.

    Where the state is split and the parameter is not, the part that the optimizer updates is a copy
    of its own, unless it is the master copy that the state counts.
    """
    whole = nbytes(value)
    share = layout_fraction(value.shape, stored.state, sizes)
    parameter = whole * layout_fraction(value.shape, stored.storage, sizes)
    itemsize = value.dtype.itemsize
    per_element, has_master = state_bytes_per_element(optimizer, itemsize)
    if stored.state != stored.storage and not has_master:
        parameter += whole * share
    if not value.requires_grad:
        return parameter, 0.0, 0.0
    gradient = whole * layout_fraction(value.shape, stored.gradient, sizes)
    return parameter, gradient, share * whole / itemsize * per_element
