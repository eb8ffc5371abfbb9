"""The cost network of one graph: what its variables and states mean, and the numbers.

One variable per op (its joint strategies), one per parameter (how it is stored), one per value that
several ops read (the set of layouts that it is brought to, each once), one per returned value, one
per block that may be run again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.hardware import Hardware
from autoparallel.cost.op_costs import OpCost
from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph
from autoparallel.mesh import MICROBATCH, Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout, layout_text
from autoparallel.rules.rule import ShardingRule
from autoparallel.strategy.candidate_splits import CandidateSplits
from autoparallel.strategy.cost_tables import Table
from autoparallel.strategy.counted_moments import BEGINNING, Moment
from autoparallel.strategy.mesh_strategies import MeshStrategy
from autoparallel.strategy.parameter_storage import ParameterStorage
from autoparallel.strategy.recompute_modes import Recomputation
from autoparallel.strategy.redistribution import RedistributionTable, RedistributionTables
from autoparallel.strategy.rule_matching import MatchedCall
from autoparallel.strategy.saved_activations import SavedActivations
from autoparallel.strategy.stage_shares import WHOLE_MODEL, StageShares
from planners import Factor, Problem, Solution, Variable

__all__ = ["CostNetwork", "reduced_together"]

Array = NDArray[np.float64]


@dataclass
class CostNetwork:
    """The planning problem of one graph, and the meaning of its states.

    graph, mesh, hardware, options: what was planned for. edges: the redistribution tables. stored:
    layouts that parameters (by path) have already. whole_outputs: all returned values must be
    whole. shares: what a micro-batch of a pipeline bears.
    strategies, costs, usage: per call node, per state: the strategy, its seconds and its saved
    bytes. storages, updates: per parameter node, the ways to store it, and their seconds and bytes.
    outputs: per returned value, its possible layouts. factors, redistributed_value: the factors,
    and for each the value whose redistribution it prices, or "". values: per value, the table from
    its producer to its readers. copy_variables: variables that belong to no node, (name, table):
    "VALUE*" for a value's set of layouts, "block:PATH" for a recompute mode, and stand-ins of one
    state.
    recomputation: the modes of every block. repeats: per call of a block whose mode is decided,
    what recomputing adds. allowed: per node, the states that constraints leave. saved_for_backward:
    per call, which operands its backward pass needs. rules: per call node. weights: values that
    come from parameters alone.
    moment: the one at which bytes are counted.
    fixed_nbytes: bytes per rank that any plan needs besides those in the tables.
    activations: what calls save, None where memory is not limited.
    only: the states that there are, see `build_network`; None for all. also: per value, a
    set of layouts that there is besides.
    matched, splits: what every call is, and the splits that it may have, by the size of an axis and
    whether there are several. They serve other networks of the same graph. alike: the states of
    calls, by what they are computed from, which serve networks that differ in what is recomputed.
    """

    graph: Graph
    mesh: Mesh
    hardware: Hardware
    options: Options
    edges: RedistributionTables
    stored: Mapping[str, Layout]
    whole_outputs: bool
    strategies: dict[str, tuple[MeshStrategy, ...]] = field(default_factory=dict)
    storages: dict[str, tuple[ParameterStorage, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[Layout, ...]] = field(default_factory=dict)
    costs: dict[str, tuple[OpCost, ...]] = field(default_factory=dict)
    factors: list[Factor] = field(default_factory=list)
    redistributed_value: list[str] = field(default_factory=list)
    values: dict[str, RedistributionTable] = field(default_factory=dict)
    copy_variables: list[tuple[str, Table]] = field(default_factory=list)
    updates: dict[str, Table] = field(default_factory=dict)
    usage: dict[str, Array] = field(default_factory=dict)
    recomputation: Recomputation | None = None
    repeats: dict[str, Table] = field(default_factory=dict)
    allowed: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    saved_for_backward: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    matched: Mapping[str, MatchedCall] = field(default_factory=dict)
    splits: dict[tuple[int, bool], CandidateSplits] = field(default_factory=dict)
    alike: dict[Any, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    _positions: dict[str, float] = field(default_factory=dict)
    rules: dict[str, ShardingRule | None] = field(default_factory=dict)
    weights: frozenset[str] = frozenset()
    moment: Moment = BEGINNING
    fixed_nbytes: float = 0.0
    shares: StageShares = WHOLE_MODEL
    activations: SavedActivations | None = None
    only: Mapping[str, frozenset[Any]] | None = None
    also: Mapping[str, frozenset[Layout]] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """The number of ranks of the mesh."""
        return self.mesh.world_size

    def problem(
        self,
        product_weight: float = 1.0,
        pins: Mapping[str, Layout] = {},
        limit: float | None = None,
    ) -> Problem:
        """Return the planner's problem: seconds as cost, bytes per rank as usage.

        product_weight: the factor by which seconds of matrix products count. pins: the storage of
        parameters (by node name) that is decided already. limit: bytes per rank, less
        `fixed_nbytes`; None for no limit. Raises PlanError for a pin that the parameter cannot
        take.
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
                        fix="pin it to one of these, or leave the pin out",
                    )
                unary = np.where(allowed, unary, np.inf)
            variables.append(Variable(name, unary, table.usage, table.alternatives))
        for name, costs in self.costs.items():
            # Calls that are alike share their costs, and so must share the arrays: equal layers are
            # recognized by them.
            key = (id(costs), product_weight)
            if key not in interned:
                seconds = [self.priced(cost, product_weight) for cost in costs]
                interned[key] = np.array(seconds) + self.repeating(name)
            unary, usage = interned[key], self.usage.get(name)
            if name in self.repeats:
                recomputed = self.repeats[name]
                unary = interned.setdefault((*key, id(recomputed.cost)), unary + recomputed.cost)
                if usage is not None and recomputed.usage is not None:
                    key_of_usage = ("saved", id(usage), id(recomputed.usage))
                    usage = interned.setdefault(key_of_usage, usage + recomputed.usage)
            variables.append(Variable(name, unary, usage))
        for name, layouts in self.outputs.items():
            # To return a value costs nothing by itself; bringing it to that layout does, in a
            # factor.
            zeros = interned.setdefault(len(layouts), np.zeros(len(layouts)))
            variables.append(Variable(f"return:{name}", zeros))
        for name, table in self.copy_variables:
            variables.append(Variable(name, table.cost, table.usage, table.alternatives))
        # Constraints forbid states rather than remove them: numbers of states keep their meaning.
        # Equal layers are recognized by their arrays, here too. Arrays that are kept keep their id.
        forbidden: dict[tuple[int, int], tuple[Array, Array]] = {}
        for index, variable in enumerate(variables):
            if variable.name in self.allowed:
                mask, unary = self.allowed[variable.name], variable.unary
                pair = id(unary), id(mask)
                if pair not in forbidden:
                    forbidden[pair] = unary, np.where(mask, unary, np.inf)
                variables[index] = replace(variable, unary=forbidden[pair][1])
        # What is near in the model is near in the problem: plans are mixed along this order.
        variables.sort(key=lambda variable: self.position(variable.name))
        self.names = tuple(variable.name for variable in variables)
        return Problem(tuple(variables), tuple(self.factors), limit)

    def arranged_states(self, names: Mapping[str, Iterable[int]]) -> dict[str, frozenset[Any]]:
        """Return states of a network that leaves the order of equal axes open, as the network with
        all orders knows them.

        names: the numbers of states, per variable. Variables between values and readers have the
        layouts that these ask for, and are left out.
        """
        told: dict[str, frozenset[Any]] = {}
        for name, states in names.items():
            if name in self.strategies:
                joints = self.strategies[name]
                told[name] = frozenset(joints[state].parts for state in states)
            elif name in self.storages:
                told[name] = frozenset(self.storages[name][state] for state in states)
            elif name.removeprefix("return:") in self.outputs and name.startswith("return:"):
                layouts = self.outputs[name.removeprefix("return:")]
                told[name] = frozenset(layouts[state] for state in states)
        return told

    def groupings(self) -> tuple[dict[str, NDArray[np.intp]], ...]:
        """Return, per mesh axis, the groups of states that differ on that axis alone.

        Per variable, a vector with the number of each state's group, as `planners.coarsening` takes
        it.
        """
        groupings = []
        for axis in range(len(self.mesh.axes)):
            groups: dict[str, NDArray[np.intp]] = {}
            for name, joints in self.strategies.items():
                groups[name] = _numbered(
                    (_without(joint.operands, axis), _without(joint.results, axis))
                    for joint in joints
                )
            for name, stored in self.storages.items():
                groups[name] = _numbered(
                    _without((one.storage, one.gradient, one.state), axis) for one in stored
                )
            for name, layouts in self.outputs.items():
                groups[f"return:{name}"] = _numbered(
                    _without((layout,), axis) for layout in layouts
                )
            for name, _ in self.copy_variables:
                edge = self.values.get(name.removesuffix("*"))
                if edge is not None and name.endswith("*"):
                    groups[name] = _numbered(
                        (frozenset(_without(group, axis)), frozenset(_without(some, axis)))
                        for group, some in zip(edge.groups, edge.kept, strict=True)
                    )
            groupings.append(groups)
        return tuple(groupings)

    def position(self, variable: str) -> float:
        """Return where in the graph a variable belongs: after its producer, before its reader.

        Halves and quarters place variables between nodes. Unknown variables come last.
        """
        if not self._positions:
            places = {node.name: index for index, node in enumerate(self.graph.nodes)}
            for name in self.graph.values:
                producer = self.graph.producers[name]
                readers = [places[node.name] for node in self.graph.readers[name]]
                first = min(readers, default=len(places))
                if producer.kind == "call":
                    self._positions[f"{name}*"] = places[producer.name] + 0.5
                else:
                    self._positions[producer.name] = self._positions[f"{name}*"] = first - 0.5
            self._positions.update(
                (node.name, float(places[node.name])) for node in self.graph.calls
            )
            assert self.recomputation is not None
            for index, block in enumerate(self.recomputation.blocks):
                self._positions[self.recomputation.variable(index)] = block.start - 0.75
        return self._positions.get(variable, float("inf"))

    def priced(self, cost: OpCost, product_weight: float) -> float:
        """Return the seconds by which an op counts in the objective.

        Without sequence or data parallelism all but the products counts as done unsharded, so that
        only they are worth splitting and activations stay whole between them, as in Megatron.
        """
        spread = self.options.sequence_parallel or self.options.data_parallel
        traffic = cost.traffic if spread else cost.whole_traffic
        return product_weight * cost.product + traffic + cost.communication

    def repeating(self, name: str) -> Array:
        """Return, per state of a call, the seconds that are added where every micro-batch computes
        what each could compute its part of.

        A pipeline is there for micro-batches. The models of examples are small, and for these it
        is as quick to start every kernel on the whole batch: that is no reason to.
        """
        added = np.zeros(len(self.costs[name]))
        for axis, (label, size) in enumerate(self.mesh.axes):
            if label == MICROBATCH and size > 1:
                in_parts = [joint.parts[axis].tile is not None for joint in self.strategies[name]]
                if any(in_parts):
                    seconds = np.array([cost.seconds for cost in self.costs[name]])
                    added += np.where(in_parts, 0.0, size * seconds)
        return added

    def recomputed(
        self, chosen: Mapping[str, int]
    ) -> tuple[
        tuple[tuple[str, str], ...], tuple[tuple[str, ...], ...], tuple[str, ...], frozenset[str]
    ]:
        """Return the blocks that are recomputed, as (path, mode); the ops of each that run again
        together; the ops that are made again one by one; and these with the views of what they
        make.

        chosen: the state of every variable.
        """
        blocks = self.recomputation
        assert blocks is not None
        modes, groups = [], []
        remade: list[str] = []
        made: set[str] = set()
        for index, (block, able) in enumerate(zip(blocks.blocks, blocks.modes, strict=True)):
            mode = able[chosen[blocks.variable(index)] if len(able) > 1 else 0]
            # Blocks whose mode is decided have no variable.
            if mode != "none":
                modes.append((block.path, mode))
                if blocks.groups[index][mode]:
                    groups.append(blocks.groups[index][mode])
                else:
                    remade += blocks.remade[index]
                    made |= blocks.made[index]
        return tuple(modes), tuple(groups), tuple(remade), frozenset(made)

    def made_again(self, solution: Solution) -> frozenset[tuple[str, Layout]]:
        """Return the redistributed copies, (value, layout), dropped after the forward pass.

        Those are the copies whose table the solution pays in its alternative way: redistributed
        once more in the backward pass instead of saved.
        """
        dropped: set[tuple[str, Layout]] = set()
        chosen = solution.assignment
        if not solution.factor_alternatives:
            return frozenset()
        for name, factor, way in zip(
            self.redistributed_value, self.factors, solution.factor_alternatives, strict=True
        ):
            if way and name:
                dropped.update((name, t) for t in self.values[name].kept[chosen[factor.scope[1]]])
        for name, way in zip(self.names, solution.variable_alternatives, strict=True):
            if way and name.endswith("*"):
                value = name.removesuffix("*")
                dropped.update((value, t) for t in self.values[value].kept[chosen[name]])
        return frozenset(dropped)


def reduced_together(graph: Graph) -> frozenset[str]:
    """Return the parameters whose gradients can be reduced in one bucket after the backward pass.

    Those are all: nothing in the backward pass reads a parameter's gradient.
    """
    return frozenset(node.result.name for node in graph.nodes if node.kind == "parameter")


def _without(layouts: tuple[Layout, ...], axis: int) -> tuple[Layout, ...]:
    """Return the layouts without one mesh axis."""
    return tuple((*layout[:axis], *layout[axis + 1 :]) for layout in layouts)


def _numbered(keys: Iterable[Any]) -> NDArray[np.intp]:
    """Return a number for each key, equal ones for equal keys."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)
