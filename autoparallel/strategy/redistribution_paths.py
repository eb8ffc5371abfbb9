"""The cheapest redistribution of a value: a sequence of steps, each on one mesh axis."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import chain, combinations, product

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
from autoparallel.strategy.mesh_strategies import is_nested

__all__ = ["RedistributionPaths"]

# A longer path must be cheaper by more than rounding.
_RELATIVE = 1e-9


class RedistributionPaths:
    """All cheapest paths between the layouts that a value may have.

    shape, nbytes: of the whole value. requires_grad: whether backward seconds count. universe: per
    axis, the placements that may occur, on the way too. sizes, links: of the axes. is_allowed: says
    whether a step may be taken. together: the gradient of a value that is whole on an axis is
    reduced in one bucket with others after the backward pass, so that the latency of this
    all-reduce is not counted; such steps come first on the path, and others like them, which come
    after a step of another kind, are in no bucket.
    cells: the number of each layout. moves: per axis, the seconds (forward and backward) of
    changing the placement there, array[*layout, placement]; forwards: the forward seconds alone.
    copies: of the forward and of the backward seconds, those in which memory alone is written.
    joined: per axis, the seconds of such a first step, as `moves`.
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
        together: bool = False,
    ) -> None:
        self.universe = universe
        self.cells: dict[Layout, int] = {
            layout: cell for cell, layout in enumerate(product(*universe))
        }
        self.layouts = tuple(self.cells)
        grid = tuple(map(len, universe))
        self.grid = grid
        shares = [
            np.array([placement_fraction(shape, placement, count) for placement in placements])
            for placements, count in zip(universe, sizes, strict=True)
        ]
        self.shares = np.ones(grid)
        for axis, share in enumerate(shares):
            self.shares = self.shares * share.reshape(_spread_along(axis, len(grid)))
        valid = np.array(
            [is_nested(shape, layout, sizes) for layout in self.layouts], dtype=bool
        ).reshape(grid)
        self.moves: list[NDArray[np.float64]] = []
        self.forwards: list[NDArray[np.float64]] = []
        self.joined: list[NDArray[np.float64]] = []
        self.copies: tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]] = ([], [])
        for axis, placements in enumerate(universe):
            seconds = np.full((*grid, len(placements)), np.inf)
            forward = np.zeros_like(seconds)
            copied = np.zeros_like(seconds), np.zeros_like(seconds)
            joined = np.full_like(seconds, np.inf)
            # A step on one axis moves the part of the value that the other axes leave to a rank.
            # Few different parts occur: each is priced once.
            others = self.shares / shares[axis].reshape(_spread_along(axis, len(grid)))
            for source, one in enumerate(placements):
                rows = (slice(None),) * axis + (source,)
                factors, place = np.unique(others[rows], return_inverse=True)
                place = place.reshape(others[rows].shape)
                for target, two in enumerate(placements):
                    if source == target:
                        continue
                    step = Step(axis, one, two)
                    if not is_allowed(step):
                        continue
                    moves = (step.forward, step.backward if requires_grad else Movement.NONE)
                    link, count = links[axis], sizes[axis]
                    ahead, back = (
                        [
                            movement_seconds(move, nbytes * float(factor), hardware, link, count)
                            for factor in factors
                        ]
                        for move in moves
                    )
                    if together and step.forward is Movement.NONE:
                        bucket = [
                            movement_seconds(
                                moves[1], nbytes * float(factor), hardware, link, count, True
                            )
                            for factor in factors
                        ]
                        joined[(*rows, ..., target)] = np.array(bucket)[place]
                    priced = np.add(ahead, back)
                    seconds[(*rows, ..., target)] = priced[place]
                    forward[(*rows, ..., target)] = np.array(ahead)[place]
                    for move, table, own in zip(moves, copied, (ahead, back), strict=True):
                        if move.collective is None and any(own):
                            table[(*rows, ..., target)] = np.array(own)[place]
            # On several axes some layouts are impossible, and some steps: they cost +inf.
            if len(grid) > 1:
                seconds[~_possible_steps(universe, axis)] = np.inf
                seconds[~valid] = np.inf
                for target in range(len(placements)):
                    there = valid[(slice(None),) * axis + (target,)]
                    seconds[..., target][~np.broadcast_to(np.expand_dims(there, axis), grid)] = (
                        np.inf
                    )
            self.moves.append(seconds)
            self.forwards.append(forward)
            self.joined.append(joined)
            for tables, table in zip(self.copies, copied, strict=True):
                tables.append(table)
        self.together = together
        # One step per axis suffices, but for one axis that must first be gathered and split anew.
        self.hops = 1 if len(grid) == 1 else len(grid) + 1
        self._levels: dict[tuple[Layout, ...], list[NDArray[np.float64]]] = {}
        self._seconds: dict[tuple[Layout, ...], NDArray[np.float64]] = {}
        self._carried: dict[tuple[Layout, ...], tuple[NDArray[np.float64], ...]] = {}
        self._steps: dict[tuple[Layout, Layout], tuple[Step, ...]] = {}

    def levels(self, targets: tuple[Layout, ...]) -> list[NDArray[np.float64]]:
        """Return, per number of steps, the least seconds from every layout to each target.

        Each array is [*grid, target], with one axis of the grid per mesh axis. This is
        Bellman-Ford's recursion; it ends where one more step does not help.
        """
        levels = self._levels.get(targets)
        if levels is None:
            start = np.full((len(self.layouts), len(targets)), np.inf)
            start[[self.cells[target] for target in targets], range(len(targets))] = 0.0
            levels = [start.reshape(*self.grid, len(targets))]
            for _ in range(self.hops):
                last = levels[-1]
                best = last
                for axis, seconds in enumerate(self.moves):
                    over = (seconds[..., None] + _after(last, axis)).min(axis=-2)
                    # Only a real gain may add a step: equal paths would otherwise differ in length
                    # by rounding.
                    best = np.where(over < best * (1 - _RELATIVE), over, best)
                if np.array_equal(best, last):
                    break
                levels.append(best)
            self._levels[targets] = levels
        return levels

    def seconds(self, targets: tuple[Layout, ...]) -> NDArray[np.float64]:
        """Return table[layout, target]: the least seconds, layouts in the order of `cells`."""
        if targets not in self._seconds:
            table = self.levels(targets)[-1].reshape(-1, len(targets))
            self._seconds[targets] = (
                self._led(table, targets, self.joined) if self.together else table
            )
        return self._seconds[targets]

    def forward_seconds(self, targets: tuple[Layout, ...]) -> NDArray[np.float64]:
        """Return table[layout, target]: forward seconds of the paths that `seconds` prices.

        They are needed by themselves where a redistribution is done again in the backward pass.
        """
        return self._along(targets)[0]

    def copied_seconds(
        self, targets: tuple[Layout, ...]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return two tables[layout, target]: of the forward and of the backward seconds of the
        paths, those in which nothing is sent, but memory is written.
        """
        _, ahead, back = self._along(targets)
        return ahead, back

    def sent_seconds(
        self, targets: tuple[Layout, ...]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return two tables[layout, target]: the forward and the backward seconds of the paths in
        which something is sent, 0 where there is none.
        """
        possible = np.isfinite(self.seconds(targets))
        every = self.forward_seconds(targets), self.backward_seconds(targets)
        ahead, back = (
            np.where(possible, np.maximum(np.where(possible, one, 0) - copied, 0), 0)
            for one, copied in zip(every, self.copied_seconds(targets), strict=True)
        )
        return ahead, back

    def _along(self, targets: tuple[Layout, ...]) -> tuple[NDArray[np.float64], ...]:
        """Return tables[layout, target] of the paths that `seconds` prices: their forward seconds,
        and the forward and the backward seconds in which memory alone is written.
        """
        if targets not in self._carried:
            parts = self.forwards, *self.copies
            levels = self.levels(targets)
            # Nothing adds up to nothing, on whatever path.
            some = [number for number, part in enumerate(parts) if any(map(np.any, part))]
            sums = [np.zeros_like(levels[0]) for _ in parts]
            for last in levels[:-1]:
                best, best_sums = last, list(sums)
                for axis, seconds in enumerate(self.moves):
                    over = seconds[..., None] + _after(last, axis)
                    # The placement that each cell goes to first, on its way to each target.
                    first = over.argmin(axis=-2)
                    over = np.take_along_axis(over, first[..., None, :], -2)[..., 0, :]
                    better = over < best * (1 - _RELATIVE)
                    best = np.where(better, over, best)
                    for number in some:
                        step = np.take_along_axis(parts[number][axis], first, -1)
                        rest = np.take_along_axis(sums[number], first, axis)
                        best_sums[number] = np.where(better, step + rest, best_sums[number])
                sums = best_sums
            tables = [table.reshape(-1, len(targets)) for table in sums]
            if self.together:
                tables = [
                    self._led(table, targets, part)
                    for table, part in zip(tables, parts, strict=True)
                ]
            self._carried[targets] = tuple(tables)
        return self._carried[targets]

    def backward_seconds(self, targets: tuple[Layout, ...]) -> NDArray[np.float64]:
        """Return table[layout, target]: backward seconds of the paths that `seconds` prices, 0
        where there is none.
        """
        every = self.seconds(targets)
        possible = np.isfinite(every)
        return np.where(possible, every - np.where(possible, self.forward_seconds(targets), 0), 0)

    def reduced_seconds(self, targets: tuple[Layout, ...]) -> NDArray[np.float64]:
        """Return table[layout, target]: the part of `seconds` in which gradients are reduced in a
        bucket with others.
        """
        none = np.zeros((len(self.layouts), len(targets)))
        return self._led(none, targets, self.joined) if self.together else none

    def _led(
        self,
        table: NDArray[np.float64],
        targets: tuple[Layout, ...],
        moves: list[NDArray[np.float64]],
    ) -> NDArray[np.float64]:
        """Return the table for paths whose I->R steps come first.

        They come first because their gradients are reduced in one bucket after the backward pass,
        where no other backward step may follow. table: seconds of the remaining path. moves:
        seconds of steps.
        """
        led_table = table.copy()
        cells = np.arange(len(self.layouts)).reshape(self.grid)
        one, two = Invariant(), Replicate()
        able = [
            axis
            for axis, placements in enumerate(self.universe)
            if one in placements and two in placements
        ]
        # The more axes, the later: each way begins with all such moves that it has.
        for axes in chain.from_iterable(
            combinations(able, count) for count in range(1, len(able) + 1)
        ):
            columns = [at for at, end in enumerate(targets) if all(end[a] == two for a in axes)]
            rows, after, first = cells, cells, np.zeros(self.grid)
            for axis in axes:
                start, end = (self.universe[axis].index(placement) for placement in (one, two))
                first = first + moves[axis][..., end]
                rows, after = rows.take([start], axis), after.take([end], axis)
            led = first.reshape(-1)[rows.reshape(-1), None] + table[after.reshape(-1)]
            led_table[np.ix_(rows.reshape(-1), np.array(columns, dtype=int))] = led[:, columns]
        return led_table

    def steps(self, source: Layout, target: Layout) -> tuple[Step, ...]:
        """Return the steps of the cheapest path. Raises ValueError where there is none.

        Ties go to the path of fewest steps, then to the first axis and placement.
        """
        if (source, target) not in self._steps:
            self._steps[source, target] = self._found_steps(source, target)
        return self._steps[source, target]

    def _found_steps(self, source: Layout, target: Layout) -> tuple[Step, ...]:
        """Return the steps as `steps` does, which keeps them."""
        lead: tuple[Step, ...] = ()
        if self.together:
            lead = tuple(
                Step(axis, one, two)
                for axis, (one, two) in enumerate(zip(source, target, strict=True))
                if (one, two) == (Invariant(), Replicate())
            )
            source = _summed(source, tuple(step.axis for step in lead))
        levels = self.levels((target,))
        cell = self.cells[source]
        final = levels[-1].reshape(-1)[cell]
        if not np.isfinite(final):
            raise ValueError(f"no way from {source} to {target}")
        # The fewest steps that reach the least seconds.
        hop = next(h for h, level in enumerate(levels) if level.reshape(-1)[cell] == final)
        steps: list[Step] = []
        layout = source
        while hop:
            place = np.unravel_index(self.cells[layout], self.grid)
            options: list[tuple[float, int, int, Placement, Layout]] = []
            for axis, placements in enumerate(self.universe):
                for index, placement in enumerate(placements):
                    step = self.moves[axis][(*place, index)]
                    if placement == layout[axis] or not np.isfinite(step):
                        continue
                    after = (*layout[:axis], placement, *layout[axis + 1 :])
                    rest = levels[hop - 1].reshape(-1)[self.cells[after]]
                    options.append((step + rest, len(options), axis, placement, after))
            _, _, axis, placement, after = min(options, key=lambda option: option[:2])
            steps.append(Step(axis, layout[axis], placement))
            layout = after
            hop = next(
                h
                for h, level in enumerate(levels[:hop])
                if level.reshape(-1)[self.cells[layout]]
                <= levels[hop - 1].reshape(-1)[self.cells[layout]]
            )
        return (*lead, *steps)


@lru_cache(maxsize=256)
def _possible_steps(universe: tuple[tuple[Placement, ...], ...], axis: int) -> NDArray[np.bool_]:
    """Return table[*layout, placement]: whether this placement may be the next one on the axis."""
    grid = tuple(map(len, universe))
    flat = [
        is_possible_step(layout, Step(axis, layout[axis], placement))
        for layout in product(*universe)
        for placement in universe[axis]
    ]
    table = np.array(flat, dtype=bool).reshape(*grid, grid[axis])
    table.flags.writeable = False
    return table


def _summed(layout: Layout, axes: tuple[int, ...]) -> Layout:
    """Return the layout with R on these axes."""
    return tuple(
        Replicate() if axis in axes else placement for axis, placement in enumerate(layout)
    )


def _after(table: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Return the table as seen after a step on one axis.

    [*grid, target] becomes [*grid without the axis, 1 in its place, placement, target].
    """
    return np.expand_dims(np.moveaxis(table, axis, -2), axis)


def _spread_along(axis: int, count: int) -> tuple[int, ...]:
    """Return the shape that broadcasts a vector along one axis of a grid."""
    return tuple(-1 if other == axis else 1 for other in range(count))
