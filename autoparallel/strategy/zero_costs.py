"""What ZeRO adds: gradients reduced to a part, and parameters gathered after their update."""

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
from autoparallel.strategy.parameter_storage import ParameterStorage

__all__ = ["update_gather_seconds", "zero_gradient_seconds", "zero_gradient_table"]


def zero_gradient_table(
    value: Value,
    stored: Sequence[ParameterStorage],
    targets: Sequence[Layout],
    links: Sequence[Link],
    sizes: tuple[int, ...],
) -> NDArray[np.float64]:
    """The seconds of `zero_gradient_seconds` as table[stored, target], for all at once.

    Infinite where a target does not replicate an axis on which the state is split by itself.
    """
    table = np.zeros((len(stored), len(targets)))
    replicated = [np.array([t[axis] == Replicate() for t in targets]) for axis in range(len(sizes))]
    everywhere = (Replicate(),) * len(sizes)
    for index, choice in enumerate(stored):
        if choice.storage == choice.state:
            continue
        table[index] = zero_gradient_seconds(value, choice, everywhere, links, sizes)
        for axis, (own, state) in enumerate(zip(choice.storage, choice.state, strict=True)):
            if own != state:
                table[index, ~replicated[axis]] = np.inf
    return table


def zero_gradient_seconds(
    value: Value,
    stored: ParameterStorage,
    target: Layout,
    links: Sequence[Link],
    sizes: tuple[int, ...],
) -> float:
    """Seconds ZeRO adds: a reduce-scatter in place of the all-reduce that is already counted.

    Usually negative. value: the parameter. target: the layout in which an op reads it. links,
    sizes: of the mesh axes. Infinite where the op does not read it replicated.
    """
    seconds = 0.0
    for axis, (own, state) in enumerate(zip(stored.storage, stored.state, strict=True)):
        if own == state:
            continue
        if target[axis] != Replicate():
            return np.inf
        others = (*stored.storage[:axis], Invariant(), *stored.storage[axis + 1 :])
        whole = nbytes(value) * layout_fraction(value.shape, others, sizes)
        seconds -= together_seconds(Collective.ALL_REDUCE, whole, links[axis], sizes[axis])
        scatter = together_seconds if stored.gradient == stored.storage else collective_seconds
        size = _bytes_across(value, stored, axis, sizes)
        seconds += scatter(Collective.REDUCE_SCATTER, size, links[axis], sizes[axis])
    return seconds


def update_gather_seconds(
    value: Value, stored: ParameterStorage, links: Sequence[Link], sizes: tuple[int, ...]
) -> float:
    """Seconds of gathering a parameter whose parts the optimizer has updated."""
    return sum(
        collective_seconds(
            Collective.ALL_GATHER,
            _bytes_across(value, stored, axis, sizes),
            links[axis],
            sizes[axis],
        )
        for axis, (own, state) in enumerate(zip(stored.storage, stored.state, strict=True))
        if own != state
    )


def _bytes_across(
    value: Value, stored: ParameterStorage, axis: int, sizes: tuple[int, ...]
) -> float:
    """Bytes that a rank has of a parameter where `axis` does not split it.

    A gradient is reduced from the outermost axis inwards, and an updated parameter is gathered from
    the innermost outwards.
    """
    others = (*stored.state[:axis], Invariant(), *stored.storage[axis + 1 :])
    return nbytes(value) * layout_fraction(value.shape, others, sizes)
