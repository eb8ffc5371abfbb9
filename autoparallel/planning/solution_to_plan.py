"""A solution of the cost network is translated to a plan, in the words of the model, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from autoparallel.cost.op_costs import nbytes
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Graph, hint
from autoparallel.mesh import Mesh
from autoparallel.placement import Layout, whole_layout
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan, PlannedInput
from autoparallel.planning.gathers_ahead import with_gathers_ahead
from autoparallel.planning.regathered_copies import copies_to_regather
from autoparallel.planning.unsplit_reasons import is_left_whole, why_whole
from autoparallel.strategy.cost_network import CostNetwork, reduced_together
from autoparallel.strategy.parameter_storage import ParameterStorage
from autoparallel.strategy.zero_costs import zero_gradient_seconds
from autoparallel.support.pytree import leaf_paths
from planners import Solution

Told = TypeVar("Told", OpChoice, ParameterChoice)

__all__ = ["layouts_together", "plan_of_solution", "solution_of_plan", "with_reasons"]


def plan_of_solution(
    captured: Captured,
    model: str,
    mesh: Mesh,
    network: CostNetwork,
    solution: Solution,
    weight: float,
    added: Mapping[str, float] = {},
    regathering: frozenset[str] = frozenset(),
) -> Plan:
    """Return a solution of the network in the words of the model: layouts, ops, conversions.

    model: the name that the plan gives the model. weight: what a second of matrix products counted
    in the solution's cost. added: per node that is left unsharded and could be sharded, what
    sharding it would add to the cost; see unsplit_reasons.py. regathering: ops that keep no copies
    which are gathered for them alone: these are gathered again in the backward pass.
    The plan's seconds are those of its rows, added up, while its cost is the solution's own, in
    which products may weigh more.
    """
    chosen, graph = solution.assignment, network.graph
    recompute, recomputed, remade, made_again = network.recomputed(chosen)
    repeated = {name: number for number, group in enumerate(recomputed) for name in group}
    ops: list[OpChoice] = []
    seconds = 0.0
    made: dict[str, Layout] = {}
    for node in graph.nodes:
        # Parameters are as they are stored; inputs and buffers are whole on every rank.
        if node.kind != "call":
            storage = whole_layout(len(mesh.axes))
            if node.kind == "parameter":
                storage = network.storages[node.name][chosen[node.name]].storage
                seconds += float(network.updates[node.name].cost[chosen[node.name]])
            made[node.result.name] = storage
            continue
        strategy = network.strategies[node.name][chosen[node.name]]
        cost = network.costs[node.name][chosen[node.name]]
        rule = network.rules[node.name]
        # A recomputed op runs forward twice.
        again = cost.forward if node.name in repeated or node.name in made_again else 0.0
        seconds += cost.seconds + again
        is_whole = is_left_whole(network, node, chosen[node.name])
        for value, placement in zip(node.results, strategy.results, strict=True):
            made[value.name] = placement
        ops.append(
            OpChoice(
                name=node.name,
                target=node.target,
                where=node.where,
                line=node.line,
                reads=tuple(node.operands()),
                makes=tuple(value.name for value in node.results),
                operands=strategy.operands,
                results=strategy.results,
                kernels=strategy.kernels,
                seconds=cost.seconds + again,
                forward_seconds=cost.forward,
                flops=cost.flops,
                whole_flops=float(rule.flops * rule.points) if rule is not None else 0.0,
                discovered=rule.discovered if rule is not None else "",
                reason=why_whole(network, node, added) if is_whole else "",
                added=_finite(added.get(node.name, 0.0)),
            )
        )
    outputs = tuple(network.outputs[name][chosen[f"return:{name}"]] for name in graph.outputs)
    dropped = network.made_again(solution) | _remade_copies(graph, network, ops, made, made_again)
    if regathering:
        dropped |= copies_to_regather(network, ops, made, regathering - repeated.keys())
    conversions = _conversions(graph, network, ops, made, outputs, chosen, dropped, repeated)
    seconds += sum(conversion.seconds for conversion in conversions)
    plan = Plan(
        model=model,
        mesh=mesh,
        options=network.options,
        hardware=network.hardware.name,
        fingerprint=captured.graph.fingerprint,
        parameters=_parameters(graph, network, chosen, added),
        ops=tuple(ops),
        conversions=conversions,
        outputs=outputs,
        cost=solution.cost,
        lower_bound=solution.lower_bound,
        method=solution.method,
        seconds=seconds,
        product_weight=weight,
        captured=captured,
        recomputed=recomputed,
        recompute=recompute,
        remade=remade,
        inputs=_inputs(captured, graph),
        returned=tuple(leaf_paths(captured.outputs, "tensor")),
    )
    return with_gathers_ahead(plan, network.hardware)


def with_reasons(plan: Plan, network: CostNetwork, added: Mapping[str, float]) -> Plan:
    """Return the plan with what splitting would add, and the reasons, where something is whole.

    added: as of `plan_of_solution`.
    """
    nodes = {node.name: node for node in network.graph.nodes}

    def told(choices: Iterable[Told]) -> tuple[Told, ...]:
        return tuple(
            replace(
                choice,
                reason=why_whole(network, nodes[choice.name], added),
                added=_finite(added.get(choice.name, 0.0)),
            )
            if choice.reason
            else choice
            for choice in choices
        )

    return replace(plan, ops=told(plan.ops), parameters=told(plan.parameters))


def _inputs(captured: Captured, graph: Graph) -> tuple[PlannedInput, ...]:
    """Return the inputs, with the sizes of the example inputs and of the graph planned for."""
    return tuple(
        PlannedInput(
            name=node.result.name,
            path=path,
            dims=tuple(map(str, node.result.shape)),
            given=tuple(map(hint, node.result.shape)),
            planned=tuple(map(hint, graph.values[node.result.name].shape)),
            is_integer=not (node.result.dtype.is_floating_point or node.result.dtype.is_complex),
        )
        for node, path in zip(
            (node for node in captured.graph.nodes if node.kind == "input"),
            leaf_paths(captured.inputs, "tensor"),
            strict=True,
        )
    )


def layouts_together(plan: Plan, graph: Graph) -> dict[str, frozenset[Layout]]:
    """Return the layouts in which a plan's ops read each value that they read in several.

    A network has few sets of layouts for a value, or its states would be too many, and where it
    costs nothing to move the value, it has no variable for it, so that its readers choose as they
    like. On other hardware, or where saved bytes are counted, the same plan may then have a set
    that a network lacks: `build_network` takes these sets as `also`.
    """
    read: dict[str, dict[Layout, None]] = {}
    for op in plan.ops:
        for value, layout in zip(op.reads, op.operands, strict=True):
            read.setdefault(value, {})[layout] = None
    for name, layout in zip(graph.outputs, plan.outputs, strict=True):
        read.setdefault(name, {})[layout] = None
    # A buffer is written whole, on every rank.
    for _, name in graph.mutations:
        read.setdefault(name, {})[whole_layout(len(plan.mesh.axes))] = None
    return {name: frozenset(layouts) for name, layouts in read.items() if len(layouts) > 1}


def solution_of_plan(network: CostNetwork, plan: Plan) -> dict[str, int]:
    """Return the states of the network's variables that make `plan`, by the variables' names.

    network: one that was built with the plan's `layouts_together`, or the one that it was made by.
    This is the inverse of `plan_of_solution`. Raises PlanError for a plan of another program or
    mesh, and for one that the network's options do not allow.
    """
    if plan.fingerprint != network.graph.fingerprint or plan.mesh != network.mesh:
        raise PlanError(
            f"this plan is for another program, or another mesh than {network.mesh}",
            fix="begin with a plan of the same model, example inputs and mesh",
        )
    found: dict[str, int] = {}
    # Per value, the layouts that are read, and those that are saved for the backward pass: these
    # two sets are the state of the variable of a value with several readers.
    read: dict[str, dict[Layout, None]] = {}
    kept: dict[str, dict[Layout, None]] = {}

    def choose(name: str, states: Iterable[object], state: object) -> None:
        """Set a variable to the state that is equal to `state`."""
        place = next((index for index, one in enumerate(states) if one == state), None)
        if place is None:
            raise PlanError(f"{name} cannot be as this plan has it", fix="plan without it")
        found[name] = place

    for op in plan.ops:
        joints = network.strategies[op.name]
        choose(
            op.name,
            [(joint.operands, joint.results, joint.kernels) for joint in joints],
            (op.operands, op.results, op.kernels),
        )
        saved_for_backward = network.saved_for_backward.get(op.name, (False,) * len(op.reads))
        for value, layout, saved in zip(op.reads, op.operands, saved_for_backward, strict=True):
            read.setdefault(value, {})[layout] = None
            if saved:
                kept.setdefault(value, {})[layout] = None
    for parameter in plan.parameters:
        choose(
            parameter.name,
            network.storages[parameter.name],
            ParameterStorage(parameter.storage, parameter.gradient, parameter.state),
        )
    for name, layout in zip(network.graph.outputs, plan.outputs, strict=True):
        choose(f"return:{name}", network.outputs[name], layout)
        read.setdefault(name, {})[layout] = None
        kept.setdefault(name, {})[layout] = None
    # A buffer is written whole, on every rank.
    for _, name in network.graph.mutations:
        read.setdefault(name, {})[whole_layout(len(network.mesh.axes))] = None
    modes = dict(plan.recompute)
    blocks = network.recomputation
    for index, block in enumerate(blocks.blocks if blocks else ()):
        assert blocks is not None
        if len(blocks.modes[index]) > 1:
            mode = modes.get(block.path, "none")
            choose(blocks.variable(index), blocks.modes[index], mode)
    for name, _ in network.copy_variables:
        if name in found:
            continue
        # "value*" is the set of layouts of a value with several readers; the others that are left
        # are stand-ins with a single state.
        value = name.removesuffix("*")
        if not name.endswith("*") or value not in network.values:
            found[name] = 0
            continue
        edge = network.values[value]
        some = frozenset(kept.get(value, {})) if any(edge.kept) else frozenset()
        choose(
            name,
            [(frozenset(g), frozenset(k)) for g, k in zip(edge.groups, edge.kept, strict=True)],
            (frozenset(read[value]), some),
        )
    return found


def _parameters(
    graph: Graph, network: CostNetwork, chosen: Mapping[str, int], added: Mapping[str, float]
) -> tuple[ParameterChoice, ...]:
    """Return the layouts of every parameter, and the reason where it is left unsharded."""
    rows = []
    for node in graph.nodes:
        if node.kind != "parameter":
            continue
        is_whole = is_left_whole(network, node, chosen[node.name])
        value = node.result
        stored = network.storages[node.name][chosen[node.name]]
        rows.append(
            ParameterChoice(
                name=node.name,
                path=node.target,
                shape=tuple(hint(dim) for dim in value.shape),
                nbytes=nbytes(value),
                storage=stored.storage,
                gradient=stored.gradient,
                state=stored.state,
                reason=why_whole(network, node, added) if is_whole else "",
                added=_finite(added.get(node.name, 0.0)),
            )
        )
    return tuple(rows)


def _finite(cost: float) -> float:
    """Return a cost that JSON can hold: 0.0 for infinity, which stands for no plan at all."""
    return cost if math.isfinite(cost) else 0.0


def _remade_copies(
    graph: Graph,
    network: CostNetwork,
    ops: list[OpChoice],
    made: Mapping[str, Layout],
    made_again: frozenset[str],
) -> frozenset[tuple[str, Layout]]:
    """Return the copies, (value, layout), of what is made again, and of what is read for that
    alone: they are dropped after the forward pass, too.

    made: the layout in which each value is produced. made_again: ops that are made again one by
    one.
    """
    return frozenset(
        (value, layout)
        for op in ops
        if made_again
        for value, layout in zip(op.reads, op.operands, strict=True)
        if layout != made[value] and value not in network.weights and value not in graph.outputs
        if graph.producers[value].name in made_again
        or all(reader.name in made_again for reader in graph.readers[value])
    )


def _conversions(
    graph: Graph,
    network: CostNetwork,
    ops: list[OpChoice],
    made: Mapping[str, Layout],
    outputs: tuple[Layout, ...],
    chosen: Mapping[str, int],
    again: frozenset[tuple[str, Layout]],
    repeated: Mapping[str, int],
) -> tuple[Conversion, ...]:
    """Return the redistributions: every value that is read in another layout, once per layout.

    made: the layout in which each value is produced. outputs: the layouts that are returned.
    chosen: the state of every variable. again: values and layouts whose copies are dropped after
    the forward pass and redistributed again. repeated: the number of the group with which an op is
    recomputed. A value that only one such group reads is redistributed again with it.
    """
    invariant = whole_layout(len(network.mesh.axes))
    wanted: dict[tuple[str, Layout], list[str]] = {}
    for op in ops:
        for value, layout in zip(op.reads, op.operands, strict=True):
            if layout != made[value]:
                wanted.setdefault((value, layout), []).append(op.name)
    for value, layout in zip(graph.outputs, outputs, strict=True):
        if layout != made[value]:
            wanted.setdefault((value, layout), []).append("return")
    for path, value in graph.mutations:
        if made[value] != invariant:
            wanted.setdefault((value, invariant), []).append(f"write {path}")
    together = reduced_together(graph)
    rows = []
    for (name, target), reading in wanted.items():
        read = graph.values[name]
        routes = network.values[name].routes
        source = made[name]
        seconds = float(routes.seconds((target,))[routes.cells[source], 0])
        maker = graph.producers[name]
        # The gradient of a parameter may be reduce-scattered in place of the all-reduce (ZeRO).
        if maker.kind == "parameter":
            stored = network.storages[maker.name][chosen[maker.name]]
            edges, once = network.edges, network.shares.once
            zero = zero_gradient_seconds(read, stored, target, edges.links, edges.sizes)
            seconds += once * zero
            if once != 1.0:
                reduced = float(routes.reduced_seconds((target,))[routes.cells[source], 0])
                seconds -= (1 - once) * reduced
        # What is recomputed pays the forward half of its redistribution a second time.
        dropped = (name, target) in again
        groups = {repeated.get(reader.name) for reader in graph.readers[name]}
        inside = len(groups) == 1 and None not in groups and name not in graph.outputs
        if dropped or inside:
            seconds += float(routes.forward_seconds((target,))[routes.cells[source], 0])
        rows.append(
            Conversion(
                value=name,
                source=source,
                target=target,
                steps=routes.steps(source, target),
                readers=tuple(dict.fromkeys(reading)),
                shape=", ".join(map(str, read.shape)),
                nbytes=nbytes(read),
                requires_grad=read.requires_grad,
                seconds=seconds,
                together=name in together,
                again=dropped,
            )
        )
    return tuple(rows)
