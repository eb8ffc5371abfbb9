"""From a graph to a cost network, and from its solution to choices: strategies become states.

One variable per op (its strategies), one per parameter (how it is stored), one per value that
several ops read (the set of placements that it is converted to, each once), one per returned value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch

from autoparallel.cost.collectives import conversion_seconds
from autoparallel.cost.compute import OpCost, nbytes, op_cost, update_seconds
from autoparallel.cost.hardware import Hardware
from autoparallel.errors import PlanError, UnsupportedOpError
from autoparallel.graph.graph import Graph, Node, Ref, Value, map_leaves
from autoparallel.options import Options
from autoparallel.placement import (
    Invariant,
    Movement,
    Placement,
    Shard,
    gradient,
    local_size,
    movement,
)
from autoparallel.rules.registry import find_rule
from autoparallel.rules.rule import OpCall, ShardingRule, Strategy, strategies
from autoparallel.rules.unknown import find_unknown
from autoparallel.tiling import Tiling, inert_calls, weight_values
from planners import Factor, Problem, Variable

__all__ = ["Network", "build_network", "reduced_together"]

INVARIANT = Invariant()
_MOST_TARGETS = 3


@dataclass(frozen=True)
class _Kind:
    """What all calls of one signature share: rule, and everything derived from it."""

    call: OpCall
    rule: ShardingRule | None


@dataclass
class Network:
    """The problem of one graph, and what its states mean.

    strategies: per call node. storages: per parameter node. outputs: per returned value.
    costs: per call node, per strategy, what it takes. rules: per call node. weights: values that
    come from parameters alone.
    """

    graph: Graph
    world_size: int
    hardware: Hardware
    options: Options
    strategies: dict[str, tuple[Strategy, ...]] = field(default_factory=dict)
    storages: dict[str, tuple[Placement, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[Placement, ...]] = field(default_factory=dict)
    costs: dict[str, tuple[OpCost, ...]] = field(default_factory=dict)
    factors: list[Factor] = field(default_factory=list)
    fans: list[tuple[str, np.ndarray]] = field(default_factory=list)
    updates: dict[str, np.ndarray] = field(default_factory=dict)
    rules: dict[str, ShardingRule | None] = field(default_factory=dict)
    weights: frozenset[str] = frozenset()

    def problem(self, product_weight: float = 1.0, pins: Mapping[str, Placement] = {}) -> Problem:
        """The numbers. product_weight: what a second of matrix products counts.

        pins: storage of parameters (by node name) that is given. Raises PlanError for a pin that
        the parameter cannot take.
        """
        interned: dict[tuple[Any, ...], np.ndarray] = {}
        variables: list[Variable] = []
        for name, choices in self.storages.items():
            unary = self.updates[name]
            if name in pins:
                if pins[name] not in choices:
                    raise PlanError(
                        f"parameter {name} cannot be stored as {pins[name]}",
                        why=f"it can be {', '.join(map(str, choices))}",
                    )
                allowed = np.array([choice == pins[name] for choice in choices])
                unary = np.where(allowed, unary, np.inf)
            variables.append(Variable(name, unary))
        for name, costs in self.costs.items():
            key = tuple(self.priced(cost, product_weight) for cost in costs)
            unary = interned.setdefault(key, np.array(key))
            variables.append(Variable(name, unary))
        for name, choices in self.outputs.items():
            key = (0.0,) * len(choices)
            variables.append(Variable(f"return:{name}", interned.setdefault(key, np.array(key))))
        for name, unary in self.fans:
            variables.append(Variable(name, unary))
        return Problem(tuple(variables), tuple(self.factors))

    def priced(self, cost: OpCost, product_weight: float) -> float:
        """What an op counts in the objective.

        Without sequence parallelism all but the products counts as done whole, so that only they
        are worth splitting and activations stay whole between them.
        """
        spread = self.options.sequence_parallel or self.options.data_parallel
        traffic = cost.traffic if spread else cost.whole_traffic
        return product_weight * cost.product + traffic + cost.communication


def build_network(
    graph: Graph,
    world_size: int,
    hardware: Hardware,
    options: Options,
    stored: Mapping[str, Placement] | None = None,
    whole_outputs: bool = False,
) -> Network:
    """All strategies, and what they cost with their neighbours.

    stored: placements that parameters (by path) have already, which they keep. whole_outputs:
    whether all that is returned must be whole.
    Raises UnsupportedOpError that lists every differentiable op without a rule.
    """
    builder = _Builder(graph, world_size, hardware, options, stored or {}, whole_outputs)
    return builder.build()


class _Builder:
    def __init__(
        self,
        graph: Graph,
        world_size: int,
        hardware: Hardware,
        options: Options,
        stored: Mapping[str, Placement],
        whole_outputs: bool,
    ) -> None:
        self.graph, self.world_size, self.whole_outputs = graph, world_size, whole_outputs
        self.hardware, self.options, self.stored = hardware, options, stored
        self.network = Network(graph, world_size, hardware, options)
        self.kinds: dict[str, _Kind] = {}
        self.weights = weight_values(graph)
        self.network.weights = frozenset(self.weights)
        self.inert = inert_calls(graph)
        self.together = reduced_together(graph)
        self.tables: dict[Any, np.ndarray] = {}
        self.reads = {node.name: node.operands() for node in graph.calls}

    def build(self) -> Network:
        self.find_rules()
        rules = {
            name: None if name in self.inert else kind.rule for name, kind in self.kinds.items()
        }
        self.tiling = Tiling(self.graph, rules, self.weights, self.options, self.world_size)
        shared: dict[Any, tuple[tuple[Strategy, ...], tuple[OpCost, ...]]] = {}
        for node in self.graph.calls:
            kind = self.kinds[node.name]
            key = (id(kind), tuple(self.tiling.tiles.get(node.name, ())))
            if key not in shared:
                choices = self.strategies(node, kind)
                shared[key] = (
                    choices,
                    tuple(
                        op_cost(kind.call, kind.rule, choice, self.hardware, self.world_size)
                        for choice in choices
                    ),
                )
            self.network.strategies[node.name], self.network.costs[node.name] = shared[key]
            self.network.rules[node.name] = kind.rule
        for node in self.graph.nodes:
            if node.kind == "parameter":
                self.store(node)
        self.returns()
        self.connect()
        return self.network

    def find_rules(self) -> None:
        """One rule per distinct call; every op without one, all at once."""
        known: dict[Any, _Kind] = {}
        missing: dict[str, list[Node]] = {}
        reasons: dict[str, str] = {}
        values = self.graph.values

        def shape_of(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                value = values[leaf.name]
                return (value.shape, value.dtype, value.requires_grad)
            return (type(leaf).__name__, leaf)

        for node in self.graph.calls:
            names = self.reads[node.name]
            twins = tuple(names.index(name) for name in names)
            key = (
                node.target,
                map_leaves(shape_of, node.args),
                map_leaves(shape_of, node.kwargs),
                tuple(result.shape for result in node.results),
                twins,
                node.name in self.inert,
            )
            if key not in known:
                call = OpCall(node, tuple(values[name] for name in names))
                made = None
                author = find_rule(node.target)
                if author is not None and node.name not in self.inert:
                    made = author(call)
                if author is None and self.world_size > 1:
                    made, why = self.unwritten(call)
                    grad = any(result.requires_grad for result in node.results)
                    if made is None and (grad or _draws(node.target)):
                        missing.setdefault(node.target, []).append(node)
                        reasons.setdefault(node.target, why)
                known[key] = _Kind(call, made)
            elif node.target in missing:
                missing[node.target].append(node)
            self.kinds[node.name] = known[key]
        if self.options.unknown_ops == "replicate":
            missing = {target: nodes for target, nodes in missing.items() if _draws(target)}
        if missing:
            raise _unsupported(missing, reasons)

    def unwritten(self, call: OpCall) -> tuple[ShardingRule | None, str]:
        """The rule of a call whose op has none, if it is to be discovered and can be."""
        if self.options.unknown_ops != "discover" or call.node.name in self.inert:
            return None, ""
        return find_unknown(call)

    def strategies(self, node: Node, kind: _Kind) -> tuple[Strategy, ...]:
        operands = tuple(operand.requires_grad for operand in kind.call.operands)
        results = tuple(result.requires_grad for result in kind.call.results)
        rule = kind.rule
        if rule is None:
            rule = ShardingRule(((),) * len(operands), ((),) * len(results), {})
            if node.name in self.inert:
                operands = (False,) * len(operands)
        return strategies(
            rule, self.tiling.tiles.get(node.name, ()), operands, results, self.world_size
        )

    def store(self, node: Node) -> None:
        """How one parameter may be stored, and what its update costs."""
        value = node.result
        choices: tuple[Placement, ...] = (INVARIANT,)
        if node.target in self.stored:
            choices = (self.stored[node.target],)
        elif value.requires_grad or self.tiling.shards[value.name]:
            choices = (INVARIANT, *self.tiling.shards[value.name])
        costs = []
        for choice in choices:
            fraction = 1.0
            if isinstance(choice, Shard):
                size = value.shape[choice.dim]
                assert isinstance(size, int)
                fraction = local_size(size, choice, self.world_size) / size
            local = nbytes(value) * fraction
            seconds = update_seconds(local, local, 2 * local, self.hardware)
            costs.append(seconds if value.requires_grad else 0.0)
        self.network.storages[node.name] = choices
        self.network.updates[node.name] = self.intern(tuple(costs))

    def returns(self) -> None:
        """How a value may be returned: whole; beside a loss, also split as it is."""
        values = [self.graph.values[name] for name in self.graph.outputs]
        has_loss = any(not value.shape and value.requires_grad for value in values)
        for value in values:
            choices: tuple[Placement, ...] = (INVARIANT,)
            if has_loss and value.shape and not self.whole_outputs:
                plain = [s for s in self.tiling.shards[value.name] if s.blocks == 1 and s.unit == 1]
                choices = (INVARIANT, *plain)
            self.network.outputs[value.name] = choices

    def intern(self, key: tuple[float, ...]) -> np.ndarray:
        return self.tables.setdefault(key, np.array(key))

    def made(self, name: str) -> tuple[str | None, tuple[Placement, ...]]:
        """The variable that decides how a value is made, and the placement in each state."""
        node = self.graph.producers[name]
        if node.kind == "call":
            at = [value.name for value in node.results].index(name)
            states = self.network.strategies[node.name]
            return node.name, tuple(strategy.results[at] for strategy in states)
        if node.kind == "parameter":
            return node.name, self.network.storages[node.name]
        return None, (INVARIANT,)

    def needs(self, name: str) -> list[tuple[str, tuple[tuple[Placement, ...], ...]]]:
        """Per reading variable and state, the placements in which it reads the value."""
        found: list[tuple[str, tuple[tuple[Placement, ...], ...]]] = []
        for node in self.graph.readers[name]:
            at = [i for i, operand in enumerate(self.reads[node.name]) if operand == name]
            states = self.network.strategies[node.name]
            found.append(
                (
                    node.name,
                    tuple(
                        tuple(dict.fromkeys(strategy.operands[i] for i in at))
                        for strategy in states
                    ),
                )
            )
        if name in self.network.outputs:
            choices = self.network.outputs[name]
            found.append((f"return:{name}", tuple((choice,) for choice in choices)))
        for _, written in self.graph.mutations:
            if written == name:
                found.append(("", ((INVARIANT,),)))
        return found

    def connect(self) -> None:
        """Conversion tables between what is made and what is read."""
        for name, value in self.graph.values.items():
            needs = self.needs(name)
            if not needs:
                continue
            variable, made = self.made(name)
            targets = tuple(
                dict.fromkeys(target for _, states in needs for need in states for target in need)
            )
            costs = self.conversions(value, made, targets)
            if not costs.any():
                continue
            if len(needs) == 1:
                reader, states = needs[0]
                self.couple(variable, reader, self.paid(costs, targets, states))
                continue
            most = min(len(needs), len(targets), _MOST_TARGETS)
            sets = self.target_sets(needs, targets, most)
            fan = f"{name}*"
            paid = self.paid(costs, targets, sets)
            if variable is None:
                self.network.fans.append((fan, paid[0]))
            else:
                self.network.fans.append((fan, self.intern((0.0,) * len(sets))))
                self.couple(variable, fan, paid)
            for reader, states in needs:
                self.couple(fan, reader, self.offers(sets, states))

    def target_sets(
        self,
        needs: list[tuple[str, tuple[tuple[Placement, ...], ...]]],
        targets: tuple[Placement, ...],
        most: int,
    ) -> tuple[tuple[Placement, ...], ...]:
        """Sets of placements that a value may be converted to, the smallest first."""
        largest = max(len(need) for _, states in needs for need in states)
        counts = range(1, max(most, largest) + 1)
        return tuple(group for count in counts for group in combinations(targets, count))

    def conversions(
        self, value: Value, made: tuple[Placement, ...], targets: tuple[Placement, ...]
    ) -> np.ndarray:
        """Seconds from every placement made to every target; infinite where forbidden."""
        weight = value.name in self.weights
        grad = value.requires_grad
        together = value.name in self.together
        key = ("c", nbytes(value), grad, weight, together, made, targets)
        if key not in self.tables:
            self.tables[key] = np.array(
                [[self.convert(value, one, two, weight) for two in targets] for one in made]
            )
        return self.tables[key]

    def convert(self, value: Value, one: Placement, two: Placement, weight: bool) -> float:
        if one == two:
            return 0.0
        options = self.options
        move = movement(one, two)
        back = movement(gradient(two), gradient(one)) if value.requires_grad else Movement.NONE
        if Movement.REDUCE_SCATTER in (move, back) and not (
            options.sequence_parallel or options.data_parallel
        ):
            return np.inf
        if weight and not options.data_parallel:
            matrix = sum(size != 1 for size in value.shape) > 1
            if matrix or move not in (Movement.NONE, Movement.KEEP_ON_FIRST):
                return np.inf
        return conversion_seconds(
            one,
            two,
            nbytes(value),
            value.requires_grad,
            self.hardware,
            self.world_size,
            together=value.name in self.together,
        )

    def paid(
        self,
        costs: np.ndarray,
        targets: tuple[Placement, ...],
        states: tuple[tuple[Placement, ...], ...],
    ) -> np.ndarray:
        """table[made, state]: every placement in the state's set is paid once."""
        key = ("p", id(costs), targets, states)
        if key not in self.tables:
            place_of = {target: index for index, target in enumerate(targets)}
            columns = [
                costs[:, [place_of[target] for target in state]].sum(axis=1) for state in states
            ]
            self.tables[key] = np.stack(columns, axis=1)
        return self.tables[key]

    def offers(
        self,
        sets: tuple[tuple[Placement, ...], ...],
        states: tuple[tuple[Placement, ...], ...],
    ) -> np.ndarray:
        """table[set, state]: zero where the set holds all that the state reads."""
        key = ("o", sets, states)
        if key not in self.tables:
            self.tables[key] = np.array(
                [[0.0 if set(need) <= set(group) else np.inf for need in states] for group in sets]
            )
        return self.tables[key]

    def couple(self, first: str | None, second: str, table: np.ndarray) -> None:
        """A factor, folded into a fan's own costs where one side has no variable."""
        if first is None and not second:
            return
        if first is None:
            self.network.fans.append((f"{second}+{len(self.network.fans)}", np.zeros(1)))
            self.network.factors.append(Factor((self.network.fans[-1][0], second), table[:1]))
        elif not second:
            self.network.fans.append((f"{first}+{len(self.network.fans)}", np.zeros(1)))
            self.network.factors.append(Factor((first, self.network.fans[-1][0]), table))
        elif table.any():
            self.network.factors.append(Factor((first, second), table))


