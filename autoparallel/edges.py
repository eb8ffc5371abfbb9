"""What it costs that a value is read otherwise than it is made: tables of makers and readers.

A value read by one op has a table between the two. A value read by several has a variable of its
own, the set of layouts that it is brought to: each is paid once, whoever reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.collectives import collective_seconds, together_seconds
from autoparallel.cost.compute import nbytes
from autoparallel.cost.hardware import Hardware, Link
from autoparallel.graph.graph import Value
from autoparallel.options import Options
from autoparallel.placement import (
    Collective,
    Invariant,
    Layout,
    Movement,
    Placement,
    Replicate,
    Shard,
    Step,
)
from autoparallel.routes import Routes, layout_fraction
from autoparallel.stores import Stored
from planners import Alternative

__all__ = ["Edge", "Edges", "Made", "Need", "Table"]

Array = NDArray[np.float64]

# How many layouts of one value may be in use: on one mesh axis, and on several.
_MOST_TARGETS, _MOST_JOINT = 3, 2
# Pairs of layouts that differ on more than one axis are left out where there are so many layouts.
_MANY_LAYOUTS = 64


@dataclass(frozen=True, eq=False)
class Made:
    """How the variable that makes a value lays it in each state. Known by identity.

    stored: of a parameter, the states themselves. resident: the value takes no memory of its own
    where it is kept as it is made: a parameter, an input, or what its maker keeps anyway.
    """

    layouts: tuple[Layout, ...]
    stored: tuple[Stored, ...] = ()
    resident: bool = False


@dataclass(frozen=True, eq=False)
class Need:
    """In which layouts an op reads a value in each state. Known by identity.

    saves: whether the backward pass needs what it reads.
    """

    layouts: tuple[tuple[Layout, ...], ...]
    saves: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its bytes, as the planner takes it."""

    cost: Array
    usage: Array | None = None
    alternatives: tuple[Alternative, ...] = ()

    @property
    def matters(self) -> bool:
        """Whether it says anything."""
        return bool(self.cost.any() or (self.usage is not None and self.usage.any()))


@dataclass(frozen=True, eq=False)
class Edge:
    """From a maker to its readers. groups: the layouts that the value is brought to, by state of
    the only reader or of the variable between; kept: those that the backward pass needs.

    paid: against the maker. offers: between the variable and each reader, where there are several.
    """

    groups: tuple[tuple[Layout, ...], ...]
    kept: tuple[tuple[Layout, ...], ...]
    paid: Table
    routes: Routes
    offers: tuple[Table, ...] = ()


