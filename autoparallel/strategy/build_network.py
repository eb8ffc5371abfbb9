"""From a graph to its cost network: what every op, parameter and result may do, and its price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.hardware import Hardware
from autoparallel.cost.op_costs import nbytes, op_costs
from autoparallel.cost.saved_tensors import SavedTensors
from autoparallel.errors import CoupledBatchError
from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.graph.weight_values import weight_values
from autoparallel.mesh import MICROBATCH, Mesh
from autoparallel.options import Options
from autoparallel.placement import (
    Invariant,
    Layout,
    whole_layout,
)
from autoparallel.rules.lookup import rule_of_whole_tensors
from autoparallel.rules.strategies import Strategy, strategies
from autoparallel.strategy.candidate_splits import CandidateSplits
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.counted_moments import likely_moment, moment_of
from autoparallel.strategy.equal_axes import (
    AxisGroups,
    arranged,
    arranged_layout,
    equal_axes,
)
from autoparallel.strategy.mesh_strategies import MeshStrategy, joint_strategies
from autoparallel.strategy.network_factors import CallStates, NetworkFactors
from autoparallel.strategy.output_layouts import add_outputs
from autoparallel.strategy.parameter_states import ParameterStates
from autoparallel.strategy.recompute_modes import Recomputation
from autoparallel.strategy.redistributed_copies import ProducerLayouts
from autoparallel.strategy.redistribution import RedistributionTables
from autoparallel.strategy.rule_matching import MatchedCall, match_rules
from autoparallel.strategy.saved_activations import SavedActivations
from autoparallel.strategy.stage_shares import WHOLE_MODEL, StageShares
from planners.effort import current

__all__ = ["build_network", "rebuilt"]

Array = NDArray[np.float64]

# What it takes to build a network, by the nodes of the graph and the axes of the mesh.
_SECONDS_PER_NODE = 1e-4


def build_network(
    graph: Graph,
    mesh: Mesh,
    hardware: Hardware,
    options: Options,
    stored: Mapping[str, Layout] | None = None,
    whole_outputs: bool = False,
    shares: StageShares = WHOLE_MODEL,
    known: CostNetwork | None = None,
    groups: AxisGroups = (),
    only: Mapping[str, frozenset[Any]] | None = None,
    modes: Sequence[str] = (),
    counted_at: str | None = None,
    also: Mapping[str, frozenset[Layout]] | None = None,
) -> CostNetwork:
    """Return the cost network of a graph: all strategies, and what they cost with neighbours.

    graph: normalized by the passes. mesh, hardware, options: what is planned for. stored: layouts
    that parameters (by path) have already, which they keep; None for none. whole_outputs: True
    where all returned values must be whole, as for a graph that ends before a graph break. shares:
    what a micro-batch of a pipeline bears, on a mesh with an axis of micro-batches. known: a
    network of the same graph, of which what rules and splits say is taken. groups: of equal axes,
    whose order is to be left open: one state then stands for all of its orders, and the network
    bounds the one with them (see equal_axes.py). only: per variable, the states that there are to
    be, in whatever order, as `arranged_states` tells them; all by default. modes: how each repeated
    block is recomputed, in their order, where that is decided. counted_at: the call at whose
    backward bytes are counted; by default, where they are likely to be most. also: per value, a set
    of layouts that it may be brought to besides the sets that there are by default.
    Costs are seconds of one training step (forward, backward, update), usage is bytes per rank.
    Raises UnsupportedOpError that lists every differentiable op without a rule.

    Example: `build_network(captured.graph, Mesh(tp=4), find_hardware("dgx-a100"), Options())`
    """
    builder = _Builder(
        graph, mesh, hardware, options, stored or {}, whole_outputs, shares, known, groups, only,
        modes, counted_at, also or {},
    )  # fmt: skip
    return builder.build()


def rebuilt(
    network: CostNetwork,
    options: Options | None = None,
    mesh: Mesh | None = None,
    modes: Sequence[str] = (),
    counted_at: str | None = None,
) -> CostNetwork:
    """Return the network of the same graph under other options, or on another mesh.

    options, mesh: None for those of `network`. modes, counted_at, errors: as of `build_network`.
    """
    return build_network(
        network.graph,
        mesh or network.mesh,
        network.hardware,
        options or network.options,
        network.stored,
        network.whole_outputs,
        network.shares,
        network,
        # The states of one mesh say nothing of another's.
        only=network.only if mesh is None else None,
        also=network.also if mesh is None else None,
        modes=modes,
        counted_at=counted_at,
    )


class _Builder:
    """Builds one network: first what every node may do, then the factors between them.

    splits: the candidate splits, per mesh axis. saved: the saved activations, None where memory is
    not limited. states: per call.
    """

    def __init__(
        self,
        graph: Graph,
        mesh: Mesh,
        hardware: Hardware,
        options: Options,
        stored: Mapping[str, Layout],
        whole_outputs: bool,
        shares: StageShares,
        known: CostNetwork | None,
        groups: AxisGroups,
        only: Mapping[str, frozenset[Any]] | None,
        modes: Sequence[str],
        counted_at: str | None,
        also: Mapping[str, frozenset[Layout]],
    ) -> None:
        self.counted_at = counted_at
        self.graph, self.mesh, self.options, self.known = graph, mesh, options, known
        self.sizes = tuple(size for _, size in mesh.axes)
        # Micro-batches are the ranks of an axis in time: no device, and no link.
        self.in_time = tuple(name == MICROBATCH and size > 1 for name, size in mesh.axes)
        devices = tuple(1 if name == MICROBATCH else size for name, size in mesh.axes)
        self.pace = hardware.at_pace_of(math.prod(devices) * shares.ranks)
        self.links = hardware.links(devices)
        self.groups, self.only, self.modes = groups, only, modes
        # By these, states are the same but for the order of axes.
        self.equal = groups or equal_axes(self.sizes, self.links, self.in_time)
        memory = options.memory_limit is not None
        self.edges = RedistributionTables(
            self.sizes, self.links, self.pace, options, memory, self.in_time, shares.once, groups
        )
        # Networks that differ in what is recomputed alone have the same states and the same moves.
        self.alike: dict[Any, CallStates] = {}
        if known is not None and known.graph is graph and known.edges.serves(self.edges):
            self.edges = known.edges
            self.alike = {} if memory else known.alike
        self.network = CostNetwork(
            graph, mesh, hardware, options, self.edges, stored, whole_outputs, shares=shares,
            only=only, also=also,
        )  # fmt: skip
        self.network.alike = self.alike
        self.invariant = whole_layout(len(self.sizes))
        self.weights = weight_values(graph)
        self.network.weights = frozenset(self.weights)
        self.inert = inert_calls(graph)
        self.saved: SavedActivations | None = None
        self.states: dict[str, CallStates] = {}

    def build(self) -> CostNetwork:
        """Return the finished network. Raises UnsupportedOpError for ops without a rule."""
        current().spend(len(self.graph.nodes) * len(self.sizes) * _SECONDS_PER_NODE)
        # Nothing is discovered on one rank.
        if self.known is not None and (self.known.world_size == 1) == (self.mesh.world_size == 1):
            self.matched = self.known.matched
        else:
            self.matched = match_rules(self.graph, self.inert, self.options, self.mesh.world_size)
        self.network.matched = self.matched
        rules = {
            name: None if name in self.inert else matched.rule
            for name, matched in self.matched.items()
        }
        # On several axes states are pairs and triples: splits that no product asks for are left
        # out, or their number would multiply.
        several = sum(size > 1 for size in self.sizes) > 1
        splits = self.known.splits if self.known is not None else {}
        axes = zip(self.sizes, self.in_time, strict=True)
        splits_by_size = {
            size: splits.get((size, several))
            or CandidateSplits(self.graph, rules, self.weights, self.options, size, several)
            for size in dict.fromkeys(size for size, in_time in axes if not in_time)
        }
        self.network.splits = {(size, several): found for size, found in splits_by_size.items()}
        # The inputs' batch is what micro-batches are parts of, whatever else may be split.
        freely = replace(self.options, data_parallel=True)
        self.splits = [
            CandidateSplits(self.graph, rules, self.weights, freely, size, batch=True)
            if in_time
            else splits_by_size[size]
            for size, in_time in zip(self.sizes, self.in_time, strict=True)
        ]
        if self.options.memory_limit is not None:
            # What calls save depends on the device, and not on the mesh.
            known, device = self.known, self.pace.device
            same = known is not None and known.graph is self.graph and known.matched is self.matched
            saved = known.activations if known is not None and same else None
            fits = saved is not None and saved.device == device
            self.saved = saved if fits else SavedActivations(self.graph, rules, device)
            self.network.activations = self.saved
            if known is not None and fits and self.edges is known.edges:
                # Nor do they differ in what calls save, at whatever moment bytes are counted.
                self.alike = self.network.alike = known.alike
        self.recomputation = self.network.recomputation = Recomputation(
            self.graph,
            rules,
            self.network.weights,
            self.options.recompute,
            self.known_saved() if self.saved is None else self.saved.saved,
            self.modes,
            self.pace.device,
        )
        if self.saved is not None:
            self.network.moment = (
                likely_moment(self.saved, self.recomputation)
                if self.counted_at is None
                else moment_of(self.recomputation, self.counted_at)
            )
            resident = (node for node in self.graph.nodes if node.kind in ("input", "constant"))
            self.network.fixed_nbytes = sum(nbytes(node.result) for node in resident)
        self.add_calls()
        parameters = ParameterStates(
            self.network, self.splits, self.in_time, self.pace, self.equal, self.groups
        )
        for node in self.graph.nodes:
            if node.kind == "parameter":
                parameters.add(node)
        add_outputs(self.network, self.splits, self.in_time, self.equal, self.groups)
        NetworkFactors(
            self.network,
            self.states,
            parameters.layouts,
            self.recomputation,
            self.saved,
            self.invariant,
        ).add_all()
        return self.network

    def add_calls(self) -> None:
        """Add the states of every call to the network, computed once for calls that are alike."""
        shared = self.alike
        different = tuple({id(splits): splits for splits in self.splits}.values())
        moment, places = self.network.moment, {n.name: at for at, n in enumerate(self.graph.nodes)}
        nothing: dict[int, Array] = {}
        for node in self.graph.calls:
            matched = self.matched[node.name]
            tiles = tuple(tuple(splits.tiles.get(node.name, ())) for splits in different)
            key: tuple[Any, ...] = (id(matched), tiles)
            if self.saved is not None:
                key = (*key, self.saved.of(node.name), self.saved.counted_elsewhere(node))
            if self.only is not None:
                key = (*key, self.only.get(node.name))
            if key not in shared:
                shared[key] = self.states_of(node, matched)
            states = self.states[node.name] = shared[key]
            self.network.strategies[node.name] = states.joints
            self.network.costs[node.name] = states.costs
            if states.usage is not None:
                usage, count = states.usage, len(states.joints)
                if places[node.name] > moment.place:
                    usage = nothing.setdefault(count, np.zeros(count))
                elif node.name == moment.call:
                    usage = self.peak_usage(node, states)
                self.network.usage[node.name] = usage
            self.network.rules[node.name] = matched.rule
            if self.saved is not None:
                self.network.saved_for_backward[node.name] = self.saved.reads_saved_by(node)

    def known_saved(self) -> SavedTensors | None:
        """Return what calls save, where another network of the same graph has found it."""
        known = self.known
        if known is None or known.graph is not self.graph or known.matched is not self.matched:
            return None
        blocks = known.recomputation
        return blocks.saved if blocks is not None and blocks.device == self.pace.device else None

    def states_of(self, node: Node, matched: MatchedCall) -> CallStates:
        """Return the states of one call: its strategies on the whole mesh, and their costs."""
        call = matched.call
        operands = tuple(operand.requires_grad for operand in call.operands)
        results = tuple(result.requires_grad for result in call.results)
        rule = matched.rule
        if rule is None:
            rule = rule_of_whole_tensors(call)
            if node.name in self.inert:
                operands = (False,) * len(operands)
        alone: dict[int, tuple[Strategy, ...]] = {}
        per_axis: list[tuple[Strategy, ...]] = []
        for size, splits, in_time in zip(self.sizes, self.splits, self.in_time, strict=True):
            if id(splits) not in alone:
                tiles = splits.tiles.get(node.name, ())
                able = strategies(rule, tiles, operands, results, size)
                if in_time:
                    able = tuple(
                        one for one in able if _is_possible_in_time(one, operands, results)
                    )
                    split = tuple(one for one in able if one.tile is not None)
                    able = split if split and self.network.shares.in_parts else able
                alone[id(splits)] = able
            per_axis.append(alone[id(splits)])
        shapes = [value.shape for value in (*call.operands, *call.results)]
        joints = self.arranged_joints(
            node.name, joint_strategies(rule, per_axis, shapes, self.sizes), per_axis
        )
        if not joints:
            # On ranks alone, every op can be computed whole by all.
            raise CoupledBatchError(
                f"{node.target} cannot be computed for one micro-batch after the other",
                where=f"{node.where or 'the model itself'}\n{node.line}".rstrip(),
                why="no rule says that it can be computed in parts of its batch, or that gradients "
                "of parts add up",
                fix="pass microbatches=1, or leave pp out of the mesh",
            )
        axes = tuple(zip(self.sizes, self.links, strict=True))
        costs = op_costs(call, matched.rule, [joint.parts for joint in joints], axes, self.pace)
        counted = (False,) * len(results)
        usage = None
        if self.saved is not None:
            counted = self.saved.counted_elsewhere(node)
            usage = np.array([self.saved.nbytes(node, joint, self.sizes) for joint in joints])
        results_layouts = tuple(
            ProducerLayouts(tuple(joint.results[place] for joint in joints), counted=counted[place])
            for place in range(len(results))
        )
        return CallStates(joints, costs, results_layouts, usage)

    def arranged_joints(
        self,
        name: str,
        joints: tuple[MeshStrategy, ...],
        per_axis: Sequence[tuple[Strategy, ...]],
    ) -> tuple[MeshStrategy, ...]:
        """Return the joint strategies of a call that are asked for, in one order where that is left
        open.

        per_axis: the strategies on each axis alone, by whose places those of equal axes are sorted.
        """
        wanted = None if self.only is None else self.only.get(name)
        if not self.groups and wanted is None:
            return joints
        ranks = [{part: place for place, part in enumerate(parts)} for parts in per_axis]
        place = {axis: group[0] for group in self.equal for axis in group}

        def parts_of(joint: MeshStrategy) -> tuple[Strategy, ...]:
            pairs = [(ranks[place[axis]][part], part) for axis, part in enumerate(joint.parts)]
            return tuple(part for _, part in arranged(pairs, self.equal, lambda pair: pair[0]))

        if not self.groups:
            return tuple(joint for joint in joints if parts_of(joint) in (wanted or ()))
        distinct = dict.fromkeys(parts_of(joint) for joint in joints)
        in_order = (MeshStrategy.of(parts) for parts in distinct)
        return tuple(
            MeshStrategy(
                joint.parts,
                tuple(arranged_layout(layout, self.groups) for layout in joint.operands),
                tuple(arranged_layout(layout, self.groups) for layout in joint.results),
            )
            for joint in in_order
        )

    def peak_usage(self, node: Node, states: CallStates) -> Array:
        """Return, per state, the saved bytes of a call plus those of its live gradients.

        node: the call at whose backward the memory is counted.
        """
        assert self.saved is not None
        assert states.usage is not None
        gradients = [self.saved.gradient_nbytes(node, joint, self.sizes) for joint in states.joints]
        return states.usage + np.array(gradients)


def _is_possible_in_time(
    strategy: Strategy, operand_grads: tuple[bool, ...], result_grads: tuple[bool, ...]
) -> bool:
    """Return whether micro-batches, computed one after the other, can run an op so.

    They exchange nothing. What has a gradient is no single computation of all of them: each adds
    its own summand.
    """
    if strategy.kernel is not None and strategy.kernel.collectives:
        return False
    placements = (*strategy.operands, *strategy.results)
    pairs = zip(placements, (*operand_grads, *result_grads), strict=True)
    return not any(grad and placement == Invariant() for placement, grad in pairs)
