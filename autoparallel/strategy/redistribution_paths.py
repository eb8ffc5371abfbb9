"""How a value gets from one layout to another: the cheapest sequence of moves on single axes."""

from __future__ import annotations

from collections.abc import Callable
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

# A longer way must be cheaper by more than rounding.
_RELATIVE = 1e-9


class RedistributionPaths:
    """All cheapest ways between the layouts that a value may have.

    shape, nbytes: of the whole value. universe: per axis, the placements that may occur, on the
    way too. sizes, links: of the axes. is_allowed: whether a step may be made. together: on axes
    where a whole value needs nothing but the sum of its gradients, they are summed in one call with
    others, whose latency is not counted. That is after the backward pass: on the way such moves
    come first.
    Seconds are those of the forward and, where a gradient flows, of the backward pass.
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
            self.shares = self.shares * share.reshape(_along(axis, len(grid)))
        valid = np.array(
            [is_nested(shape, layout, sizes) for layout in self.layouts], dtype=bool
        ).reshape(grid)
        self.moves: list[NDArray[np.float64]] = []
        self.forwards: list[NDArray[np.float64]] = []
        for axis, placements in enumerate(universe):
            seconds = np.full((*grid, len(placements)), np.inf)
            forward = np.zeros_like(seconds)
            others = self.shares / shares[axis].reshape(_along(axis, len(grid)))
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
                    ahead, back = (
                        [
                            movement_seconds(
                                move,
                                nbytes * float(factor),
                                hardware,
                                links[axis],
                                sizes[axis],
                                together and step.forward is Movement.NONE,
                            )
                            for factor in factors
                        ]
                        for move in moves
                    )
                    priced = np.add(ahead, back)
                    seconds[(*rows, ..., target)] = priced[place]
                    forward[(*rows, ..., target)] = np.array(ahead)[place]
            if len(grid) > 1:
                for cell, layout in zip(np.ndindex(*grid), self.layouts, strict=True):
                    for target, two in enumerate(placements):
                        step = Step(axis, layout[axis], two)
                        if not is_possible_step(layout, step):
                            seconds[(*cell, target)] = np.inf
                seconds[~valid] = np.inf
                for target in range(len(placements)):
                    there = valid[(slice(None),) * axis + (target,)]
                    seconds[..., target][~np.broadcast_to(np.expand_dims(there, axis), grid)] = (
                        np.inf
                    )
            self.moves.append(seconds)
            self.forwards.append(forward)
        self.together = together
        self.hops = 1 if len(grid) == 1 else len(grid) + 1
        self._levels: dict[tuple[Layout, ...], list[NDArray[np.float64]]] = {}
        self._forward: dict[tuple[Layout, ...], NDArray[np.float64]] = {}

    def levels(self, targets: tuple[Layout, ...]) -> list[NDArray[np.float64]]:
        """Per number of steps, the least seconds from every layout to each target: (*grid, target).

        The last one is repeated by no more steps.
        """
        known = self._levels.get(targets)
        if known is None:
            start = np.full((len(self.layouts), len(targets)), np.inf)
            start[[self.cells[target] for target in targets], range(len(targets))] = 0.0
            known = [start.reshape(*self.grid, len(targets))]
            for _ in range(self.hops):
                last = known[-1]
                best = last
                for axis, seconds in enumerate(self.moves):
                    over = (seconds[..., None] + _after(last, axis)).min(axis=-2)
                    best = np.where(over < best * (1 - _RELATIVE), over, best)
                if np.array_equal(best, last):
                    break
                known.append(best)
            self._levels[targets] = known
        return known

    def seconds(self, targets: tuple[Layout, ...]) -> NDArray[np.float64]:
        """table[layout, target]: the least seconds, layouts in the order of `cells`."""
        table = self.levels(targets)[-1].reshape(-1, len(targets))
        return self._led(table, targets, self.moves) if self.together else table

    def forward_seconds(self, targets: tuple[Layout, ...]) -> NDArray[np.float64]:
        """table[layout, target]: seconds of the forward pass alone, of the ways of `seconds`."""
        if targets not in self._forward:
            levels = self.levels(targets)
            ahead = np.zeros_like(levels[0])
            for last in levels[:-1]:
                best, found = last, ahead
                for axis, (seconds, forward) in enumerate(
                    zip(self.moves, self.forwards, strict=True)
                ):
                    over = seconds[..., None] + _after(last, axis)
                    then = forward[..., None] + _after(ahead, axis)
                    first = over.argmin(axis=-2)[..., None, :]
                    over = np.take_along_axis(over, first, -2)[..., 0, :]
                    better = over < best * (1 - _RELATIVE)
                    best = np.where(better, over, best)
                    found = np.where(better, np.take_along_axis(then, first, -2)[..., 0, :], found)
                ahead = found
            table = ahead.reshape(-1, len(targets))
            if self.together:
                table = self._led(table, targets, self.forwards)
            self._forward[targets] = table
        return self._forward[targets]

    def _led(
        self,
        table: NDArray[np.float64],
        targets: tuple[Layout, ...],
        moves: list[NDArray[np.float64]],
    ) -> NDArray[np.float64]:
        """The table for ways that begin with all moves from I to R that are for good."""
        found = table.copy()
        cells = np.arange(len(self.layouts)).reshape(self.grid)
        one, two = Invariant(), Replicate()
        able = [axis for axis, own in enumerate(self.universe) if one in own and two in own]
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
            found[np.ix_(rows.reshape(-1), np.array(columns, dtype=int))] = led[:, columns]
        return found

    def steps(self, source: Layout, target: Layout) -> tuple[Step, ...]:
        """The cheapest way. Raises ValueError where there is none."""
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
        hop = next(h for h, level in enumerate(levels) if level.reshape(-1)[cell] == final)
        found: list[Step] = []
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
            found.append(Step(axis, layout[axis], placement))
            layout = after
            hop = next(
                h
                for h, level in enumerate(levels[:hop])
                if level.reshape(-1)[self.cells[layout]]
                <= levels[hop - 1].reshape(-1)[self.cells[layout]]
            )
        return (*lead, *found)


def _summed(layout: Layout, axes: tuple[int, ...]) -> Layout:
    """The layout with R on these axes."""
    return tuple(
        Replicate() if axis in axes else placement for axis, placement in enumerate(layout)
    )


def _after(table: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """(*grid, target) as (*grid without axis, 1 in its place, placement on the axis, target)."""
    return np.expand_dims(np.moveaxis(table, axis, -2), axis)


def _along(axis: int, count: int) -> tuple[int, ...]:
    return tuple(-1 if other == axis else 1 for other in range(count))
