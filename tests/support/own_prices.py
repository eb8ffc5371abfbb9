"""The cost of a plan from its rows alone, as a second opinion on the planner's tables.

The plan's layouts are read op by op and step by step. Of the product only the formulas of one op,
of one collective and of one update are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoparallel.cost.collective_times import collective_seconds, together_seconds
from autoparallel.cost.hardware import Hardware, Link, find_hardware
from autoparallel.cost.op_costs import op_costs, update_seconds
from autoparallel.graph.graph import Graph, Value, hint
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.placement import (
    Collective,
    Invariant,
    Layout,
    Partial,
    Placement,
    Replicate,
    Shard,
    Step,
)
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan
from autoparallel.plan.kept_layouts import kept_layout
from autoparallel.rules.loop_splits import place, tile_of
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.rules.strategies import Strategy
from autoparallel.strategy.rule_matching import match_rules

__all__ = ["Priced", "price"]

# What a move of the value does, and what it does to the gradient, by kind of the two ends:
# a collective, "write" (the whole tensor once), or nothing. A gradient's move is that of the value
# with R and P exchanged and the ends swapped.
MOVES: Mapping[str, Any] = {
    "SI": Collective.ALL_GATHER,
    "SR": Collective.ALL_GATHER,
    "SS": Collective.ALL_TO_ALL,
    "PI": Collective.ALL_REDUCE,
    "PR": Collective.ALL_REDUCE,
    "PS": Collective.REDUCE_SCATTER,
    "SP": "write",
    "IP": "write",
    "RP": "write",
    "IR": None,
    "RI": None,
    "IS": None,
    "RS": None,
}
OPPOSITE = {"R": "P", "P": "R", "S": "S", "I": "I"}


@dataclass(frozen=True)
class Priced:
    """A Priced is the seconds of one step: of ops, conversions and the optimizer. rows: of each."""

    ops: float
    conversions: float
    updates: float
    rows: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """The sum of all of it."""
        return self.ops + self.conversions + self.updates


@dataclass(frozen=True)
class _Pricer:
    plan: Plan
    graph: Graph
    hardware: Hardware
    sizes: tuple[int, ...]
    links: tuple[Link, ...]

    def share(self, shape: tuple[Any, ...], layout: Layout, but: int = -1) -> float:
        """Return the largest part that a rank holds, as if axis `but` split nothing."""
        left = [hint(size) for size in shape]
        for axis, placement in enumerate(layout):
            if axis == but or not isinstance(placement, Shard):
                continue
            runs = left[placement.dim] // (placement.blocks * placement.unit)
            part = math.ceil(runs / self.sizes[axis])
            left[placement.dim] = part * placement.blocks * placement.unit
        return math.prod(left) / math.prod(hint(size) for size in shape)

    def move(self, kinds: str, nbytes: float, axis: int, together: bool = False) -> float:
        what = None if kinds[0] == kinds[1] != "S" else MOVES[kinds]
        if what is None or self.sizes[axis] == 1:
            return 0.0
        if what == "write":
            return nbytes / self.hardware.sustained_bytes_per_second
        seconds = together_seconds if together else collective_seconds
        return float(seconds(what, nbytes, self.links[axis], self.sizes[axis]))

    def conversion(self, row: Conversion, value: Value, parameter: ParameterChoice | None) -> float:
        """Count all steps of a conversion forward, again if they are repeated, and backward."""
        size = numel(value) * value.dtype.itemsize
        layout, ahead, back, leads = row.source, 0.0, 0.0, True
        for step in row.steps:
            assert layout[step.axis] == step.source
            sent = size * self.share(value.shape, layout, step.axis)
            one, two = kind(step.source), kind(step.target)
            # After a step of another kind, a gradient does not wait for those of others.
            leads = leads and (one, two) == ("I", "R")
            waits = parameter is not None and leads
            ahead += self.move(one + two, sent, step.axis)
            if row.requires_grad and not (waits and self.is_late(parameter, step)):
                back += self.move(OPPOSITE[two] + OPPOSITE[one], sent, step.axis, waits)
            elif row.requires_grad:
                assert parameter is not None
                at_end = parameter.gradient == parameter.storage
                back += self.move("PS", self.across(parameter, value, step.axis), step.axis, at_end)
            layout = (*layout[: step.axis], step.target, *layout[step.axis + 1 :])
        assert layout == row.target, row
        twice = row.again or self.is_run_again(row)
        return ahead * (2 if twice else 1) + back

    def is_late(self, parameter: ParameterChoice | None, step: Step) -> bool:
        return parameter is not None and parameter.state[step.axis] != parameter.storage[step.axis]

    def is_run_again(self, row: Conversion) -> bool:
        """True if all readers of the value, in any layout, are in one group that is recomputed."""
        if row.value in self.graph.outputs:
            return False
        readers = {node.name for node in self.graph.readers[row.value]}
        return any(readers <= set(group) for group in self.plan.recomputed)

    def op(self, op: OpChoice, call: OpCall, rule: ShardingRule | None) -> float:
        """Count an op's forward and backward, and the forward once more if it is recomputed."""
        parts = [self.strategy(op, call, rule, axis) for axis in range(len(self.sizes))]
        axes = tuple(zip(self.sizes, self.links, strict=True))
        (cost,) = op_costs(call, rule, [tuple(parts)], axes, self.hardware)
        again = any(op.name in group for group in (*self.plan.recomputed, self.plan.remade))
        return cost.product + cost.traffic + cost.communication + (cost.forward if again else 0.0)

    def strategy(
        self, op: OpChoice, call: OpCall, rule: ShardingRule | None, axis: int
    ) -> Strategy:
        """Return the one loop whose split gives all the op's placements on an axis, if it is."""
        operands = tuple(layout[axis] for layout in op.operands)
        results = tuple(layout[axis] for layout in op.results)
        placed = list(zip((*operands, *results), tensors(rule), strict=True)) if rule else []
        shards = [(p, dims) for p, dims in placed if isinstance(p, Shard)]
        if not shards:
            assert not op.kernels or not op.kernels[axis], op
            return Strategy(operands, results)
        assert rule is not None
        count = self.sizes[axis]
        tile = tile_of(rule, shards[0][1], shards[0][0], count)
        assert tile is not None, op
        name = op.kernels[axis] if op.kernels else ""
        kernel, tiles = rule.kernels.get(tile.loop), [tile]
        exchange = rule.exchanges.get(tile.loop)
        if exchange is not None and exchange.kernel.name == name:
            # A second loop is split on the same ranks, of tensors that the first one does not cut.
            kernel = exchange.kernel
            others = (tile_of(rule, dims, shard, count) for shard, dims in shards)
            tiles += [each for each in others if each and each.loop in exchange.loops][:1]
            assert len(tiles) == 2, op
        assert (kernel.name if kernel else "") == name, op
        for placement, dims in placed:
            places = (place(rule, dims, each, count) for each in tiles)
            expected = next((each for each in places if each is not None), None)
            assert expected == (placement if isinstance(placement, Shard) else None), (op, tile)
        runs = hint(rule.sizes[tile.loop]) // (tile.blocks * tile.unit)
        second = tiles[1].loop if len(tiles) > 1 else ""
        return Strategy(operands, results, tile, math.ceil(runs / count) / runs, kernel, second)

    def update(self, row: ParameterChoice, value: Value) -> float:
        """Count the optimizer's work, and the gathering of parameters that it updated in parts."""
        if not value.requires_grad:
            return 0.0
        own = row.nbytes * self.share(value.shape, row.state)
        itemsize = value.dtype.itemsize
        numbers = {"sgd": 0, "momentum": 1, "adam": 2, "mixed_adam": 2}[self.plan.options.optimizer]
        state = own * numbers
        if self.plan.options.optimizer == "mixed_adam" and itemsize < 4:
            state = own / itemsize * (4 + 4 + 4)
        seconds = float(update_seconds(own, own, state, self.hardware))
        for axis, (stored, updated) in enumerate(zip(row.storage, row.state, strict=True)):
            if stored != updated:
                seconds += self.move("SI", self.across(row, value, axis), axis)
        # Parts that torch cannot store as they are used are exchanged, and so are their gradients.
        kept = kept_layout(row.state, tuple(map(hint, value.shape)), self.sizes)
        for axis, (late, early) in enumerate(zip(kept, row.state, strict=True)):
            if late != early:
                sent = row.nbytes * self.share(value.shape, row.state, axis)
                seconds += 2 * self.move("SS", sent, axis, together=True)
        return seconds

    def across(self, row: ParameterChoice, value: Value, axis: int) -> float:
        """Return the bytes of a gradient when it is reduced over an axis, after the outer axes."""
        layout = (*row.state[:axis], Invariant(), *row.storage[axis + 1 :])
        return row.nbytes * self.share(value.shape, layout)