@dataclass
class Edges:
    """Tables of one network, each made once for all values that are alike.

    sizes, links: of the mesh axes. memory: whether bytes are counted.
    """

    sizes: tuple[int, ...]
    links: tuple[Link, ...]
    hardware: Hardware
    options: Options
    memory: bool = False
    _routes: dict[Any, Routes] = field(default_factory=dict)
    _tables: dict[Any, Any] = field(default_factory=dict)

    def routes(
        self, value: Value, weight: bool, together: bool, layouts: Sequence[Layout]
    ) -> Routes:
        """The ways of a value between these layouts, and through what lies between them."""
        universe = tuple(
            tuple(sorted(dict.fromkeys(column), key=_rank)) for column in zip(*layouts, strict=True)
        )
        key = (value.shape, value.dtype.itemsize, value.requires_grad, weight, together, universe)
        if key not in self._routes:
            matrix = sum(size != 1 for size in value.shape) > 1
            self._routes[key] = Routes(
                value.shape,
                nbytes(value),
                value.requires_grad,
                universe,
                self.sizes,
                self.links,
                self.hardware,
                lambda step: self._is_allowed(
                    step, value.requires_grad, weight and matrix, weight, together
                ),
                together,
            )
        return self._routes[key]

    def _is_allowed(
        self, step: Step, grad: bool, matrix: bool, weight: bool, together: bool
    ) -> bool:
        options = self.options
        back = step.backward if grad else Movement.NONE
        if Movement.REDUCE_SCATTER in (step.forward, back) and not (
            options.sequence_parallel or options.data_parallel
        ):
            return False
        if weight and not options.data_parallel:
            return not matrix and step.forward in (Movement.NONE, Movement.KEEP_ON_FIRST)
        # A gathered parameter is used by each rank in its own way at once: only the gradients of
        # parameters that are stored whole can wait to be summed together.
        waits = isinstance(step.source, Shard) and isinstance(step.target, Invariant)
        return not (together and grad and waits)

    def between(
        self, value: Value, made: Made, needs: tuple[Need, ...], weight: bool, together: bool
    ) -> Edge:
        """The tables of one value: of a maker with its only reader, or with a variable between."""
        key = (_class(value, weight, together), id(made), tuple(map(id, needs)))
        if key not in self._tables:
            if len(needs) == 1:
                groups = needs[0].layouts
                kept = groups if needs[0].saves and self.memory else ((),) * len(groups)
            else:
                groups, kept = self._groups(needs)
            targets = tuple(dict.fromkeys(target for group in groups for target in group))
            own = tuple(dict.fromkeys(made.layouts))
            routes = self.routes(value, weight, together, (*own, *targets))
            paid = self._paid(value, made, groups, kept, routes, targets)
            offers: tuple[Table, ...] = ()
            if len(needs) > 1:
                offers = tuple(Table(_offers(groups, kept, need)) for need in needs)
            # Makers and readers are known by identity: keep them alive.
            self._tables[key] = (Edge(groups, kept, paid, routes, offers), made, needs)
        edge: Edge = self._tables[key][0]
        return edge

    def _groups(
        self, needs: tuple[Need, ...]
    ) -> tuple[tuple[tuple[Layout, ...], ...], tuple[tuple[Layout, ...], ...]]:
        """Sets of layouts that a value may be brought to, the smallest first; and what is kept."""
        targets = tuple(dict.fromkeys(t for need in needs for state in need.layouts for t in state))
        largest = max(len(state) for need in needs for state in need.layouts)
        most = _MOST_TARGETS if len(self.sizes) == 1 else _MOST_JOINT
        counts = range(1, max(min(most, len(needs), len(targets)), largest) + 1)
        sets = [group for count in counts for group in combinations(targets, count)]
        if len(self.sizes) > 1 and len(targets) > _MANY_LAYOUTS:
            sets = [group for group in sets if len(group) == 1 or _differ(*group[:2]) == 1]
        savers = sum(need.saves for need in needs) if self.memory else 0
        groups: list[tuple[Layout, ...]] = []
        kept: list[tuple[Layout, ...]] = []
        for group in sets:
            for count in range(1, min(savers, len(group)) + 1):
                for some in combinations(group, count):
                    groups.append(group)
                    kept.append(some)
            if not savers:
                groups.append(group)
                kept.append(())
        return tuple(groups), tuple(kept)

    def _paid(
        self,
        value: Value,
        made: Made,
        groups: tuple[tuple[Layout, ...], ...],
        kept: tuple[tuple[Layout, ...], ...],
        routes: Routes,
        targets: tuple[Layout, ...],
    ) -> Table:
        """table[made, group]: each layout of the group is paid once; what is kept has its bytes."""
        place = {target: index for index, target in enumerate(targets)}
        row = np.array([routes.cells[layout] for layout in made.layouts])
        seconds = np.stack([routes.seconds(target)[row] for target in targets], axis=1)
        if made.stored:
            late = [[self.late(value, one, target) for target in targets] for one in made.stored]
            seconds = seconds + np.array(late)
        if all(len(group) == 1 for group in groups):
            columns = [place[group[0]] for group in groups]
            cost = seconds[:, columns]
        else:
            cost = np.stack(
                [seconds[:, [place[t] for t in group]].sum(axis=1) for group in groups], axis=1
            )
        if not self.memory or not any(kept):
            return Table(cost)
        return self._weighed(value, made, routes, targets, kept, cost, row)

    def _weighed(
        self,
        value: Value,
        made: Made,
        routes: Routes,
        targets: tuple[Layout, ...],
        kept: tuple[tuple[Layout, ...], ...],
        cost: Array,
        row: NDArray[np.intp],
    ) -> Table:
        """The bytes of what the backward pass needs, held or made again from what it came from."""
        place = {target: index for index, target in enumerate(targets)}
        shape, whole = value.shape, nbytes(value)
        size = [whole * layout_fraction(shape, target, self.sizes) for target in targets]
        source = np.array(
            [
                0.0 if made.resident else whole * layout_fraction(shape, layout, self.sizes)
                for layout in made.layouts
            ]
        )
        plain = [_storage(layout) for layout in made.layouts]
        held = np.zeros((len(made.layouts), len(targets)))
        other = np.zeros_like(held, dtype=bool)
        ahead = np.zeros_like(held)
        for target, column in place.items():
            form = _storage(target)
            other[:, column] = [form != own for own in plain]
            held[:, column] = np.where(other[:, column], size[column], source)
            ahead[:, column] = self._forward(routes, target)[row]
        holds = np.stack([held[:, [place[t] for t in some]].sum(axis=1) for some in kept], axis=1)
        again = np.stack([other[:, [place[t] for t in some]].any(axis=1) for some in kept], axis=1)
        time = np.stack(
            [(ahead * other)[:, [place[t] for t in some]].sum(axis=1) for some in kept],
            axis=1,
        )
        repeat = np.where(again & np.isfinite(cost), cost + time, np.inf)
        fewer = np.where(again, np.broadcast_to(source[:, None], holds.shape), 0.0)
        alternatives: tuple[Alternative, ...] = ()
        if again.any():
            alternatives = (Alternative(repeat, fewer),)
        return Table(cost, holds, alternatives)

    def _forward(self, routes: Routes, target: Layout) -> Array:
        """Seconds of the forward pass of the ways to `target`, from every layout."""
        found = np.zeros(len(routes.layouts))
        finite = np.isfinite(routes.seconds(target))
        for cell, layout in enumerate(routes.layouts):
            if finite[cell] and layout != target:
                found[cell] = routes.forward_seconds(routes.steps(layout, target), layout)
        return found

    def late(self, value: Value, stored: Stored, target: Layout) -> float:
        """What it adds that a gradient is reduced to a part and the updated parts are gathered.

        In place of the all-reduce that the way from the parameter to its reader has in backward.
        """
        seconds = 0.0
        for axis, (own, state) in enumerate(zip(stored.storage, stored.state, strict=True)):
            if own == state:
                continue
            if target[axis] != Replicate():
                return np.inf
            others = (*stored.storage[:axis], Invariant(), *stored.storage[axis + 1 :])
            size = nbytes(value) * layout_fraction(value.shape, others, self.sizes)
            seconds += self._swap(size, axis, stored.gradient == stored.storage)
        return seconds

    def _swap(self, size: float, axis: int, at_end: bool) -> float:
        link, count = self.links[axis], self.sizes[axis]
        scatter = together_seconds if at_end else collective_seconds
        return (
            scatter(Collective.REDUCE_SCATTER, size, link, count)
            + collective_seconds(Collective.ALL_GATHER, size, link, count)
            - together_seconds(Collective.ALL_REDUCE, size, link, count)
        )


