"""From a graph to a cost network, and from its solution to choices: strategies become states.

One variable per op (its joint strategies), one per parameter (how it is stored), one per value that
several ops read (the set of layouts that it is brought to, each once), one per returned value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoparallel.cost.compute import OpCost, nbytes, op_costs, update_seconds
from autoparallel.cost.hardware import Hardware
from autoparallel.edges import Edge, Edges, Made, Need, Repeated, Table
from autoparallel.errors import PlanError, UnsupportedOpError
from autoparallel.graph.graph import Graph, Node, Ref, map_leaves
from autoparallel.joint import Joint, is_nested, joint_strategies
from autoparallel.kept import Kept
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout, Placement, layout_text, whole_layout
from autoparallel.recompute import Recomputation
from autoparallel.routes import layout_fraction
from autoparallel.rules.registry import find_rule
from autoparallel.rules.rule import OpCall, ShardingRule, Strategy, strategies
from autoparallel.rules.unknown import find_unknown
from autoparallel.stores import Stored, storage_choices, stored_bytes
from autoparallel.tiling import Tiling, inert_calls, weight_values
from planners import Alternative, Factor, Problem, Solution, Variable

__all__ = ["Network", "build_network", "reduced_together"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Kind:
    """What all calls of one signature share: rule, and everything derived from it."""

    call: OpCall
    rule: ShardingRule | None


@dataclass(frozen=True, eq=False)
class _Choices:
    """The states of all calls that are alike. made: by result. usage: bytes that the op keeps for
    the backward pass by itself."""

    joints: tuple[Joint, ...]
    costs: tuple[OpCost, ...]
    made: tuple[Made, ...]
    usage: Array | None = None


@dataclass
class Network:
    """The problem of one graph, and what its states mean.

    strategies: per call node. storages: per parameter node. outputs: per returned value.
    costs, usage: per call node, per strategy, what it takes and the bytes that it keeps. values:
    what every value costs between its maker and its readers; moved: per factor, the value whose way
    it prices, or "". rules: per call node. weights: values that come from parameters alone.
    """

    graph: Graph
    mesh: Mesh
    hardware: Hardware
    options: Options
    edges: Edges
    strategies: dict[str, tuple[Joint, ...]] = field(default_factory=dict)
    storages: dict[str, tuple[Stored, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[Layout, ...]] = field(default_factory=dict)
    costs: dict[str, tuple[OpCost, ...]] = field(default_factory=dict)
    factors: list[Factor] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    values: dict[str, Edge] = field(default_factory=dict)
    fans: list[tuple[str, Table]] = field(default_factory=list)
    updates: dict[str, Table] = field(default_factory=dict)
    usage: dict[str, Array] = field(default_factory=dict)
    recomputation: Recomputation | None = None
    repeats: dict[str, Table] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    _positions: dict[str, float] = field(default_factory=dict)
    rules: dict[str, ShardingRule | None] = field(default_factory=dict)
    weights: frozenset[str] = frozenset()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.mesh.world_size

    def problem(
        self,
        product_weight: float = 1.0,
        pins: Mapping[str, Layout] = {},
        limit: float | None = None,
    ) -> Problem:
        """The numbers. product_weight: what a second of matrix products counts. limit: in bytes.

        pins: storage of parameters (by node name) that is given. Raises PlanError for a pin that
        the parameter cannot take.
        """
        interned: dict[Any, np.ndarray] = {}
        variables: list[Variable] = []
        for name, choices in self.storages.items():
            table = self.updates[name]
            unary = table.cost
            if name in pins:
                allowed = np.array([choice.storage == pins[name] for choice in choices])
                if not allowed.any():
                    able = dict.fromkeys(layout_text(choice.storage) for choice in choices)
                    raise PlanError(
                        f"parameter {name} cannot be stored as {layout_text(pins[name])}",
                        why=f"it can be {', '.join(able)}",
                    )
                unary = np.where(allowed, unary, np.inf)
            variables.append(Variable(name, unary, table.usage, table.alternatives))
        for name, costs in self.costs.items():
            key = (id(costs), product_weight)
            if key not in interned:
                interned[key] = np.array([self.priced(cost, product_weight) for cost in costs])
            unary, usage = interned[key], self.usage.get(name)
            if name in self.repeats:
                again = self.repeats[name]
                unary = interned.setdefault((*key, id(again.cost)), unary + again.cost)
                usage = None if usage is None else np.zeros_like(usage)
            variables.append(Variable(name, unary, usage))
        for name, layouts in self.outputs.items():
            zeros = interned.setdefault(len(layouts), np.zeros(len(layouts)))
            variables.append(Variable(f"return:{name}", zeros))
        for name, table in self.fans:
            variables.append(Variable(name, table.cost, table.usage, table.alternatives))
        # What is near in the model is near in the problem: plans are mixed along this order.
        variables.sort(key=lambda variable: self.position(variable.name))
        self.names = tuple(variable.name for variable in variables)
        return Problem(tuple(variables), tuple(self.factors), limit)

    def position(self, variable: str) -> float:
        """Where in the graph a variable belongs: before its first reader, after its maker."""
        if not self._positions:
            places = {node.name: index for index, node in enumerate(self.graph.nodes)}
            for name in self.graph.values:
                maker = self.graph.producers[name]
                readers = [places[node.name] for node in self.graph.readers[name]]
                first = min(readers, default=len(places))
                if maker.kind == "call":
                    self._positions[f"{name}*"] = places[maker.name] + 0.5
                else:
                    self._positions[maker.name] = self._positions[f"{name}*"] = first - 0.5
            self._positions.update(
                (node.name, float(places[node.name])) for node in self.graph.calls
            )
            assert self.recomputation is not None
            for index, block in enumerate(self.recomputation.blocks):
                self._positions[self.recomputation.variable(index)] = block.start - 0.75
        return self._positions.get(variable, float("inf"))

    def priced(self, cost: OpCost, product_weight: float) -> float:
        """What an op counts in the objective.

        Without sequence parallelism all but the products counts as done whole, so that only they
        are worth splitting and activations stay whole between them.
        """
        spread = self.options.sequence_parallel or self.options.data_parallel
        traffic = cost.traffic if spread else cost.whole_traffic
        return product_weight * cost.product + traffic + cost.communication

    def recomputed(
        self, chosen: Mapping[str, int]
    ) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, ...], ...]]:
        """The blocks that are run again, (path, mode), and their ops."""
        blocks = self.recomputation
        assert blocks is not None
        modes, groups = [], []
        for index, (block, able) in enumerate(zip(blocks.blocks, blocks.modes, strict=True)):
            mode = able[chosen[blocks.variable(index)] if len(able) > 1 else 0]
            if mode != "none":
                modes.append((block.path, mode))
                groups.append(blocks.groups[index][mode])
        return tuple(modes), tuple(groups)

    def made_again(self, solution: Solution) -> frozenset[tuple[str, Layout]]:
        """Values, and what they are converted to, that are dropped after the forward pass."""
        found: set[tuple[str, Layout]] = set()
        chosen = solution.assignment
        if not solution.factor_alternatives:
            return frozenset()
        for name, factor, other in zip(
            self.moved, self.factors, solution.factor_alternatives, strict=True
        ):
            if other and name:
                found.update((name, t) for t in self.values[name].kept[chosen[factor.scope[1]]])
        for name, other in zip(self.names, solution.variable_alternatives, strict=True):
            if other and name.endswith("*"):
                value = name.removesuffix("*")
                found.update((value, t) for t in self.values[value].kept[chosen[name]])
        return frozenset(found)


def build_network(
    graph: Graph,
    mesh: Mesh,
    hardware: Hardware,
    options: Options,
    stored: Mapping[str, Layout] | None = None,
    whole_outputs: bool = False,
) -> Network:
    """All strategies, and what they cost with their neighbours.

    stored: layouts that parameters (by path) have already, which they keep. whole_outputs:
    whether all that is returned must be whole.
    Raises UnsupportedOpError that lists every differentiable op without a rule.
    """
    builder = _Builder(graph, mesh, hardware, options, stored or {}, whole_outputs)
    return builder.build()


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
        self.hardware, self.options, self.stored = hardware, options, stored
        self.sizes = tuple(size for _, size in mesh.axes)
        self.links = hardware.links(self.sizes)
        memory = options.memory_limit is not None
        self.edges = Edges(self.sizes, self.links, hardware, options, memory)
        self.network = Network(graph, mesh, hardware, options, self.edges)
        self.invariant = whole_layout(len(self.sizes))
        self.kinds: dict[str, _Kind] = {}
        self.weights = weight_values(graph)
        self.network.weights = frozenset(self.weights)
        self.inert = inert_calls(graph)
        self.together = reduced_together(graph)
        self.kept: Kept | None = None
        self.tables: dict[Any, Any] = {}
        self.choices: dict[str, _Choices] = {}
        self.reads = {node.name: node.operands() for node in graph.calls}

    def build(self) -> Network:
        self.find_rules()
        rules = {
            name: None if name in self.inert else kind.rule for name, kind in self.kinds.items()
        }
        tilings = {
            size: Tiling(self.graph, rules, self.weights, self.options, size)
            for size in dict.fromkeys(self.sizes)
        }
        if self.options.memory_limit is not None:
            self.kept = Kept(self.graph, rules)
        self.recomputation = self.network.recomputation = Recomputation(
            self.graph, rules, self.network.weights, self.options.recompute
        )
        self.tilings = [tilings[size] for size in self.sizes]
        shared: dict[Any, _Choices] = {}
        for node in self.graph.calls:
            kind = self.kinds[node.name]
            tiles = tuple(tuple(tiling.tiles.get(node.name, ())) for tiling in tilings.values())
            key = (id(kind), tiles, self.kept.of(node.name) if self.kept else None)
            if key not in shared:
                shared[key] = self.choose(node, kind)
            chosen = self.choices[node.name] = shared[key]
            self.network.strategies[node.name] = chosen.joints
            self.network.costs[node.name] = chosen.costs
            if chosen.usage is not None:
                self.network.usage[node.name] = chosen.usage
            self.network.rules[node.name] = kind.rule
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
                self.network.fans.append((blocks.variable(block), Table(self.zeros(len(modes)))))
        for node in self.graph.calls:
            block = blocks.block_of(node.name)
            if block is None:
                continue
            inside = np.array(blocks.inside(node.name, block))
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
                self.couple(node.name, blocks.variable(block), made, "")
            else:
                self.network.repeats[node.name] = Table(
                    made.cost[:, 0], None if made.usage is None else made.usage[:, 0]
                )

    def modes(
        self, name: str, needs: list[tuple[str, Need]]
    ) -> tuple[int | None, tuple[Repeated, ...]]:
        """The block whose mode decides who of a value's maker and readers is run again; and who.

        Where readers belong to several blocks, what they read counts as kept.
        """
        blocks = self.recomputation
        places = {blocks.block_of(reader) for reader, _ in needs}
        maker = blocks.block_of(self.graph.producers[name].name)
        (block,) = places if len(places) == 1 else (None,)
        if block is None and maker is None:
            return None, ()
        if block is None:
            inside = blocks.inside(self.graph.producers[name].name, maker)
            within = tuple(reader for reader, _ in needs if blocks.block_of(reader) == maker)
            return maker, tuple(
                Repeated(
                    made,
                    tuple(
                        reader in within and blocks.inside(reader, maker)[mode]
                        for reader, _ in needs
                    ),
                )
                for mode, made in enumerate(inside)
            )
        own = maker == block
        made_by = self.graph.producers[name].name
        return block, tuple(
            Repeated(
                own and blocks.inside(made_by, block)[mode],
                tuple(blocks.inside(reader, block)[mode] for reader, _ in needs),
                apart=maker is not None and not own,
            )
            for mode in range(len(blocks.modes[block]))
        )

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
                if author is None and self.mesh.world_size > 1:
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

    def choose(self, node: Node, kind: _Kind) -> _Choices:
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
        costs = op_costs(call, kind.rule, [joint.parts for joint in joints], axes, self.hardware)
        held = self.kept.own(node) if self.kept else (False,) * len(results)
        made = tuple(
            Made(tuple(joint.results[at] for joint in joints), counted=held[at])
            for at in range(len(results))
        )
        usage = None
        if self.kept is not None:
            usage = np.array([self.kept.nbytes(node, joint, self.sizes) for joint in joints])
        return _Choices(joints, costs, made, usage)

    def store(self, node: Node) -> None:
        """How one parameter may be stored, and what its update costs."""
        value = node.result
        if node.target in self.stored:
            choices: tuple[Stored, ...] = (Stored.as_used(self.stored[node.target]),)
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
        key = ("update", value.shape, value.dtype, value.requires_grad, choices)
        if key not in self.tables:
            costs, usage = [], []
            for choice in choices:
                parts = stored_bytes(value, choice, self.sizes, self.options.optimizer)
                own = nbytes(value) * layout_fraction(value.shape, choice.state, self.sizes)
                seconds = update_seconds(own, own, parts[2], self.hardware)
                costs.append(seconds if value.requires_grad else 0.0)
                usage.append(sum(parts))
            made = Made(tuple(choice.storage for choice in choices), choices, given=True)
            self.tables[key] = (Table(np.array(costs), np.array(usage)), made)
        self.network.updates[node.name], self.tables["made", node.name] = self.tables[key]

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

    def made_by(self, name: str) -> tuple[str | None, Made]:
        """The variable that decides how a value is made, and its layout in each state."""
        node = self.graph.producers[name]
        if node.kind == "call":
            at = [value.name for value in node.results].index(name)
            return node.name, self.choices[node.name].made[at]
        if node.kind == "parameter":
            return node.name, self.tables["made", node.name]
        return None, self.shared("given", lambda: Made((self.invariant,), given=True))

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

    def needs(self, name: str) -> list[tuple[str, Need]]:
        """Per reading variable, the layouts in which it reads the value in each state."""
        found: list[tuple[str, Need]] = []
        for node in self.graph.readers[name]:
            at = tuple(i for i, operand in enumerate(self.reads[node.name]) if operand == name)
            choices = self.choices[node.name]

            saves = self.kept is not None and self.kept.is_kept(node, at)

            def need(
                joints: tuple[Joint, ...] = choices.joints, at: Any = at, saves: bool = saves
            ) -> Need:
                return Need(
                    tuple(tuple(dict.fromkeys(joint.operands[i] for i in at)) for joint in joints),
                    saves,
                )

            found.append((node.name, self.shared(("need", id(choices), at, saves), need)))
        if name in self.network.outputs:
            layouts = self.network.outputs[name]
            returned = self.shared(
                ("return", layouts), lambda: Need(tuple((layout,) for layout in layouts))
            )
            found.append((f"return:{name}", returned))
        for _, written in self.graph.mutations:
            if written == name:
                found.append(("", self.shared("written", lambda: Need(((self.invariant,),)))))
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
                self.network.fans.append((f"{name}*", _first(edge.paid)))
            else:
                count = len(edge.groups)
                self.network.fans.append((f"{name}*", Table(self.zeros(count))))
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
                names[side] = f"{other}+{len(self.network.fans)}"
                self.network.fans.append((names[side], Table(np.zeros(1))))
        self.network.moved.append(value)
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
