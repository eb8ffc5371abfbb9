"""The cheapest redistributions between layouts in whatever order equal axes have their placements.

Layouts that differ in the order alone are one: a path between two of them is a path between any two
that are so arranged, so that nothing is lost of what the order may save.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.collective_times import movement_seconds
from autoparallel.cost.hardware import Hardware, Link
from autoparallel.graph.graph import Dim
from autoparallel.graph.part_sizes import placement_fraction
from autoparallel.placement import (
    Invariant,
    Layout,
    Movement,
    Placement,
    Replicate,
    Step,
    is_possible_step,
)
from autoparallel.strategy.equal_axes import AxisGroups, arranged_layout
from autoparallel.strategy.mesh_strategies import is_nested

__all__ = ["ArrangedPaths"]

Array = NDArray[np.float64]

_I, _R = Invariant(), Replicate()
# The columns of prices that are added up: forward and backward seconds in which something is sent,
# and such in which memory alone is written.
_COLUMNS = {
    "both": [0, 1, 2, 3],
    "forward": [0, 2],
    "backward": [1, 3],
    "sent forward": [0],
    "sent backward": [1],
    "copied forward": [2],
    "copied backward": [3],
}
_Prices = tuple[float, float, float, float]


class ArrangedPaths:
    """Bounds on all paths between the layouts that a value may have, up to the order of equal axes.

    Arguments as of `RedistributionPaths`, which has the prices of the layouts themselves; groups:
    of the axes. Each bound, of both passes, of one, and of the other, is the best of all paths by
    itself.
    cells: the number of each arranged layout.
    """

    def __init__(
        self,
        shape: tuple[Dim, ...],
        nbytes: int,
        requires_grad: bool,
        universe: tuple[tuple[Placement, ...], ...],
        sizes: tuple[int, ...],
        links: tuple[Link, ...],
        hardware: Hardware,
        is_allowed: Callable[[Step], bool],
        together: bool,
        groups: AxisGroups,
    ) -> None:
        layouts = [
            layout
            for layout in dict.fromkeys(arranged_layout(one, groups) for one in product(*universe))
            if is_nested(shape, layout, sizes)
        ]
        self.cells: dict[Layout, int] = {layout: cell for cell, layout in enumerate(layouts)}
        shares = {
            (axis, placement): placement_fraction(shape, placement, size)
            for axis, (size, placements) in enumerate(zip(sizes, universe, strict=True))
            for placement in placements
        }

        def beside(layout: Layout, axis: int) -> float:
            """Return the share of the value that the other axes leave to a rank."""
            others = enumerate(layout)
            share = math.prod(shares[other, at] for other, at in others if other != axis)
            # Orders of multiplying differ by rounding.
            return round(share, 12)

        prices: dict[tuple[int, Placement, Placement, float, bool], _Prices | None] = {}

        def priced(
            axis: int, one: Placement, two: Placement, share: float, once: bool = False
        ) -> _Prices | None:
            """Return the columns of a step; None where it is not allowed.

            once: what it does to the gradient is done in a bucket with others.
            """
            step = Step(axis, one, two)
            key = axis, one, two, share, once
            if key not in prices:
                prices[key] = None
                if is_allowed(step):
                    moves = (step.forward, step.backward if requires_grad else Movement.NONE)
                    ahead, back = (
                        movement_seconds(
                            move, nbytes * share, hardware, links[axis], sizes[axis], once
                        )
                        for move in moves
                    )
                    sent, sent_back = (move.collective is not None for move in moves)
                    prices[key] = (
                        ahead if sent else 0.0,
                        back if sent_back else 0.0,
                        0.0 if sent else ahead,
                        0.0 if sent_back else back,
                    )
            return prices[key]

        starts, ends, both = [], [], []
        for cell, layout in enumerate(layouts):
            for group in groups:
                # Of axes of a group that have the same placement, one stands for all.
                for axis in {layout[axis]: axis for axis in group}.values():
                    share = beside(layout, axis)
                    for target in universe[axis]:
                        if target == layout[axis]:
                            continue
                        end = self.cells.get(
                            arranged_layout((*layout[:axis], target, *layout[axis + 1 :]), groups)
                        )
                        if end is None or not _is_possible(layout, axis, target, max(group)):
                            continue
                        seconds = priced(axis, layout[axis], target, share)
                        if seconds is not None:
                            starts.append(cell)
                            ends.append(end)
                            both.append(seconds)
        # Where a gradient is reduced in a bucket with others, I->R comes first on the path, on the
        # axes that have I at the start and R at the end, and is cheaper than elsewhere.
        self._leads: list[tuple[tuple[int, ...], Array, NDArray[np.intp], Array]] = []
        for group in groups if together else ():
            count = np.array([sum(layout[a] == _I for a in group) for layout in layouts])
            after, price = np.arange(len(layouts)), np.zeros((len(layouts), 4))
            for cell, layout in enumerate(layouts):
                if not count[cell]:
                    continue
                axis = next(axis for axis in group if layout[axis] == _I)
                led = arranged_layout((*layout[:axis], _R, *layout[axis + 1 :]), groups)
                known = priced(axis, _I, _R, beside(layout, axis), once=True)
                price[cell] = np.inf if led not in self.cells or known is None else known
                after[cell] = self.cells.get(led, cell)
            self._leads.append((group, count, after, price))
        order = np.argsort(np.array(starts, dtype=int), kind="stable")
        self._starts = np.array(starts, dtype=int)[order]
        self._ends = np.array(ends, dtype=int)[order]
        self._both = np.array(both).reshape(-1, 4)[order]
        self.hops = len(sizes) + 1
        self._known: dict[tuple[tuple[Layout, ...], str], Array] = {}

    def _least(self, targets: tuple[Layout, ...], what: str) -> Array:
        """Return table[layout, target]: the least seconds of all paths, of what is told."""
        key = targets, what
        if key not in self._known:
            table = np.full((len(self.cells), len(targets)), np.inf)
            table[[self.cells[target] for target in targets], range(len(targets))] = 0.0
            if len(self._starts):
                seconds = self._both[:, _COLUMNS[what]].sum(axis=1)
                first = np.flatnonzero(np.diff(self._starts, prepend=-1))
                cells = self._starts[first]
                for _ in range(self.hops):
                    over = seconds[:, None] + table[self._ends]
                    least = np.minimum.reduceat(over, first, axis=0)
                    better = np.minimum(table[cells], least)
                    if np.array_equal(better, table[cells]):
                        break
                    table[cells] = better
            for group, count, after, price in self._leads:
                table = self._led(table, targets, group, count, after, price[:, _COLUMNS[what]])
            self._known[key] = table
        return self._known[key]

    def _led(
        self,
        table: Array,
        targets: tuple[Layout, ...],
        group: tuple[int, ...],
        count: Array,
        after: NDArray[np.intp],
        price: Array,
    ) -> Array:
        """Return the table for paths that begin with I->R on some axes of a group: on those that
        have I at the start and R at the end, which are as many at least as must be, in any order,
        and as many at most as may be.

        count: of I in the group, per layout. after: the number of the layout after one such step.
        price: of it, in one pass or both.
        """
        ends = np.array([sum(target[axis] == _R for axis in group) for target in targets])
        fewest = np.maximum(count[:, None] + ends[None] - len(group), 0)
        most = np.minimum(count[:, None], ends[None])
        columns = np.arange(len(targets))[None]
        rows = np.broadcast_to(np.arange(len(self.cells))[:, None], table.shape)
        total, least = np.zeros_like(table), np.full_like(table, np.inf)
        step = price.sum(axis=1)
        for number in range(int(most.max(initial=0)) + 1):
            able = (fewest <= number) & (number <= most)
            least = np.where(able, np.minimum(least, total + table[rows, columns]), least)
            total = total + step[rows]
            rows = after[rows]
        return least

    def seconds(self, targets: tuple[Layout, ...]) -> Array:
        """Return table[layout, target]: the least seconds of both passes."""
        return self._least(targets, "both")

    def forward_seconds(self, targets: tuple[Layout, ...]) -> Array:
        """Return table[layout, target]: the least forward seconds of any path, 0 where none is."""
        return _finite(self._least(targets, "forward"))

    def backward_seconds(self, targets: tuple[Layout, ...]) -> Array:
        """Return table[layout, target]: the least backward seconds of any path, 0 where none is."""
        return _finite(self._least(targets, "backward"))

    def sent_seconds(self, targets: tuple[Layout, ...]) -> tuple[Array, Array]:
        """Return two tables[layout, target]: the least forward and backward seconds of any path in
        which something is sent.
        """
        ahead, back = (self._least(targets, f"sent {one}") for one in ("forward", "backward"))
        return _finite(ahead), _finite(back)

    def copied_seconds(self, targets: tuple[Layout, ...]) -> tuple[Array, Array]:
        """Return two tables[layout, target]: the least forward and backward seconds of any path in
        which nothing is sent, but memory is written.
        """
        ahead, back = (self._least(targets, f"copied {one}") for one in ("forward", "backward"))
        return _finite(ahead), _finite(back)

    def reduced_seconds(self, targets: tuple[Layout, ...]) -> Array:
        """Return table[layout, target]: nothing is known of the part that is reduced."""
        return np.zeros((len(self.cells), len(targets)))

    def steps(self, source: Layout, target: Layout) -> tuple[Step, ...]:
        """Raise: paths of arranged layouts are bounds, and nothing that a program runs."""
        raise NotImplementedError(f"a path from {source} to {target} in whatever order")


def _is_possible(layout: Layout, axis: int, target: Placement, last: int) -> bool:
    """Return whether some order of a group's axes lets a step on one of them move whole pieces.

    last: the innermost axis of the group: on it, only what is further inside may cut the dim.
    """
    inner = (*layout[:last], layout[axis], *layout[last + 1 :])
    return is_possible_step(inner, Step(last, layout[axis], target))


def _finite(table: Array) -> Array:
    """Return the table with 0 where it is infinite."""
    return np.where(np.isfinite(table), table, 0.0)
