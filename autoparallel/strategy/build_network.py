"""From a graph to its cost network: strategies become states, and what joins them tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.hardware import Hardware
from autoparallel.cost.op_costs import OpCost, nbytes, op_costs, update_seconds
from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout, Placement, whole_layout
from autoparallel.rules.rule import ShardingRule, Strategy, strategies
from autoparallel.strategy.candidate_splits import CandidateSplits, inert_calls, weight_values
from autoparallel.strategy.cost_network import CostNetwork, reduced_together
from autoparallel.strategy.mesh_strategies import MeshStrategy, is_nested, joint_strategies
from autoparallel.strategy.parameter_storage import ParameterStorage, storage_choices, stored_bytes
from autoparallel.strategy.recompute_modes import Recomputation
from autoparallel.strategy.redistribution import (
    ProducerLayouts,
    ReaderLayouts,
    RecomputedEnds,
    RedistributionTables,
    Table,
)
from autoparallel.strategy.rule_matching import MatchedCall, match_rules
from autoparallel.strategy.saved_activations import SavedActivations
from autoparallel.strategy.zero_costs import update_gather_seconds
from planners import Alternative, Factor

__all__ = ["build_network", "rebuilt"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Choices:
    """The states of all calls that are alike. made: by result. usage: bytes that the op keeps for
    the backward pass by itself."""

    joints: tuple[MeshStrategy, ...]
    costs: tuple[OpCost, ...]
    made: tuple[ProducerLayouts, ...]
    usage: Array | None = None


def build_network(
    graph: Graph,
    mesh: Mesh,
    hardware: Hardware,
    options: Options,
    stored: Mapping[str, Layout] | None = None,
    whole_outputs: bool = False,
) -> CostNetwork:
    """All strategies, and what they cost with their neighbours.

    stored: layouts that parameters (by path) have already, which they keep. whole_outputs:
    whether all that is returned must be whole.
    Raises UnsupportedOpError that lists every differentiable op without a rule.
    """
    builder = _Builder(graph, mesh, hardware, options, stored or {}, whole_outputs)
    return builder.build()


def rebuilt(
    network: CostNetwork, options: Options | None = None, mesh: Mesh | None = None
) -> CostNetwork:
    """The network of the same graph under other options, or on another mesh."""
    return build_network(
        network.graph,
        mesh or network.mesh,
        network.hardware,
        options or network.options,
        network.stored,
        network.whole_outputs,
    )


class _Builder:
    def __init__(
        self,
        graph: Graph,
        mesh: Mesh,
        hardware: Hardware,
        options: Options,
        stored: Mapping[str, Layout],
        whole_outputs: bool,
    ) -> None:
        self.graph, self.mesh, self.whole_outputs = graph, mesh, whole_outputs
        self.options, self.stored = options, stored
        self.pace = hardware.at_pace_of(mesh.world_size)
        self.sizes = tuple(size for _, size in mesh.axes)
        self.links = hardware.links(self.sizes)
        memory = options.memory_limit is not None
        self.edges = RedistributionTables(self.sizes, self.links, self.pace, options, memory)
        self.network = CostNetwork(
            graph, mesh, hardware, options, self.edges, stored, whole_outputs
        )
        self.invariant = whole_layout(len(self.sizes))
        self.weights = weight_values(graph)
        self.network.weights = frozenset(self.weights)
        self.inert = inert_calls(graph)
        self.together = reduced_together(graph)
        self.kept: SavedActivations | None = None
        self.tables: dict[Any, Any] = {}
        self.choices: dict[str, _Choices] = {}
        self.reads = {node.name: node.operands() for node in graph.calls}

    def build(self) -> CostNetwork:
        self.kinds = match_rules(self.graph, self.inert, self.options, self.mesh.world_size)
        rules = {
            name: None if name in self.inert else kind.rule for name, kind in self.kinds.items()
        }
        # Where states are pairs and triples, those that no product asks for are left out.
        several = sum(size > 1 for size in self.sizes) > 1
        tilings = {
            size: CandidateSplits(self.graph, rules, self.weights, self.options, size, several)
            for size in dict.fromkeys(self.sizes)
        }
        if self.options.memory_limit is not None:
            self.kept = SavedActivations(self.graph, rules)
        self.recomputation = self.network.recomputation = Recomputation(
            self.graph, rules, self.network.weights, self.options.recompute
        )
        self.tilings = [tilings[size] for size in self.sizes]
        if self.kept is not None:
            peak_call, freed = self.kept.peak_call(self.mesh.world_size, self.recomputation.place)
            given = (node for node in self.graph.nodes if node.kind in ("input", "constant"))
            self.network.peak_call = peak_call
            self.network.fixed_nbytes = sum(nbytes(node.result) for node in given) - freed
        shared: dict[Any, _Choices] = {}
        for node in self.graph.calls:
            kind = self.kinds[node.name]
            tiles = tuple(tuple(tiling.tiles.get(node.name, ())) for tiling in tilings.values())
            key: tuple[Any, ...] = (id(kind), tiles)
            if self.kept is not None:
                key = (*key, self.kept.of(node.name), self.kept.own(node))
            if key not in shared:
                shared[key] = self.choose(node, kind)
            chosen = self.choices[node.name] = shared[key]
            self.network.strategies[node.name] = chosen.joints
            self.network.costs[node.name] = chosen.costs
            if chosen.usage is not None:
                self.network.usage[node.name] = chosen.usage
            if node.name == self.network.peak_call:
                self.network.usage[node.name] = self.peak_call(node, chosen)
            self.network.rules[node.name] = kind.rule
            if self.kept is not None:
                reads = node.operands()
                self.network.saved_for_backward[node.name] = tuple(
                    self.kept.is_kept(node, tuple(i for i, own in enumerate(reads) if own == name))
                    for name in reads
                )
        for node in self.graph.nodes:
            if node.kind == "parameter":
                self.store(node)
        self.returns()
        self.repeat()
        self.connect()
        return self.network

    def repeat(self) -> None:
        """What it takes to run ops again, by the mode of their block, and what they then keep."""
        blocks = self.recomputation
        for block, modes in enumerate(blocks.modes):
            if len(modes) > 1:
                self.network.copy_variables.append(
                    (blocks.variable(block), Table(self.zeros(len(modes))))
                )
        for node in self.graph.calls:
            own = blocks.block_of(node.name)
            if own is None:
                continue
            inside = np.array(blocks.inside(node.name, own))
            choices = self.choices[node.name]
            if not inside.any():
                continue

            def table(choices: _Choices = choices, inside: Any = inside) -> Table:
                forward = np.array([cost.forward for cost in choices.costs])
                cost = np.where(inside, forward[:, None], 0.0)
                if choices.usage is None:
                    return Table(cost)
                return Table(cost, np.where(inside, -choices.usage[:, None], 0.0))

            made = self.shared(("repeat", id(choices), tuple(inside)), table)
            if len(inside) > 1:
                self.couple(node.name, blocks.variable(own), made, "")
            else:
                self.network.repeats[node.name] = Table(
                    made.cost[:, 0], None if made.usage is None else made.usage[:, 0]
                )

    def modes(
        self, name: str, needs: list[tuple[str, ReaderLayouts]]
    ) -> tuple[int | None, tuple[RecomputedEnds, ...]]:
        """The block whose mode decides who of a value's maker and readers is run again; and who.

        Where readers belong to several blocks, what they read counts as kept.
        """
        blocks = self.recomputation
        places = [blocks.block_of(reader) for reader, _ in needs]
        made_by = self.graph.producers[name].name
        maker = blocks.block_of(made_by)
        block = places[0] if len(set(places)) == 1 else None
        if block is None:
            block = maker
        if block is None:
            return None, ()
        own = maker == block
        outside = (False,) * len(blocks.modes[block])
        inside = [
            blocks.inside(reader, block) if place == block else outside
            for (reader, _), place in zip(needs, places, strict=True)
        ]
        return block, tuple(
            RecomputedEnds(
                own and blocks.inside(made_by, block)[mode],
                tuple(one[mode] for one in inside),
                apart=maker is not None and not own,
            )
            for mode in range(len(blocks.modes[block]))
        )

    def choose(self, node: Node, kind: MatchedCall) -> _Choices:
        """The states of one call: its joint strategies, and what they cost."""
        call = kind.call
        operands = tuple(operand.requires_grad for operand in call.operands)
        results = tuple(result.requires_grad for result in call.results)
        rule = kind.rule
        if rule is None:
            rule = ShardingRule(((),) * len(operands), ((),) * len(results), {})
            if node.name in self.inert:
                operands = (False,) * len(operands)
        alone: dict[int, tuple[Strategy, ...]] = {}
        for size, tiling in zip(self.sizes, self.tilings, strict=True):
            if size not in alone:
                tiles = tiling.tiles.get(node.name, ())
                alone[size] = strategies(rule, tiles, operands, results, size)
        shapes = [value.shape for value in (*call.operands, *call.results)]
        joints = joint_strategies(rule, [alone[size] for size in self.sizes], shapes, self.sizes)
        axes = tuple(zip(self.sizes, self.links, strict=True))
        costs = op_costs(call, kind.rule, [joint.parts for joint in joints], axes, self.pace)
        held = self.kept.own(node) if self.kept else (False,) * len(results)
        made = tuple(
            ProducerLayouts(tuple(joint.results[at] for joint in joints), counted=held[at])
            for at in range(len(results))
        )
        usage = None
        if self.kept is not None:
            usage = np.array([self.kept.nbytes(node, joint, self.sizes) for joint in joints])
        return _Choices(joints, costs, made, usage)

    def peak_call(self, node: Node, chosen: _Choices) -> Array:
        """What a call keeps and, where its backward begins, the gradients that are there."""
        assert self.kept is not None
        assert chosen.usage is not None
        gradients = [self.kept.gradient_nbytes(node, joint, self.sizes) for joint in chosen.joints]
        return chosen.usage + np.array(gradients)

    def store(self, node: Node) -> None:
        """How one parameter may be stored, and what its update costs."""
        value = node.result
        if node.target in self.stored:
            choices: tuple[ParameterStorage, ...] = (
                ParameterStorage.as_used(self.stored[node.target]),
            )
        else:
            shards = tuple(
                tuple(tiling.shards[value.name]) if size > 1 else ()
                for size, tiling in zip(self.sizes, self.tilings, strict=True)
            )
            key = ("store", value.shape, value.dtype, value.requires_grad, shards)
            if key not in self.tables:
                free = self.options.data_parallel
                self.tables[key] = storage_choices(
                    value, shards, self.sizes, free, free and self.edges.memory
                )
            choices = self.tables[key]
        self.network.storages[node.name] = choices
        priced = ("update", value.shape, value.dtype, value.requires_grad, choices)
        if priced not in self.tables:
            costs, usage = [], []
            for choice in choices:
                parts = stored_bytes(value, choice, self.sizes, self.options.optimizer)
                own = nbytes(value) * layout_fraction(value.shape, choice.state, self.sizes)
                seconds = update_seconds(own, own, parts[2], self.pace)
                seconds += update_gather_seconds(value, choice, self.edges.links, self.sizes)
                costs.append(seconds if value.requires_grad else 0.0)
                usage.append(sum(parts))
            made = ProducerLayouts(tuple(choice.storage for choice in choices), choices, given=True)
            self.tables[priced] = (Table(np.array(costs), np.array(usage)), made)
        self.network.updates[node.name], self.tables["made", node.name] = self.tables[priced]

    def returns(self) -> None:
        """How a value may be returned: whole; beside a loss, also split as it is."""
        values = [self.graph.values[name] for name in self.graph.outputs]
        has_loss = any(not value.shape and value.requires_grad for value in values)
        for value in values:
            choices: tuple[Layout, ...] = (self.invariant,)
            if has_loss and value.shape and not self.whole_outputs:
                plain: list[tuple[Placement, ...]] = [
                    (
                        self.invariant[0],
                        *(
                            shard
                            for shard in (tiling.shards[value.name] if size > 1 else ())
                            if shard.blocks == 1 and shard.unit == 1
                        ),
                    )
                    for size, tiling in zip(self.sizes, self.tilings, strict=True)
                ]
                choices = tuple(
                    layout
                    for layout in product(*plain)
                    if is_nested(value.shape, layout, self.sizes)
                )
            self.network.outputs[value.name] = choices

    def made_by(self, name: str) -> tuple[str | None, ProducerLayouts]:
        """The variable that decides how a value is made, and its layout in each state."""
        node = self.graph.producers[name]
        if node.kind == "call":
            at = [value.name for value in node.results].index(name)
            return node.name, self.choices[node.name].made[at]
        if node.kind == "parameter":
            return node.name, self.tables["made", node.name]
        return None, self.shared("given", lambda: ProducerLayouts((self.invariant,), given=True))

    def shared(self, key: Any, make: Any) -> Any:
        """What was made under that key, or is made now."""
        if key not in self.tables:
            self.tables[key] = make()
        return self.tables[key]

    def zeros(self, count: int) -> Array:
        """A table that says nothing, the same one for all variables of that many states."""
        key = ("zeros", count)
        if key not in self.tables:
            self.tables[key] = np.zeros(count)
        found: Array = self.tables[key]
        return found

    def needs(self, name: str) -> list[tuple[str, ReaderLayouts]]:
        """Per reading variable, the layouts in which it reads the value in each state."""
        found: list[tuple[str, ReaderLayouts]] = []
        for node in self.graph.readers[name]:
            at = tuple(i for i, operand in enumerate(self.reads[node.name]) if operand == name)
            choices = self.choices[node.name]

            saved_for_backward = self.kept is not None and self.kept.is_kept(node, at)

            def need(
                joints: tuple[MeshStrategy, ...] = choices.joints,
                at: Any = at,
                saved_for_backward: bool = saved_for_backward,
            ) -> ReaderLayouts:
                return ReaderLayouts(
                    tuple(tuple(dict.fromkeys(joint.operands[i] for i in at)) for joint in joints),
                    saved_for_backward,
                )

            found.append(
                (node.name, self.shared(("need", id(choices), at, saved_for_backward), need))
            )
        if name in self.network.outputs:
            layouts = self.network.outputs[name]
            stays = self.kept is not None
            returned = self.shared(
                ("return", layouts),
                lambda: ReaderLayouts(tuple((layout,) for layout in layouts), stays, stays),
            )
            found.append((f"return:{name}", returned))
        for _, written in self.graph.mutations:
            if written == name:
                found.append(
                    ("", self.shared("written", lambda: ReaderLayouts(((self.invariant,),))))
                )
        return found

    def connect(self) -> None:
        """Tables between what is made and what is read."""
        for name, value in self.graph.values.items():
            needs = self.needs(name)
            if not needs:
                continue
            variable, made = self.made_by(name)
            weight, together = name in self.weights, name in self.together
            block, modes = self.modes(name, needs)
            edge = self.edges.between(
                value, made, tuple(need for _, need in needs), weight, together, modes
            )
            self.network.values[name] = edge
            mode = (
                self.recomputation.variable(block) if len(modes) > 1 and block is not None else ""
            )
            if len(needs) == 1:
                self.couple(variable, needs[0][0], edge.paid, name, mode)
                continue
            if not edge.paid.matters:
                continue
            if variable is None and not mode:
                self.network.copy_variables.append((f"{name}*", _first(edge.paid)))
            else:
                count = len(edge.groups)
                self.network.copy_variables.append((f"{name}*", Table(self.zeros(count))))
                self.couple(variable, f"{name}*", edge.paid, name, mode)
            for (reader, _), offer in zip(needs, edge.offers, strict=True):
                self.couple(f"{name}*", reader, offer, "")

    def couple(
        self, first: str | None, second: str, table: Table, value: str, mode: str = ""
    ) -> None:
        """A factor; where one side has no variable, one of a single state stands for it.

        mode: the variable of the table's last axis, if it has three.
        """
        if not table.matters or (first is None and not second):
            return
        names = [first or "", second]
        for side, name in enumerate(names):
            if not name:
                other = names[1 - side]
                names[side] = f"{other}+{len(self.network.copy_variables)}"
                self.network.copy_variables.append((names[side], Table(np.zeros(1))))
        self.network.redistributed_value.append(value)
        scope = (names[0], names[1], mode) if mode else (names[0], names[1])
        self.network.factors.append(Factor(scope, table.cost, table.usage, table.alternatives))


def _first(table: Table) -> Table:
    """The first row of a table, as a table of one variable."""
    usage = None if table.usage is None else table.usage[0]
    others = tuple(
        Alternative(one.cost[0], None if one.usage is None else one.usage[0])
        for one in table.alternatives
    )
    return Table(table.cost[0], usage, others)