def _class(value: Value, weight: bool, together: bool) -> Any:
    return (value.shape, value.dtype.itemsize, value.requires_grad, weight, together)


def _rank(placement: Placement) -> tuple[str, int, int, int]:
    if isinstance(placement, Shard):
        return ("Shard", placement.dim, placement.blocks, placement.unit)
    return (type(placement).__name__, 0, 0, 0)


def _differ(one: Layout, two: Layout) -> int:
    return sum(first != second for first, second in zip(one, two, strict=True))


def _storage(layout: Layout) -> Layout:
    """The layout as memory has it: what is the same on all ranks is the same tensor as I and R."""
    return tuple(Invariant() if isinstance(p, Replicate) else p for p in layout)


def _offers(
    groups: tuple[tuple[Layout, ...], ...], kept: tuple[tuple[Layout, ...], ...], need: Need
) -> Array:
    """table[group, state]: zero where the group has all that the state reads, and keeps it."""
    names: dict[Layout, int] = {}
    for group in groups:
        for layout in group:
            names.setdefault(layout, len(names))
    has = np.zeros((len(groups), len(names)), dtype=bool)
    keeps = np.zeros_like(has)
    for index, (group, some) in enumerate(zip(groups, kept, strict=True)):
        has[index, [names[layout] for layout in group]] = True
        keeps[index, [names[layout] for layout in some]] = True
    if need.saves and any(kept):
        has = keeps
    wanted = np.zeros((len(names), len(need.layouts)), dtype=bool)
    for index, state in enumerate(need.layouts):
        wanted[[names[layout] for layout in state], index] = True
    missing = (~has).astype(np.int64) @ wanted.astype(np.int64)
    return np.where(missing > 0, np.inf, 0.0)
