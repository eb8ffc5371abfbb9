"""What it costs that a value is read otherwise than it is made: tables of makers and readers.

A value read by one op has a table between the two. A value read by several has a variable of its
own, the set of layouts that it is brought to: each is paid once, whoever reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.hardware import Hardware, Link
from autoparallel.cost.op_costs import nbytes
from autoparallel.graph.graph import Value
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.options import Options
from autoparallel.placement import (
    Invariant,
    Layout,
    Movement,
    Placement,
    Replicate,
    Shard,
    Step,
)
from autoparallel.strategy.parameter_storage import ParameterStorage
from autoparallel.strategy.redistribution_paths import RedistributionPaths
from autoparallel.strategy.zero_costs import zero_gradient_table
from planners import Alternative

__all__ = [
    "ProducerLayouts",
    "ReaderLayouts",
    "RecomputedEnds",
    "RedistributionTable",
    "RedistributionTables",
    "Table",
]

Array = NDArray[np.float64]

# How many layouts of one value may be in use: on one mesh axis, and on several, where they differ
# on one axis only.
_MOST_TARGETS, _MOST_JOINT = 3, 2


@dataclass(frozen=True, eq=False)
class ProducerLayouts:
    """How the variable that makes a value lays it in each state. Known by identity.

    stored: of a parameter, the states themselves. given: it is there anyway: a parameter, an input.
    counted: as it is made, its memory is counted elsewhere: its maker keeps it, or it is a view.
    """

    layouts: tuple[Layout, ...]
    stored: tuple[ParameterStorage, ...] = ()
    given: bool = False
    counted: bool = False


@dataclass(frozen=True, eq=False)
class ReaderLayouts:
    """In which layouts an op reads a value in each state. Known by identity.

    saves: whether what it reads stays, because the backward pass needs it. returned: because the
    caller has it.
    """

    layouts: tuple[tuple[Layout, ...], ...]
    saved_for_backward: bool = False
    returned_to_caller: bool = False


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


@dataclass(frozen=True, slots=True)
class RecomputedEnds:
    """Who is run again in the backward pass: the maker of a value, and which of its readers.

    apart: the maker belongs to another block than the readers, of which it may be run again or not.
    """

    maker: bool
    readers: tuple[bool, ...]
    apart: bool = False


@dataclass(frozen=True, eq=False)
class RedistributionTable:
    """From a maker to its readers. groups: the layouts that the value is brought to, by state of
    the only reader or of the variable between; kept: those that the backward pass needs.

    paid: against the maker. offers: between the variable and each reader, where there are several.
    """

    groups: tuple[tuple[Layout, ...], ...]
    kept: tuple[tuple[Layout, ...], ...]
    paid: Table
    routes: RedistributionPaths
    offers: tuple[Table, ...] = ()


@dataclass
class RedistributionTables:
    """Tables of one network, each made once for all values that are alike.

    sizes, links: of the mesh axes. memory: whether bytes are counted.
    """

    sizes: tuple[int, ...]
    links: tuple[Link, ...]
    hardware: Hardware
    options: Options
    memory: bool = False
    _routes: dict[Any, RedistributionPaths] = field(default_factory=dict)
    _tables: dict[Any, Any] = field(default_factory=dict)

    def routes(
        self, value: Value, weight: bool, together: bool, layouts: Sequence[Layout]
    ) -> RedistributionPaths:
        """The ways of a value between these layouts, and through what lies between them."""
        universe = tuple(
            tuple(sorted(dict.fromkeys(column), key=_rank)) for column in zip(*layouts, strict=True)
        )
        key = (value.shape, value.dtype.itemsize, value.requires_grad, weight, together, universe)
        if key not in self._routes:
            matrix = sum(size != 1 for size in value.shape) > 1
            self._routes[key] = RedistributionPaths(
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
        self,
        value: Value,
        made: ProducerLayouts,
        needs: tuple[ReaderLayouts, ...],
        weight: bool,
        together: bool,
        modes: tuple[RecomputedEnds, ...] = (),
    ) -> RedistributionTable:
        """The tables of one value: of a maker with its only reader, or with a variable between.

        modes: for each way in which the block of the readers may be run again, who is. More than
        one makes the tables those of three variables, the last of which is the mode.
        """
        key = (_class(value, weight, together), id(made), tuple(map(id, needs)), modes)
        if key not in self._tables:
            if len(needs) == 1:
                groups = needs[0].layouts
                kept = (
                    groups if needs[0].saved_for_backward and self.memory else ((),) * len(groups)
                )
            else:
                groups, kept = self._groups(needs)
            targets = tuple(dict.fromkeys(target for group in groups for target in group))
            own = tuple(dict.fromkeys(made.layouts))
            routes = self.routes(value, weight, together, (*own, *targets))
            plain = modes or (RecomputedEnds(False, (False,) * len(needs)),)
            tables = [
                self._paid(value, made, groups, kept, routes, targets, mode) for mode in plain
            ]
            if any(need.returned_to_caller for need in needs):
                tables = [replace(table, alternatives=()) for table in tables]
            offers: tuple[Table, ...] = ()
            if len(needs) > 1:
                offers = tuple(Table(_offers(groups, kept, need)) for need in needs)
            # Makers and readers are known by identity: keep them alive.
            edge = RedistributionTable(groups, kept, _stacked(tables), routes, offers)
            self._tables[key] = (edge, made, needs)
        found: RedistributionTable = self._tables[key][0]
        return found

    def _groups(
        self, needs: tuple[ReaderLayouts, ...]
    ) -> tuple[tuple[tuple[Layout, ...], ...], tuple[tuple[Layout, ...], ...]]:
        """Sets of layouts that a value may be brought to, the smallest first; and what is kept."""
        targets = tuple(dict.fromkeys(t for need in needs for state in need.layouts for t in state))
        largest = max(len(state) for need in needs for state in need.layouts)
        most = _MOST_TARGETS if len(self.sizes) == 1 else _MOST_JOINT
        counts = range(1, max(min(most, len(needs), len(targets)), largest) + 1)
        sets = [group for count in counts for group in combinations(targets, count)]
        if len(self.sizes) > 1:
            sets = [group for group in sets if len(group) == 1 or _differ(*group[:2]) == 1]
        savers = sum(need.saved_for_backward for need in needs) if self.memory else 0
        groups: list[tuple[Layout, ...]] = []
        kept: list[tuple[Layout, ...]] = []
        for group in sets:
            # Whatever no saver reads, one of the others does.
            fewest = max(1, len(group) - (len(needs) - savers))
            for count in range(fewest, min(savers, len(group)) + 1):
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
        made: ProducerLayouts,
        groups: tuple[tuple[Layout, ...], ...],
        kept: tuple[tuple[Layout, ...], ...],
        routes: RedistributionPaths,
        targets: tuple[Layout, ...],
        mode: RecomputedEnds,
    ) -> Table:
        """table[made, group]: each layout of the group is paid once; what is kept has its bytes."""
        row = np.array([routes.cells[layout] for layout in made.layouts])
        seconds = routes.seconds(targets)[row]
        if made.stored:
            seconds = seconds + zero_gradient_table(
                value, made.stored, targets, self.links, self.sizes
            )
        ahead = np.zeros_like(seconds)
        if self.memory or all(mode.readers):
            ahead = routes.forward_seconds(targets)[row]
        cost = _summed(seconds, targets, groups)
        if all(mode.readers):
            cost = cost + _summed(ahead, targets, groups)
        if not self.memory:
            return Table(cost)
        return self._weighed(value, made, targets, kept, cost, ahead, mode)

    def _weighed(
        self,
        value: Value,
        made: ProducerLayouts,
        targets: tuple[Layout, ...],
        kept: tuple[tuple[Layout, ...], ...],
        cost: Array,
        ahead: Array,
        mode: RecomputedEnds,
    ) -> Table:
        """The bytes of what the backward pass needs, held or made again from what it came from.

        What is run again keeps what goes into it, as it was made, and nothing else.
        """
        shape, size = value.shape, nbytes(value)
        here = made.given or (made.counted and not mode.maker and not mode.apart)
        source = np.array(
            [
                0.0 if here else size * layout_fraction(shape, layout, self.sizes)
                for layout in made.layouts
            ]
        )
        entering = any(mode.readers) and not mode.maker
        if all(mode.readers):
            usage = np.broadcast_to(source[:, None] if entering else 0.0, cost.shape)
            return Table(cost, np.ascontiguousarray(usage))
        if not any(kept) and not entering:
            return Table(cost)
        forms = [_storage(target) for target in targets]
        plain = [_storage(layout) for layout in made.layouts]
        other = np.array([[form != own for form in forms] for own in plain])
        local = np.array([size * layout_fraction(shape, t, self.sizes) for t in targets])
        held = np.where(other, local, source[:, None])
        distinct = tuple(
            tuple({_storage(layout): layout for layout in some}.values()) for some in kept
        )
        holds = _summed(held, targets, distinct)
        again = _summed(other.astype(float), targets, distinct) > 0
        if entering:
            # Some readers are run again: what they take stays, beside what the others keep.
            as_made = _summed((~other).astype(float), targets, distinct) > 0
            holds = np.where(as_made, holds, holds + source[:, None])
        if not again.any():
            return Table(cost, holds)
        time = _summed(ahead * other, targets, distinct)
        repeat = np.where(again & np.isfinite(cost), cost + time, np.inf)
        fewer = np.where(again, np.broadcast_to(source[:, None], holds.shape), 0.0)
        return Table(cost, holds, (Alternative(repeat, fewer),))


def _summed(
    columns: Array, targets: tuple[Layout, ...], groups: tuple[tuple[Layout, ...], ...]
) -> Array:
    """Per group, the sum of its targets' columns."""
    place = {target: index for index, target in enumerate(targets)}
    if all(len(group) == 1 for group in groups):
        return columns[:, [place[group[0]] for group in groups]]
    most = max(map(len, groups))
    padded = np.concatenate([columns, np.zeros((len(columns), 1))], axis=1)
    total = np.zeros((len(columns), len(groups)))
    for at in range(most):
        picked = [place[group[at]] if len(group) > at else len(targets) for group in groups]
        total = total + padded[:, picked]
    return total


