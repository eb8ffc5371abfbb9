"""The op for which a batch cannot be computed in parts, one after the other."""

from __future__ import annotations

from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.mesh import MICROBATCH, Mesh
from autoparallel.options import Options
from autoparallel.placement import Invariant, Placement, Replicate, Shard, Step
from autoparallel.strategy.build_network import build_network

__all__ = ["coupled_call"]


def coupled_call(graph: Graph, count: int, options: Options) -> Node | None:
    """Return the first op that needs more of its operands than a micro-batch has; None for none.

    graph: of the model. count: of micro-batches. It follows the placements on the axis of
    micro-batches alone, from the inputs on: what follows from a part of the batch is a part itself,
    or a summand, and the op is one that can make neither of what it reads.
    """
    hardware = find_hardware(options.hardware)
    try:
        network = build_network(graph, Mesh(**{MICROBATCH: count}), hardware, options)
    except PlanError:
        return None
    inert = inert_calls(graph)
    able: dict[str, set[Placement]] = {}
    for node in graph.nodes:
        if node.kind != "call":
            grad = node.kind == "parameter" and node.result.requires_grad
            whole: Placement = Replicate() if grad else Invariant()
            able[node.result.name] = {whole}
            if node.kind == "input" and node.result.shape:
                able[node.result.name].add(Shard(0))
            continue
        # What follows from the inputs alone is computed whole, once a step.
        if node.name in inert:
            able.update((value.name, {Invariant()}) for value in node.results)
            continue
        made: list[set[Placement]] = [set() for _ in node.results]
        in_parts = any(_is_part(place) for name in node.operands() for place in able[name])
        for joint in network.strategies[node.name]:
            pairs = zip(node.operands(), joint.operands, strict=True)
            if all(_reaches(able[name], layout[0], graph, name) for name, layout in pairs):
                for place, layout in enumerate(joint.results):
                    if _is_part(layout[0]) or not in_parts:
                        made[place].add(layout[0])
        if not all(made):
            return node
        able.update((value.name, some) for value, some in zip(node.results, made, strict=True))
    return None


def _is_part(placement: Placement) -> bool:
    """Return whether micro-batches have each another part of a value, or another summand."""
    return not isinstance(placement, Invariant | Replicate)


def _reaches(sources: set[Placement], target: Placement, graph: Graph, name: str) -> bool:
    """Return whether a value that may lie in any of some ways can be read in another."""
    if target in sources:
        return True
    grad = graph.values[name].requires_grad
    for source in sources:
        try:
            step = Step(0, source, target)
            moves = (step.forward, step.backward) if grad else (step.forward,)
        except (KeyError, ValueError):
            continue
        if all(move.collective is None for move in moves):
            return True
    return False