def _draws(target: str) -> bool:
    """Whether an op draws numbers of its own, which every rank would draw differently."""
    packet, _, overload = target.removeprefix("aten.").partition(".")
    op = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    return op is not None and torch.Tag.nondeterministic_seeded in op.tags


def reduced_together(graph: Graph) -> frozenset[str]:
    """Parameters whose gradients, where they are to be summed over ranks, can wait for the end.

    Those are all: nothing in the backward pass reads a parameter's gradient.
    """
    return frozenset(node.result.name for node in graph.nodes if node.kind == "parameter")


def _unsupported(
    missing: Mapping[str, list[Node]], reasons: Mapping[str, str]
) -> UnsupportedOpError:
    rows = []
    for target, nodes in sorted(missing.items()):
        first = nodes[0]
        place_text = ", ".join(text for text in (first.where, first.line) if text)
        rows.append(f"{target}, {len(nodes)} calls, first in {place_text or 'the model'}")
    why = [f"{target}: {reasons[target]}" for target in sorted(missing) if reasons[target]]
    if len(why) < len(missing):
        why.append(
            "a gradient flows through these ops, or they draw random numbers, and how they may be "
            "split, or drawn alike on all ranks, is not known"
        )
    discovered = ", and none could be discovered" if any(reasons.values()) else ""
    return UnsupportedOpError(
        f"no sharding rule for {', '.join(sorted(missing))}{discovered}",
        where="\n".join(rows),
        why="\n".join(why),
        fix="register a rule (autoparallel.rules.registry.rule), or pass unknown_ops='replicate' "
        "to keep their tensors whole",
    )
