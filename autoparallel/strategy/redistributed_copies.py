"""The bytes of redistributed copies: what is saved of them, or made again from what they come of.

Tables of seconds, of which these are made, are in redistribution.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.op_costs import nbytes
from autoparallel.graph.graph import Value
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.placement import Invariant, Layout, Replicate
from autoparallel.strategy.cost_tables import Table, sum_of_columns
from autoparallel.strategy.counted_moments import Left, Phase
from autoparallel.strategy.parameter_storage import ParameterStorage
from planners import Alternative

__all__ = [
    "ProducerLayouts",
    "RecomputedEnds",
    "copied_nbytes",
    "held_nbytes",
    "weighed_table",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ProducerLayouts:
    """The layout of a value in each state of the variable that produces it. Known by identity.

    layouts: one per state. stored: of a parameter, the states themselves. resident: the value is in
    memory anyway, as parameters and inputs are. counted: its memory as it is produced is counted
    elsewhere: the producer saves it, or it is a view.
    """

    layouts: tuple[Layout, ...]
    stored: tuple[ParameterStorage, ...] = ()
    resident: bool = False
    counted: bool = False


@dataclass(frozen=True, slots=True)
class RecomputedEnds:
    """The ends of a redistribution that are run again in the backward pass.

    maker: the producer is. readers: per reader, whether it is. apart: the producer belongs to
    another block than the readers, and may be recomputed there or not. alone: each of them is by
    itself, where its result is needed; so what the maker makes is saved for no reader. phase: of
    the block, at the moment at which bytes are counted.
    """

    maker: bool
    readers: tuple[bool, ...]
    apart: bool = False
    alone: bool = False
    phase: Phase = Phase.WAITING

    @property
    def moved_again(self) -> bool:
        """True where the redistribution is done once more in the backward pass."""
        return all(self.readers) or (self.maker and self.alone)


def weighed_table(
    value: Value,
    produced: ProducerLayouts,
    targets: tuple[Layout, ...],
    groups: tuple[tuple[Layout, ...], ...],
    saved: tuple[tuple[Layout, ...], ...],
    cost: Array,
    ahead: Array,
    mode: RecomputedEnds,
    left: Left,
    passed: bool,
    sizes: tuple[int, ...],
) -> Table:
    """Return the table with bytes of what is saved, or recomputed from its source.

    value, produced, groups, saved, mode, passed: as of `RedistributionTables.between`. targets: all
    layouts of all groups. cost: seconds of the table. ahead: forward seconds of each
    redistribution, table[state, target]. left: as of there; where only some are, the least that
    they may need counts. sizes: of the mesh axes. A recomputed block saves the values that enter
    it, as they were produced, and nothing else, until it is run again: then it has all that it
    saves.
    The alternative to saving a redistributed copy: save the value as it was produced and
    redistribute it once more in the backward pass.
    """
    shape, size = value.shape, nbytes(value)
    absent = mode.maker and mode.phase is not Phase.AGAIN
    # Bytes of the value as it was produced are 0 here if they are counted elsewhere.
    free_source = produced.resident or (produced.counted and not absent and not mode.apart)
    source = np.array(
        [
            0.0 if free_source else size * layout_fraction(shape, layout, sizes)
            for layout in produced.layouts
        ]
    )
    enters = any(mode.readers) and not mode.maker
    stays = enters and mode.phase is not Phase.OVER
    if mode.moved_again and mode.phase is not Phase.AGAIN:
        usage = np.broadcast_to(source[:, None] if stays else 0.0, cost.shape)
        return Table(cost, np.ascontiguousarray(usage))
    if not any(saved) and not enters:
        # At another moment, this may have bytes.
        return Table(cost, np.zeros_like(cost) if mode.moved_again else None)
    forms = [_storage(target) for target in targets]
    plain = [_storage(layout) for layout in produced.layouts]
    other = np.array([[form != produced_form for form in forms] for produced_form in plain])
    copies = copied_nbytes(size, shape, produced.layouts, targets, sizes)
    held = np.where(other, copies, source[:, None])
    distinct = tuple(
        tuple({_storage(layout): layout for layout in some}.values()) for some in saved
    )
    holds = held_nbytes(held, targets, distinct, left)
    # Views count what they are views of, and what they are converted to can be dropped there.
    elsewhere = holds if passed else np.zeros_like(holds)
    redistributed = sum_of_columns(other.astype(float), targets, distinct) > 0
    if stays:
        # Some readers are run again: what they take stays. That may be what others save.
        taken = held_nbytes(held, targets, groups, Left.SOME)
        holds = np.maximum(holds, np.minimum(taken, source[:, None]))
    if not redistributed.any() or mode.moved_again or passed:
        return Table(cost, holds - elsewhere)
    time = sum_of_columns(ahead * other, targets, distinct)
    repeat = np.where(redistributed & np.isfinite(cost), cost + time, np.inf)
    fewer = np.where(redistributed, np.broadcast_to(source[:, None], holds.shape), 0.0)
    if left is not Left.ALL and not stays:
        fewer = np.minimum(fewer, holds)
    return Table(cost, holds, (Alternative(repeat, fewer),))


def copied_nbytes(
    size: int,
    shape: Sequence[Any],
    layouts: Sequence[Layout],
    targets: Sequence[Layout],
    sizes: tuple[int, ...],
) -> Array:
    """Return table[state, target]: the bytes of a copy of a value, 0 where it is the value itself.

    size, shape: of the value. layouts: of the value, by state. sizes: of the mesh axes.
    """
    local = np.array([size * layout_fraction(shape, target, sizes) for target in targets])
    forms = [_storage(target) for target in targets]
    other = np.array([[form != _storage(layout) for form in forms] for layout in layouts])
    return np.where(other, local, 0.0)


def held_nbytes(
    held: Array,
    targets: tuple[Layout, ...],
    groups: tuple[tuple[Layout, ...], ...],
    left: Left,
) -> Array:
    """Return table[state, group]: the bytes of the copies of a group that are still needed.

    held: table[state, target]. groups: the copies that are saved. left: as of
    `RedistributionTables.between`.
    """
    if left is Left.ALL:
        return sum_of_columns(held, targets, groups)
    least = np.zeros((len(held), len(groups)))
    if left is Left.SOME:
        place = {target: index for index, target in enumerate(targets)}
        for number, group in enumerate(groups):
            if group:
                least[:, number] = held[:, [place[target] for target in group]].min(axis=1)
    return least


def _storage(layout: Layout) -> Layout:
    """Return the layout as memory has it: I and R are the same tensor on every rank."""
    return tuple(Invariant() if isinstance(p, Replicate) else p for p in layout)
