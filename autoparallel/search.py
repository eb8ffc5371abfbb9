"""From a captured model to a plan: build the network, solve it, read the solution."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autoparallel.cost.collectives import conversion_seconds
from autoparallel.cost.compute import nbytes
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.capture import Captured
from autoparallel.graph.graph import Graph, hint
from autoparallel.graph.passes import at_least
from autoparallel.mesh import Mesh
from autoparallel.network import Network, build_network, reduced_together
from autoparallel.options import Options
from autoparallel.placement import Invariant, Placement
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
    stored: Mapping[str, Placement] | None = None,
    pins: Mapping[str, Placement] | None = None,
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
    network = build_network(
        graph, mesh.world_size, hardware, options, stored, whole_outputs=captured.part
    )
    paths = {node.target: node.name for node in graph.nodes if node.kind == "parameter"}
    unknown = [path for path in pins or {} if path not in captured.aliases]
    if unknown:
        raise PlanError(
            f"the model has no parameter {unknown[0]!r}", fix="see model.named_parameters()"
        )
    pinned: dict[str, Placement] = {}
    for path, pin in (pins or {}).items():
        name = paths.get(captured.aliases[path])
        if name is not None and pinned.setdefault(name, pin) != pin:
            raise PlanError(
                f"{path} is tied to {captured.aliases[path]}, which is pinned to {pinned[name]}",
                fix="pin one of the two, or both alike",
            )
    memo = Memo()
    given: tuple[str, ...] | None = None
    best: tuple[float, float, Solution, Problem] | None = None
    weights = _WEIGHTS if mesh.world_size > 1 else (1.0,)
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
    ops: list[OpChoice] = []
    seconds = 0.0
    made: dict[str, Placement] = {}
    for node in graph.nodes:
        if node.kind != "call":
            storage: Placement = Invariant()
            if node.kind == "parameter":
                storage = network.storages[node.name][chosen[node.name]]
                seconds += float(network.updates[node.name][chosen[node.name]])
            made[node.result.name] = storage
            continue
        strategy = network.strategies[node.name][chosen[node.name]]
        cost = network.costs[node.name][chosen[node.name]]
        rule = network.rules[node.name]
        seconds += cost.seconds
        whole = is_left_whole(network, node, chosen[node.name])
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
                kernel=strategy.kernel.name if strategy.kernel else "",
                seconds=cost.seconds,
                flops=cost.flops,
                whole_flops=float(rule.flops * rule.points) if rule is not None else 0.0,
                discovered=rule.discovered if rule is not None else "",
                reason=why_whole(network, node, added) if whole else "",
                added=_finite(added.get(node.name, 0.0)),
            )
        )
    outputs = tuple(network.outputs[name][chosen[f"return:{name}"]] for name in graph.outputs)
    conversions = _conversions(graph, network, ops, made, outputs)
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
    )


def _parameters(
    graph: Graph, network: Network, chosen: Mapping[str, int], added: Mapping[str, float]
) -> tuple[ParameterChoice, ...]:
    rows = []
    for node in graph.nodes:
        if node.kind != "parameter":
            continue
        whole = is_left_whole(network, node, chosen[node.name])
        value = node.result
        rows.append(
            ParameterChoice(
                name=node.name,
                path=node.target,
                shape=tuple(hint(dim) for dim in value.shape),
                nbytes=nbytes(value),
                storage=network.storages[node.name][chosen[node.name]],
                reason=why_whole(network, node, added) if whole else "",
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
    made: Mapping[str, Placement],
    outputs: tuple[Placement, ...],
) -> tuple[Conversion, ...]:
    """Every value that is read otherwise than it is made, once per target."""
    wanted: dict[tuple[str, Placement], list[str]] = {}
    for op in ops:
        for value, placement in zip(op.reads, op.operands, strict=True):
            if placement != made[value]:
                wanted.setdefault((value, placement), []).append(op.name)
    for value, placement in zip(graph.outputs, outputs, strict=True):
        if placement != made[value]:
            wanted.setdefault((value, placement), []).append("return")
    for path, value in graph.mutations:
        if made[value] != Invariant():
            wanted.setdefault((value, Invariant()), []).append(f"write {path}")
    together = reduced_together(graph)
    rows = []
    for (name, target), reading in wanted.items():
        whole = graph.values[name]
        rows.append(
            Conversion(
                value=name,
                source=made[name],
                target=target,
                readers=tuple(dict.fromkeys(reading)),
                shape=", ".join(map(str, whole.shape)),
                nbytes=nbytes(whole),
                requires_grad=whole.requires_grad,
                seconds=conversion_seconds(
                    made[name],
                    target,
                    nbytes(whole),
                    whole.requires_grad,
                    network.hardware,
                    network.world_size,
                    together=name in together,
                ),
                together=name in together,
            )
        )
    return tuple(rows)
