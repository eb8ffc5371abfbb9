"""The seconds of a step by what can hide them, table by table; and from these a bound on the step.

The planner's tables add up seconds, while a step overlaps. A timeline tells the step of one plan.
For all plans at once a *lower bound* is a sum over tables as well, so that the same solver proves
one. It follows from how the emitted module overlaps (`runtime/overlap.py`):

- A sum of a product over the ranks runs beside that product, but for its last piece.
- Parameters are gathered beside the rest of the forward pass, and once more, where copies are
  dropped, beside the backward pass.
- The gradient of an activation is moved beside gradients of weights, and nothing else.
- Gradients of parameters are reduced beside the rest of the backward pass; those of parameters
  that are read before the first product (embeddings) come last, when nothing is left to compute.
- Everything else that is sent is waited for, with nothing computed meanwhile.

So a step takes at least

    fixed + max(forward + max(products, pieces), pieces + gathered)
          + max(backward + max(late, moved), moved + reduced)

with the seconds of the kinds below. Each maximum is at least any weighted mean of its sides, and
for fixed weights that mean is a sum over tables. Its least value over all plans is a bound on the
step of every plan, whatever the weights are; the best weights are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.graph.graph import Node
from autoparallel.placement import Invariant, Layout, Partial, Placement, Shard
from autoparallel.rules.ops.contraction import LATE_PRODUCTS
from autoparallel.runtime.products import MOST_PIECES
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.cost_tables import sum_of_columns
from autoparallel.strategy.equal_axes import AxisGroups, places_that_differ
from autoparallel.strategy.redistribution import RedistributionTable
from autoparallel.strategy.zero_costs import zero_gradient_table
from planners import Factor, Problem, Variable

__all__ = ["Kind", "Means", "StepParts", "least_step"]

Array = NDArray[np.float64]


class Kind(IntEnum):
    """The kinds of seconds.

    FIXED: what nothing hides and what hides nothing. PRODUCTS: forward products that may be summed
    in pieces; PIECES: those sums, but for the last piece. BACKWARD: computing in the backward pass,
    but for LATE: gradients of weights, which wait for a gap. MOVED: moves of gradients of
    activations. REDUCED: reductions of gradients of parameters, and second gathers of parameters.
    FORWARD: all other computing in the forward pass. GATHERED: first gathers of parameters.
    """

    FIXED = 0
    PRODUCTS = 1
    PIECES = 2
    BACKWARD = 3
    LATE = 4
    MOVED = 5
    REDUCED = 6
    FORWARD = 7
    GATHERED = 8


# The tables of one variable or factor by kind; those that are left out are zero.
_Parts = tuple[tuple[Kind, Array], ...]


def least_step(seconds: Array) -> float:
    """Return the least that a step can take with these seconds, by kind.

    >>> least_step(np.array([1.0, 4.0, 2.0, 3.0, 2.0, 5.0, 1.0, 1.0, 4.0]))
    15.0
    """
    fixed, products, pieces, backward, late, moved, reduced, forward, gathered = map(float, seconds)
    ahead = max(forward + max(products, pieces), pieces + gathered)
    return fixed + ahead + max(backward + max(late, moved), moved + reduced)


@dataclass(frozen=True, slots=True)
class Means:
    """The weights of the means: how much the sides of the maxima count.

    computing: of products, against their pieces. hidden, exposed: of the backward pass where late
    gradients hide what is moved, and where they do not; what is left to 1 is that of sending alone.
    gathering: of gathering in the forward pass, against computing there.

    >>> Means(1.0, 1.0, 0.0, 0.0).weights.tolist()
    [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    """

    computing: float
    hidden: float
    exposed: float
    gathering: float

    @property
    def weights(self) -> Array:
        """The weight of each kind of seconds."""
        sending, forward = 1.0 - self.hidden - self.exposed, 1.0 - self.gathering
        return np.array(
            [
                1.0,
                forward * self.computing,
                forward * (1.0 - self.computing) + self.gathering,
                self.hidden + self.exposed,
                self.hidden,
                self.exposed + sending,
                sending,
                forward,
                self.gathering,
            ]
        )


class StepParts:
    """The tables of a network, taken apart by kind.

    variables: by name; those that are left out cost nothing by themselves. factors: parallel to the
    network's. Tables of calls and values that are alike are the same objects, as in the network.
    """

    def __init__(self, network: CostNetwork) -> None:
        self.network = network
        self.variables: dict[str, _Parts] = {}
        self._shared: dict[Any, _Parts] = {}
        self._edges: dict[tuple[int, bool, bool], _Parts] = {}
        graph = network.graph
        parameters = {node.result.name: node for node in graph.nodes if node.kind == "parameter"}
        self.late: set[str] = set()
        moves = False
        for node in graph.calls:
            moves |= any(
                graph.values[name].requires_grad and name not in parameters
                for name in node.operands()
            )
            # Before the first activation that has a gradient there is no gap.
            if moves and _is_late(node, parameters):
                self.late.add(node.name)
        self.first = _before_products(network)
        for node in graph.calls:
            self.variables[node.name] = self._of_call(node.name)
        for name, table in network.updates.items():
            self.variables[name] = self._once(("update", id(table)), table.cost)
        for name, table in network.copy_variables:
            value = name.removesuffix("*")
            edge = network.values.get(value) if name.endswith("*") else None
            # The variable of a value that no variable produces pays for its conversions itself.
            if edge is not None and table.cost.any():
                parts = self._of_edge(value, edge)
                self.variables[name] = tuple((kind, cost[0]) for kind, cost in parts)
        self.factors: list[_Parts | None] = []
        for factor, value in zip(network.factors, network.redistributed_value, strict=True):
            if value:
                self.factors.append(self._of_edge(value, network.values[value]))
            elif any(name.startswith("block:") for name in factor.scope):
                # What a block's mode adds is computed again in the backward pass.
                key = ("mode", id(factor.table))
                self.factors.append(self._once(key, factor.table, Kind.BACKWARD))
            else:
                # It says what cannot go together, and costs nothing.
                self.factors.append(None)

    def seconds(self, assignment: Mapping[str, int]) -> Array:
        """Return the seconds of each kind that an assignment takes."""
        totals = [0.0] * len(Kind)
        for name, parts in self.variables.items():
            state = assignment[name]
            for kind, table in parts:
                totals[kind] += float(table[state])
        for factor, several in zip(self.network.factors, self.factors, strict=True):
            if several:
                entry = tuple([assignment[name] for name in factor.scope])
                for kind, table in several:
                    totals[kind] += float(table[entry])
        return np.array(totals)

    def problem(self, problem: Problem, weights: Array) -> Problem:
        """Return the plain problem in which the seconds of each kind count as much as weights say.

        problem: of this network, with what pins and constraints forbid. With the weights of `Means`
        its optimum is a lower bound on the step of every plan.
        """
        made: dict[Any, Array] = {}

        def mean(parts: _Parts, shape: tuple[int, ...]) -> Array:
            key = (id(parts), shape)
            if key not in made:
                total = np.zeros(shape)
                for kind, table in parts:
                    if weights[kind]:
                        total = total + weights[kind] * table
                made[key] = total
            return made[key]

        variables = []
        for variable in problem.variables:
            parts = self.variables.get(variable.name, ())
            forbidden = np.isinf(variable.unary)
            unary = mean(parts, variable.unary.shape)
            if forbidden.any():
                key = (id(parts), forbidden.tobytes())
                if key not in made:
                    made[key] = np.where(forbidden, np.inf, unary)
                unary = made[key]
            variables.append(Variable(variable.name, unary))
        factors = []
        for factor, several in zip(problem.factors, self.factors, strict=True):
            table = factor.table if several is None else mean(several, factor.table.shape)
            factors.append(Factor(factor.scope, table))
        return Problem(tuple(variables), tuple(factors))

    def _once(self, key: Any, table: Array, kind: Kind = Kind.FIXED) -> _Parts:
        """Return a table of one kind, the same object for the same key."""
        if key not in self._shared:
            self._shared[key] = ((kind, table),)
        return self._shared[key]

    def _of_call(self, name: str) -> _Parts:
        """Return the seconds of a call in each state."""
        network = self.network
        costs, late, again = network.costs[name], name in self.late, network.repeats.get(name)
        first = name in self.first
        key = (id(costs), late, first, id(again.cost) if again else 0)
        if key in self._shared:
            return self._shared[key]
        forward = np.array([cost.forward for cost in costs])
        backward = np.array([cost.seconds for cost in costs]) - forward
        if late:
            # One product for either factor's gradient, as the timeline has it.
            late_half = backward / 2
            parts: _Parts = ((Kind.PRODUCTS, forward), (Kind.LATE, late_half))
            backward = backward - late_half
        else:
            parts = ((Kind.FORWARD, forward),)
        if again is not None:
            backward = backward + again.cost
        # What comes after the last product of the backward pass may hide the last reductions.
        if not first:
            parts = (*parts, (Kind.BACKWARD, backward))
        self._shared[key] = parts
        return parts

    def _of_edge(self, value: str, edge: RedistributionTable) -> _Parts:
        """Return the seconds of a value's conversions, parallel to the table `paid`."""
        network = self.network
        late = network.graph.producers[value].name in self.late
        first = any(node.name in self.first for node in network.graph.readers[value])
        key = (id(edge), late, first)
        if key in self._edges:
            return self._edges[key]
        targets = tuple(dict.fromkeys(target for group in edge.groups for target in group))
        layouts, stored = edge.produced.layouts, edge.produced.stored
        row = np.array([edge.routes.cells[layout] for layout in layouts])
        every = edge.routes.seconds(targets)[row]
        possible = np.isfinite(every)
        sent, written = edge.routes.sent_seconds(targets), edge.routes.copied_seconds(targets)
        ahead, back, copied, copied_back = (
            np.where(possible, seconds[row], 0.0) for seconds in (*sent, *written)
        )
        # Memory is written beside what is sent. Of the last ones it may be beside reductions, as of
        # calls.
        columns = {Kind.FORWARD: copied}
        if first:
            copied, copied_back = np.zeros_like(copied), np.zeros_like(copied)
        columns[Kind.BACKWARD] = copied_back
        forward = ahead
        gathered = _are_gathered(layouts, targets, network.edges.groups) if stored else None
        if gathered is not None:
            reduced = np.where(possible, edge.routes.reduced_seconds(targets)[row], 0.0)
            links, sizes, groups = network.edges.links, network.edges.sizes, network.edges.groups
            read = network.graph.values[value]
            zero = zero_gradient_table(read, stored, targets, links, sizes, groups)
            possible = possible & np.isfinite(zero)
            if groups:
                # Of paths in whatever order it is not known what is reduced: all may be.
                reduced = back
            scattered = np.maximum(back - reduced, 0.0)
            reduced = np.where(possible, (reduced + zero) * network.shares.once, 0.0)
            reduced = reduced + np.where(gathered, scattered, 0.0)
            forward = np.where(gathered, 0.0, ahead + scattered)
            columns[Kind.GATHERED] = np.where(gathered, ahead, 0.0)
            columns[Kind.REDUCED] = np.zeros_like(reduced) if first else reduced
            if first:
                forward = forward + reduced
        else:
            columns[Kind.MOVED] = back
            # What is returned is summed at once.
            if late and value not in network.graph.outputs:
                once = _sums_once(layouts, targets, network.edges.groups)
                columns[Kind.PIECES] = np.where(once, ahead * (1 - 1 / MOST_PIECES), 0.0)
                forward = ahead - columns[Kind.PIECES]
        columns[Kind.FIXED] = np.where(possible, forward, np.inf)
        parts: list[tuple[Kind, Array]] = []
        twice = {Kind.FIXED: ahead, Kind.BACKWARD: copied}
        if gathered is not None:
            twice = {
                Kind.FIXED: np.where(gathered, 0.0, ahead),
                Kind.REDUCED: np.where(gathered, ahead, 0.0),
                Kind.BACKWARD: copied,
            }
        for kind, seconds in columns.items():
            table = sum_of_columns(seconds, targets, edge.groups)
            if kind in twice and any(edge.again):
                both = table + sum_of_columns(twice[kind], targets, edge.groups)
                modes = [both if again else table for again in edge.again]
            else:
                modes = [table] * len(edge.again)
            table = modes[0] if len(modes) == 1 else np.stack(modes, axis=-1)
            if table.any():
                parts.append((kind, table))
        self._edges[key] = tuple(parts)
        return self._edges[key]


def _before_products(network: CostNetwork) -> frozenset[str]:
    """Return the calls before the first product: their backward pass comes last."""
    names = []
    for node in network.graph.calls:
        rule = network.rules[node.name]
        if rule is not None and rule.flops:
            break
        names.append(node.name)
    return frozenset(names)


def _is_late(node: Node, parameters: Mapping[str, Node]) -> bool:
    """Return whether a call may leave the gradient of its weight to a gap, under some plan.

    `rewrite/gaps.py` says when one does.
    """
    operands = node.operands()
    weight = parameters.get(operands[1]) if len(operands) > 1 else None
    return node.target in LATE_PRODUCTS and weight is not None and len(weight.result.shape) == 2


def _are_gathered(
    sources: tuple[Layout, ...], targets: tuple[Layout, ...], groups: AxisGroups = ()
) -> NDArray[np.bool_]:
    """Return, per source and target, whether parameters are gathered between them, and nothing
    that is sent between them is anything else. groups: of axes whose order is left open, if any.
    """
    axes = range(len(targets[0])) if targets else ()
    spread = tuple(groups) or tuple((axis,) for axis in axes)

    def counts(layout: Layout, kinds: tuple[type, ...]) -> list[int]:
        return [sum(isinstance(layout[axis], kinds) for axis in group) for group in spread]

    split = np.array([counts(source, (Shard,)) for source in sources])[:, None]
    joined = np.array([counts(target, (Shard,)) for target in targets])[None]
    sums = np.array([sum(counts(target, (Partial,))) > 0 for target in targets])[None]
    gathers: NDArray[np.bool_] = (split > joined).any(axis=-1) & ~sums
    return gathers


def _sums_once(
    sources: tuple[Layout, ...], targets: tuple[Layout, ...], groups: AxisGroups = ()
) -> NDArray[np.bool_]:
    """Return, per source and target, whether all between them is one sum on one axis, which may be
    made piece by piece. groups: of axes whose order is left open, if any: then it may be.
    """
    if groups:
        pending = np.array([Partial() in one for one in sources])
        return pending[:, None] & (places_that_differ(sources, targets, groups) == 1)
    numbers: dict[Placement, int] = {Partial(): 0, Invariant(): 1}

    def coded(layouts: tuple[Layout, ...]) -> NDArray[np.intp]:
        return np.array([[numbers.setdefault(p, len(numbers)) for p in row] for row in layouts])

    one, two = coded(sources)[:, None], coded(targets)[None]
    differs = one != two
    summed = differs & (one == 0) & (two == 1)
    once: NDArray[np.bool_] = (differs.sum(axis=-1) == 1) & summed.any(axis=-1)
    return once
