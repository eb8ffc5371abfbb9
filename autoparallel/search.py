"""From a captured model to a plan: build the network, solve it, read the solution."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autoparallel.cost.compute import nbytes
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.capture import Captured
from autoparallel.graph.graph import Graph, hint
from autoparallel.graph.passes import at_least
from autoparallel.mesh import Mesh
from autoparallel.network import Network, build_network, reduced_together
from autoparallel.options import Options
from autoparallel.placement import Layout, layout_text, whole_layout
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan
from autoparallel.whole import added_costs, is_left_whole, why_whole
from planners import InfeasibleError, Memo, Problem, Solution, TooWideError, conditioning, exact

__all__ = ["read_plan", "search"]

# Shares that are enough: of the FLOPs of products with a weight, of the bytes of matrices.
ENOUGH_SPLIT = (0.99, 0.95)
_WEIGHTS = tuple(8.0**power for power in range(8))


def search(
    captured: Captured,
    model: str,
    mesh: Mesh,
    options: Options,
    stored: Mapping[str, Layout] | None = None,
    pins: Mapping[str, Layout] | None = None,
    product_weight: float | None = None,
) -> Plan:
    """The plan of least cost.

    stored: placements (by path) that parameters have already and keep. pins: placements (by path)
    to be tried. A model too small to be worth splitting is split all the same: products are
    weighted more, step by step, until 99% of their FLOPs and 95% of the bytes of matrices are
    split or more weight splits no more; product_weight fixes the weight instead.
    Raises UnsupportedOpError, and PlanError where the pins contradict each other.
    """
    graph = at_least(captured.graph, options.tokens)
    hardware = find_hardware(options.hardware)
    network = build_network(graph, mesh, hardware, options, stored, whole_outputs=captured.part)
    paths = {node.target: node.name for node in graph.nodes if node.kind == "parameter"}
    unknown = [path for path in pins or {} if path not in captured.aliases]
    if unknown:
        raise PlanError(
            f"the model has no parameter {unknown[0]!r}", fix="see model.named_parameters()"
        )
    pinned: dict[str, Layout] = {}
    for path, pin in (pins or {}).items():
        name = paths.get(captured.aliases[path])
        if name is not None and pinned.setdefault(name, pin) != pin:
            raise PlanError(
                f"{path} is tied to {captured.aliases[path]}, which is pinned to "
                f"{layout_text(pinned[name])}",
                fix="pin one of the two, or both alike",
            )
    memo = Memo()
    given: tuple[str, ...] | None = None
    best: tuple[float, float, Solution, Problem] | None = None
    weights = _WEIGHTS if mesh.world_size > 1 and not options.data_parallel else (1.0,)
    for weight in weights if product_weight is None else (product_weight,):
        problem = network.problem(weight, pinned)
        try:
            if given is None:
                try:
                    solution = exact.solve(problem, memo=memo)
                except TooWideError:
                    given = conditioning.cutset(problem)
            if given is not None:
                solution = conditioning.solve(problem, given=given, memo=memo)
        except InfeasibleError as error:
            raise PlanError(
                "no plan is possible", why=str(error), fix="loosen the options or the pins"
            ) from error
        found = (_split_share(network, solution), _split_bytes(network, solution))
        missing = sum(
            max(enough - own, 0.0) for own, enough in zip(found, ENOUGH_SPLIT, strict=True)
        )
        if best is None or missing < best[1] - 1e-9:
            best = (weight, missing, solution, problem)
        if not missing:
            break
    assert best is not None
    weight, _, solution, problem = best
    added = added_costs(network, problem, solution, memo) if given is None else {}
    return read_plan(captured, model, mesh, network, solution, weight, added)


def _split_share(network: Network, solution: Solution) -> float:
    """Share of the FLOPs of products with a weight that belong to ops that are split."""
    whole = split = 0.0
    for node in network.graph.calls:
        rule = network.rules[node.name]
        if rule is None or not rule.flops:
            continue
        if not any(name in network.weights for name in node.operands()):
            continue
        flops = float(rule.flops * rule.points)
        whole += flops
        if network.costs[node.name][solution.assignment[node.name]].flops < flops:
            split += flops
    return split / whole if whole else 1.0


def _split_bytes(network: Network, solution: Solution) -> float:
    """Share of the bytes of matrices that are stored split."""
    whole = split = 0
    for node in network.graph.nodes:
        if node.kind == "parameter" and len(node.result.shape) > 1:
            whole += nbytes(node.result)
            if not is_left_whole(network, node, solution.assignment[node.name]):
                split += nbytes(node.result)
    return split / whole if whole else 1.0


def read_plan(
    captured: Captured,
    model: str,
    mesh: Mesh,
    network: Network,
    solution: Solution,
    weight: float,
    added: Mapping[str, float] = {},
) -> Plan:
    """A solution of the network in the words of the model. weight: what products counted in it.

    added: what splitting would add to the cost, of what it leaves whole.
    """
    chosen, graph = solution.assignment, network.graph
    recompute, recomputed = network.recomputed(chosen)
    repeated = frozenset(name for group in recomputed for name in group)
    ops: list[OpChoice] = []
    seconds = 0.0
    made: dict[str, Layout] = {}
    for node in graph.nodes:
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
        again = cost.forward if node.name in repeated else 0.0
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
    again_made = network.made_again(solution)
    conversions = _conversions(graph, network, ops, made, outputs, chosen, again_made, repeated)
    seconds += sum(conversion.seconds for conversion in conversions)
    return Plan(
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
    )


def _parameters(
    graph: Graph, network: Network, chosen: Mapping[str, int], added: Mapping[str, float]
) -> tuple[ParameterChoice, ...]:
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
    return cost if math.isfinite(cost) else 0.0


def _conversions(
    graph: Graph,
    network: Network,
    ops: list[OpChoice],
    made: Mapping[str, Layout],
    outputs: tuple[Layout, ...],
    chosen: Mapping[str, int],
    again: frozenset[tuple[str, Layout]],
    repeated: frozenset[str],
) -> tuple[Conversion, ...]:
    """Every value that is read otherwise than it is made, once per target.

    again: values and targets that are dropped after the forward pass and made again. repeated: ops
    that are run again.
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
        seconds = float(routes.seconds(target)[routes.cells[source]])
        maker = graph.producers[name]
        if maker.kind == "parameter":
            stored = network.storages[maker.name][chosen[maker.name]]
            seconds += network.edges.late(read, stored, target)
        dropped = (name, target) in again
        if dropped or any(reader in repeated for reader in reading):
            seconds += float(routes.forward_seconds(target)[routes.cells[source]])
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