def kind(placement: Placement) -> str:
    """Return a placement's letter."""
    return {Invariant: "I", Replicate: "R", Partial: "P", Shard: "S"}[type(placement)]


def numel(value: Value) -> int:
    """Return the number of elements of the whole value, for the sizes planned for."""
    return math.prod(hint(size) for size in value.shape)


def tensors(rule: ShardingRule) -> tuple[Any, ...]:
    """Return the dims of all operands and results."""
    return (*rule.operands, *rule.results)


def price(plan: Plan) -> Priced:
    """Count the plan's seconds anew. Raises AssertionError for a plan that contradicts itself."""
    assert plan.captured is not None
    graph = with_larger_hints(plan.captured, plan.options.tokens)
    hardware = find_hardware(plan.hardware).at_pace_of(plan.world_size)
    sizes = tuple(size for _, size in plan.mesh.axes)
    pricer = _Pricer(plan, graph, hardware, sizes, hardware.links(sizes))
    kinds = match_rules(graph, inert_calls(graph), plan.options, plan.world_size)
    rows: dict[str, float] = {}
    made: dict[str, Layout] = {}
    parameters = {row.name: row for row in plan.parameters}
    whole = (Invariant(),) * len(sizes)
    for node in graph.nodes:
        if node.kind == "parameter":
            made[node.result.name] = parameters[node.name].storage
            rows[f"update {node.name}"] = pricer.update(parameters[node.name], node.result)
        elif node.kind != "call":
            made[node.result.name] = whole
    updates = sum(rows.values())
    assert [op.name for op in plan.ops] == [node.name for node in graph.calls]
    known = {(row.value, row.target): row for row in plan.conversions}
    assert len(known) == len(plan.conversions)
    used: set[tuple[str, Layout]] = set()
    for op in plan.ops:
        for name, layout in zip(op.reads, op.operands, strict=True):
            if layout != made[name]:
                assert known[name, layout].source == made[name]
                used.add((name, layout))
        rows[op.name] = pricer.op(op, kinds[op.name].call, kinds[op.name].rule)
        made.update(zip(op.makes, op.results, strict=True))
    ops = sum(rows.values()) - updates
    for name, layout in zip(graph.outputs, plan.outputs, strict=True):
        if layout != made[name]:
            used.add((name, layout))
    used |= {(name, whole) for _, name in graph.mutations if made[name] != whole}
    assert used == set(known), "a plan converts what is read otherwise than it is made, no more"
    for (name, target), row in known.items():
        node = graph.producers[name]
        rows[f"{name} -> {target}"] = pricer.conversion(
            row, graph.values[name], parameters.get(node.name)
        )
    return Priced(ops, sum(rows.values()) - updates - ops, updates, rows)