def _stacked(tables: list[Table]) -> Table:
    """Tables of two variables as one of three, the last of which says which of them counts."""
    if len(tables) == 1:
        return tables[0]
    cost = np.stack([table.cost for table in tables], axis=-1)
    usage = None
    if any(table.usage is not None for table in tables):
        usage = np.stack([_usage(table) for table in tables], axis=-1)
    if not any(table.alternatives for table in tables):
        return Table(cost, usage)
    others = [
        table.alternatives[0]
        if table.alternatives
        else Alternative(np.full(table.cost.shape, np.inf), np.zeros(table.cost.shape))
        for table in tables
    ]
    alternative = Alternative(
        np.stack([other.cost for other in others], axis=-1),
        np.stack([other.usage for other in others if other.usage is not None], axis=-1),
    )
    return Table(cost, usage, (alternative,))


def _usage(table: Table) -> Array:
    return np.zeros(table.cost.shape) if table.usage is None else table.usage


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
    groups: tuple[tuple[Layout, ...], ...],
    kept: tuple[tuple[Layout, ...], ...],
    need: ReaderLayouts,
) -> Array:
    """table[group, state]: zero where the group has all that the state reads, and keeps it."""
    names = {layout: place for place, layout in enumerate(dict.fromkeys(chain(*groups)))}

    def members(sets: tuple[tuple[Layout, ...], ...]) -> NDArray[np.float32]:
        table = np.zeros((len(sets), len(names)), dtype=np.float32)
        for index, members in enumerate(sets):
            for layout in members:
                table[index, names[layout]] = 1
        return table

    has = members(kept if need.saved_for_backward and any(kept) else groups)
    missing = (1 - has) @ members(need.layouts).T
    return np.where(missing > 0, np.inf, 0.0)
