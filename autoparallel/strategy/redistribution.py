"""Tables of redistribution: the cost of reading a value in another layout than it is produced in.

A value that one op reads has a table between its producer and that reader. A value that several
read has a variable of its own, the set of layouts that it is brought to: each redistribution is
paid once, whoever reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.hardware import Hardware, Link
from autoparallel.cost.op_costs import nbytes
from autoparallel.graph.graph import Value
from autoparallel.options import Options
from autoparallel.placement import Invariant, Layout, Movement, Placement, Shard, Step
from autoparallel.strategy.arranged_paths import ArrangedPaths
from autoparallel.strategy.cost_tables import Table, stacked, sum_of_columns, with_usage
from autoparallel.strategy.counted_moments import Left
from autoparallel.strategy.equal_axes import AxisGroups
from autoparallel.strategy.layout_sets import ReaderLayouts, layout_sets, offers_to_reader
from autoparallel.strategy.redistributed_copies import (
    ProducerLayouts,
    RecomputedEnds,
    copied_nbytes,
    held_nbytes,
    weighed_table,
)
from autoparallel.strategy.redistribution_paths import RedistributionPaths
from autoparallel.strategy.zero_costs import zero_gradient_table

__all__ = [
    "RedistributionTable",
    "RedistributionTables",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RedistributionTable:
    """The prices of bringing one value from its producer to its readers.

    groups: the layouts that the value is brought to, by state of the only reader or of the variable
    between; kept: those of them that are saved for the backward pass. paid: table[producer's state,
    group], a third axis for the recompute mode if there are several. routes: the paths that were
    priced. produced: the layouts of the producer. again: per recompute mode, whether the forward
    way is taken twice. offers: where there are several readers, a table between the variable and
    each one, which forbids groups without the layouts that the reader needs.
    """

    groups: tuple[tuple[Layout, ...], ...]
    kept: tuple[tuple[Layout, ...], ...]
    paid: Table
    routes: RedistributionPaths | ArrangedPaths
    produced: ProducerLayouts
    again: tuple[bool, ...]
    offers: tuple[Table, ...] = ()


@dataclass
class RedistributionTables:
    """All redistribution tables of one network, each computed once for all values that are alike.

    sizes, links: of the mesh axes, outermost first. memory: True where bytes are counted, that is,
    where there is a memory limit. in_time: per axis, whether its places are micro-batches, one
    after the other; empty for none. once: the share that a step bears of reductions of parameters'
    gradients; see `StageShares`. groups: of axes whose order is left open, so that the prices are
    bounds; none by default. shared: what is known by identity and equal is one object here, by what
    it follows from.
    """

    sizes: tuple[int, ...]
    links: tuple[Link, ...]
    hardware: Hardware
    options: Options
    memory: bool = False
    in_time: tuple[bool, ...] = ()
    once: float = 1.0
    groups: AxisGroups = ()
    shared: dict[Any, Any] = field(default_factory=dict)
    _routes: dict[Any, RedistributionPaths | ArrangedPaths] = field(default_factory=dict)
    _tables: dict[Any, Any] = field(default_factory=dict)

    def serves(self, other: RedistributionTables) -> bool:
        """Return whether the tables of another network would be these."""
        ours, theirs = (
            (
                *(each.sizes, each.links, each.hardware, each.memory, each.in_time, each.once),
                *(each.groups, each.options.sequence_parallel, each.options.data_parallel),
            )
            for each in (self, other)
        )
        return ours == theirs

    def routes(
        self, value: Value, weight: bool, together: bool, layouts: Sequence[Layout]
    ) -> RedistributionPaths | ArrangedPaths:
        """Return the paths of a value between these layouts, and through what lies between them.

        weight: the value is a parameter, or computed from one alone. together: its gradient may be
        reduced in a bucket with others (see `RedistributionPaths`).
        """
        # On the way a value may have, on each axis, any placement that one of the layouts has
        # there.
        columns = list(zip(*layouts, strict=True))
        for group in self.groups:
            together_there = tuple(placement for axis in group for placement in columns[axis])
            for axis in group:
                columns[axis] = together_there
        universe = tuple(tuple(sorted(dict.fromkeys(column), key=_rank)) for column in columns)
        key = (value.shape, value.dtype.itemsize, value.requires_grad, weight, together, universe)
        if key not in self._routes:
            # A parameter with one long dim at most is a bias or a gain: small, and free to be
            # moved.
            matrix = sum(size != 1 for size in value.shape) > 1
            paths = partial(ArrangedPaths, groups=self.groups)
            self._routes[key] = (paths if self.groups else RedistributionPaths)(
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
        """Say whether the options permit a step of a value.

        grad: it has a gradient. matrix: it is a weight of two or more dims.
        """
        options = self.options
        back = step.backward if grad else Movement.NONE
        # No collective crosses time; and a batch is nothing that weights are split along.
        if self.in_time and self.in_time[step.axis]:
            crosses = (step.forward.collective, back.collective) != (None, None)
            return not crosses and not weight
        if Movement.REDUCE_SCATTER in (step.forward, back) and not (
            options.sequence_parallel or options.data_parallel
        ):
            return False
        # Without data parallelism weights are not moved: a matrix is used as it is stored, and only
        # what costs nothing in the forward pass is done to biases and gains.
        if weight and not options.data_parallel:
            return not matrix and step.forward in (Movement.NONE, Movement.KEEP_ON_FIRST)
        # A gathered parameter is used by each rank in its own way at once: only the gradients of
        # parameters that are stored whole can wait to be summed together.
        waits = isinstance(step.source, Shard) and isinstance(step.target, Invariant)
        return not (together and grad and waits)

    def between(
        self,
        value: Value,
        produced: ProducerLayouts,
        readers: tuple[ReaderLayouts, ...],
        weight: bool,
        together: bool,
        modes: tuple[RecomputedEnds, ...] = (),
        left: Left = Left.ALL,
        here: tuple[bool, bool] = (False, False),
        passed: bool = False,
        also: frozenset[Layout] = frozenset(),
    ) -> RedistributionTable:
        """Return the tables of a value, from its producer to its reader or readers.

        produced, readers: layouts of both ends; of several readers, the tables are with a variable
        between. weight, together: as of `routes`. modes: for each way in which the readers' block
        may be recomputed, the ends that are. More than one makes `paid` a table of three variables,
        the last of which is the mode. left: of the readers that save it, those that still need it
        at the moment at which bytes are counted. here: of the call whose backward that is, whether
        it needs a copy of the value, and makes a gradient of one beside the value's own. passed:
        what is saved of it is counted with views of it. also: as of `layout_sets`.
        """
        ends = id(produced), tuple(map(id, readers))
        key = (_class(value, weight, together), ends, modes, left, here, passed, also)
        if key not in self._tables:
            if len(readers) == 1:
                groups = readers[0].layouts
                saved = (
                    groups if readers[0].saved_for_backward and self.memory else ((),) * len(groups)
                )
            else:
                axes = len(self.sizes)
                groups, saved = layout_sets(readers, axes, self.memory, self.groups, also)
            targets = tuple(dict.fromkeys(target for group in groups for target in group))
            produced_layouts = tuple(dict.fromkeys(produced.layouts))
            routes = self.routes(value, weight, together, (*produced_layouts, *targets))
            plain = modes or (RecomputedEnds(False, (False,) * len(readers)),)
            tables = [
                self._paid(
                    value, produced, groups, saved, routes, targets, mode, left, here, passed
                )
                for mode in plain
            ]
            # What the caller holds cannot be dropped and redistributed again.
            if any(reader.returned_to_caller for reader in readers):
                tables = [replace(table, alternatives=()) for table in tables]
            offers: tuple[Table, ...] = ()
            if len(readers) > 1:
                offers = tuple(Table(offers_to_reader(groups, saved, reader)) for reader in readers)
            # Producers and readers are known by their ids: kept alive, no other object gets them.
            again = tuple(mode.moved_again for mode in plain)
            edge = RedistributionTable(
                groups, saved, stacked(tables), routes, produced, again, offers
            )
            self._tables[key] = (edge, produced, readers)
        table_of_value: RedistributionTable = self._tables[key][0]
        return table_of_value

    def _paid(
        self,
        value: Value,
        produced: ProducerLayouts,
        groups: tuple[tuple[Layout, ...], ...],
        saved: tuple[tuple[Layout, ...], ...],
        routes: RedistributionPaths | ArrangedPaths,
        targets: tuple[Layout, ...],
        mode: RecomputedEnds,
        left: Left,
        here: tuple[bool, bool],
        passed: bool,
    ) -> Table:
        """Return table[producer's state, group]: each layout of the group is paid once.

        saved: per group, the layouts whose bytes count. targets: all layouts of all groups. mode:
        the ends that are recomputed; a recomputed reader needs its redistribution done again.
        """
        row = np.array([routes.cells[layout] for layout in produced.layouts])
        seconds = routes.seconds(targets)[row]
        if produced.stored:
            zero = zero_gradient_table(
                value, produced.stored, targets, self.links, self.sizes, self.groups
            )
            if self.once != 1.0:
                reduced = np.where(np.isfinite(seconds), routes.reduced_seconds(targets)[row], 0.0)
                seconds = seconds - (1 - self.once) * reduced
            seconds = seconds + self.once * zero
        # Forward seconds are needed where the step may be run twice: by recomputation, or instead
        # of saving.
        ahead = np.zeros_like(seconds)
        if self.memory or mode.moved_again:
            ahead = routes.forward_seconds(targets)[row]
        cost = sum_of_columns(seconds, targets, groups)
        if mode.moved_again:
            cost = cost + sum_of_columns(ahead, targets, groups)
        if not self.memory:
            return Table(cost)
        table = weighed_table(
            value, produced, targets, groups, saved, cost, ahead, mode, left, passed, self.sizes
        )
        if not any(here):
            return table
        # Copies that are made again are there when they are needed.
        shape, size = value.shape, nbytes(value)
        copies = copied_nbytes(size, shape, produced.layouts, targets, self.sizes)
        again, gradient = (
            held_nbytes(copies, targets, some, Left.SOME) if asked else np.zeros(cost.shape)
            for some, asked in zip((saved, groups), here, strict=True)
        )
        return with_usage(table, again, gradient)


def _class(value: Value, weight: bool, together: bool) -> Any:
    """Return the key of values whose redistributions cost the same."""
    return (value.shape, value.dtype.itemsize, value.requires_grad, weight, together)


def _rank(placement: Placement) -> tuple[Any, ...]:
    """Return a key that sorts placements, so that the order of layouts does not matter."""
    if not isinstance(placement, Shard):
        return (type(placement).__name__, 0, (), (), (), False)
    blocks, unit, repeat = (
        number if isinstance(number, tuple) else (number,)
        for number in (placement.blocks, placement.unit, placement.repeat)
    )
    return ("Shard", placement.dim, blocks, unit, repeat, placement.pending)
