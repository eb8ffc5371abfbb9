"""Seconds that ZeRO adds: gradients reduced to a part, and parameters gathered after the update.

ZeRO (arXiv:1910.02054) splits optimizer states, gradients and parameters over data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.collective_times import collective_seconds, together_seconds
from autoparallel.cost.links import Link
from autoparallel.cost.op_costs import nbytes
from autoparallel.graph.graph import Value
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.placement import Collective, Invariant, Layout, Replicate
from autoparallel.plan.kept_layouts import kept_layout
from autoparallel.strategy.equal_axes import AxisGroups
from autoparallel.strategy.parameter_storage import ParameterStorage, fixed_shape

__all__ = [
    "exchange_seconds",
    "update_gather_seconds",
    "zero_gradient_seconds",
    "zero_gradient_table",
]


def zero_gradient_table(
    value: Value,
    stored: Sequence[ParameterStorage],
    targets: Sequence[Layout],
    links: Sequence[Link],
    sizes: tuple[int, ...],
    groups: AxisGroups = (),
) -> NDArray[np.float64]:
    """Return the seconds of `zero_gradient_seconds` as table[stored, target].

    value: the parameter. stored: the ways to store it. targets: layouts in which ops read it.
    links, sizes: of the mesh axes. Infinite where a target does not replicate an axis on which the
    optimizer's state is split and the parameter is not. groups: of axes whose order is left open,
    none by default.
    """
    table = np.zeros((len(stored), len(targets)))
    groups = groups or tuple((axis,) for axis in range(len(sizes)))
    replicated = [
        np.array([sum(target[axis] == Replicate() for axis in group) for target in targets])
        for group in groups
    ]
    everywhere = (Replicate(),) * len(sizes)
    for index, choice in enumerate(stored):
        # Without ZeRO, the gradient's reduction is priced on the path from storage to target.
        if choice.storage == choice.state:
            continue
        table[index] = zero_gradient_seconds(value, choice, everywhere, links, sizes)
        for group, counts in zip(groups, replicated, strict=True):
            spread = sum(choice.storage[axis] != choice.state[axis] for axis in group)
            table[index, counts < spread] = np.inf
    return table


def zero_gradient_seconds(
    value: Value,
    stored: ParameterStorage,
    target: Layout,
    links: Sequence[Link],
    sizes: tuple[int, ...],
) -> float:
    """Return the seconds that ZeRO adds: a reduce-scatter in place of an all-reduce that is counted
    already.

    Usually negative, because a reduce-scatter takes half the time of an all-reduce. value: the
    parameter. stored: how it is stored. target: the layout in which an op reads it. links, sizes:
    of the mesh axes. Infinite where the op does not read it replicated: only a gradient that is a
    sum over the ranks can be reduced to parts.
    """
    seconds = 0.0
    for axis, (placement, state) in enumerate(zip(stored.storage, stored.state, strict=True)):
        if placement == state:
            continue
        if target[axis] != Replicate():
            return np.inf
        others = (*stored.storage[:axis], Invariant(), *stored.storage[axis + 1 :])
        unsharded_nbytes = nbytes(value) * layout_fraction(value.shape, others, sizes)
        # The path counts an all-reduce for I->R in the backward pass; ZeRO does not do it.
        seconds -= together_seconds(
            Collective.ALL_REDUCE, unsharded_nbytes, links[axis], sizes[axis]
        )
        # A gradient that is reduced into the bucket of the others pays no latency of its own; one
        # that is held in parts is reduced as soon as it is there.
        scatter = together_seconds if stored.gradient == stored.storage else collective_seconds
        size = _bytes_across(value, stored, axis, sizes)
        seconds += scatter(Collective.REDUCE_SCATTER, size, links[axis], sizes[axis])
    return seconds


def update_gather_seconds(
    value: Value, stored: ParameterStorage, links: Sequence[Link], sizes: tuple[int, ...]
) -> float:
    """Return the seconds of gathering a parameter whose parts the optimizer has updated.

    value: the parameter. stored: how it is stored; 0 where the optimizer updates it as it is
    stored. links, sizes: of the mesh axes.
    """
    return sum(
        collective_seconds(
            Collective.ALL_GATHER,
            _bytes_across(value, stored, axis, sizes),
            links[axis],
            sizes[axis],
        )
        for axis, (placement, state) in enumerate(zip(stored.storage, stored.state, strict=True))
        if placement != state
    )


def exchange_seconds(
    value: Value, stored: ParameterStorage, links: Sequence[Link], sizes: tuple[int, ...]
) -> float:
    """Return the seconds of exchanging the parts that the optimizer updates for those that compute,
    and their gradients for those of the former; 0 where both are the same parts.

    value: the parameter. stored: how it is stored. links, sizes: of the mesh axes. Many parameters
    are exchanged together.
    """
    kept = kept_layout(stored.state, fixed_shape(value), sizes)
    seconds = 0.0
    for axis, (late, early) in enumerate(zip(kept, stored.state, strict=True)):
        if late != early:
            others = (*stored.state[:axis], Invariant(), *stored.state[axis + 1 :])
            size = nbytes(value) * layout_fraction(value.shape, others, sizes)
            once = together_seconds(Collective.ALL_TO_ALL, size, links[axis], sizes[axis])
            seconds += 2 * once
    return seconds


def _bytes_across(
    value: Value, stored: ParameterStorage, axis: int, sizes: tuple[int, ...]
) -> float:
    """Return the bytes per rank of a parameter where `axis` does not split it.

    A gradient is reduced from the outermost axis inwards, and an updated parameter is gathered from
    the innermost outwards: outer axes are split as the state is, inner ones as the parameter is.
    """
    others = (*stored.state[:axis], Invariant(), *stored.storage[axis + 1 :])
    return nbytes(value) * layout_fraction(value.shape, others, sizes)
