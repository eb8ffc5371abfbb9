"""How a value gets from one layout to another: the cheapest sequence of moves on single axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.collectives import movement_seconds
from autoparallel.cost.hardware import Hardware, Link
from autoparallel.graph.graph import Dim, hint
from autoparallel.joint import is_nested
from autoparallel.placement import (
    Layout,
    Movement,
    Placement,
    Shard,
    Step,
    is_possible_step,
    local_size,
)

__all__ = ["Routes", "layout_fraction"]

# A longer way must be cheaper by more than rounding.
_RELATIVE = 1e-9


def layout_fraction(shape: Sequence[Dim], layout: Layout, sizes: tuple[int, ...]) -> float:
    """Share of a tensor's bytes that the rank with the largest part holds."""
    share = 1.0
    for placement, count in zip(layout, sizes, strict=True):
        if isinstance(placement, Shard):
            share *= _part(shape, placement, count)
    return share


def _part(shape: Sequence[Dim], placement: Placement, count: int) -> float:
    if not isinstance(placement, Shard):
        return 1.0
    size = hint(shape[placement.dim])
    return local_size(size, placement, count) / size if size else 1.0


class Routes:
    """All cheapest ways between the layouts that a value may have.

    shape, nbytes: of the whole value. universe: per axis, the placements that may occur, on the
    way too. sizes, links: of the axes. is_allowed: whether a step may be made. together: where a
    whole value needs nothing but the sum of its gradients, they are summed in one call with others,
    whose latency is not counted.
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
            np.array([_part(shape, placement, count) for placement in placements])
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
        self.hops = 1 if len(grid) == 1 else len(grid) + 1
        self._levels: dict[Layout, list[NDArray[np.float64]]] = {}
        self._forward: dict[Layout, NDArray[np.float64]] = {}

    def levels(self, target: Layout) -> list[NDArray[np.float64]]:
        """Per number of steps, the least seconds from every layout to `target`, on the grid."""
        known = self._levels.get(target)
        if known is None:
            start = np.full(self.grid, np.inf)
            start.reshape(-1)[self.cells[target]] = 0.0
            known = [start]
            for _ in range(self.hops):
                last = known[-1]
                best = last
                for axis, seconds in enumerate(self.moves):
                    after = np.expand_dims(np.moveaxis(last, axis, -1), axis)
                    over = (seconds + after).min(axis=-1)
                    best = np.where(over < best * (1 - _RELATIVE), over, best)
                known.append(best)
            self._levels[target] = known
        return known

    def seconds(self, target: Layout) -> NDArray[np.float64]:
        """The least seconds from every layout, in the order of `layouts`, to `target`."""
        return self.levels(target)[-1].reshape(-1)

    def steps(self, source: Layout, target: Layout) -> tuple[Step, ...]:
        """The cheapest way. Raises ValueError where there is none."""
        levels = self.levels(target)
        cell = self.cells[source]
        final = levels[-1].reshape(-1)[cell]
        if not np.isfinite(final):
            raise ValueError(f"no way from {source} to {target}")
        hop = next(h for h, level in enumerate(levels) if level.reshape(-1)[cell] == final)
        found: list[Step] = []
        layout = source
        while hop:
            place = np.unravel_index(self.cells[layout], self.grid)
            options = []
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
        return tuple(found)

    def forward_seconds(self, target: Layout) -> NDArray[np.float64]:
        """Seconds of the forward pass alone, of the ways of `seconds`."""
        if target not in self._forward:
            levels = self.levels(target)
            ahead = np.zeros(self.grid)
            for last, level in pairwise(levels):
                found = ahead
                best = last
                for axis, (seconds, forward) in enumerate(
                    zip(self.moves, self.forwards, strict=True)
                ):
                    over = seconds + np.expand_dims(np.moveaxis(last, axis, -1), axis)
                    then = forward + np.expand_dims(np.moveaxis(ahead, axis, -1), axis)
                    first = over.argmin(axis=-1)[..., None]
                    over = np.take_along_axis(over, first, -1)[..., 0]
                    better = over < best * (1 - _RELATIVE)
                    best = np.where(better, over, best)
                    found = np.where(better, np.take_along_axis(then, first, -1)[..., 0], found)
                assert np.array_equal(best, level)
                ahead = found
            self._forward[target] = ahead.reshape(-1)
        return self._forward[target]


def _along(axis: int, count: int) -> tuple[int, ...]:
    return tuple(-1 if other == axis else 1 for other in range(count))
