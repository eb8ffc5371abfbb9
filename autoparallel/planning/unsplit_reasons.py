"""The reason why a parameter or a product is left unsharded, and what sharding it would cost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autoparallel.graph.graph import Graph, Node, hint
from autoparallel.placement import Shard
from autoparallel.strategy.cost_network import CostNetwork
from planners import Memo, Problem, Solution, TooWideError, least_among

__all__ = ["cost_of_splitting", "is_left_whole", "why_whole"]

# The two reasons that are not the rules' own.
DEARER = "splitting it would cost more than it saves"
IMPOSSIBLE = "no plan splits it under these options"


def is_left_whole(network: CostNetwork, node: Node, state: int) -> bool:
    """Return whether a parameter, or an op that has FLOPs, is unsharded in this state.

    state: the number of the parameter's storage, or of the op's strategy, in the network.
    """
    if node.kind == "parameter":
        return not any(isinstance(p, Shard) for p in network.storages[node.name][state].state)
    rule = network.rules[node.name]
    if rule is None or not rule.flops:
        return False
    # Where a rank does all the FLOPs there are, nothing is split, whatever the placements are.
    return network.costs[node.name][state].flops >= rule.flops * rule.points


def cost_of_splitting(
    network: CostNetwork, problem: Problem, solution: Solution, memo: Memo
) -> dict[str, float]:
    """Return, per unsharded node, what the cheapest plan that shards it costs more; at least 0.

    problem: the one that was solved. solution: its optimum, or another one. memo: the solver's, so
    that most of its tables need not be made again. Keys are the names of nodes that could be
    sharded. For each of them everything else is planned anew; infinity means that no plan shards
    it.
    The result is empty for a problem too wide to be solved exactly.
    """
    wanted: dict[str, list[int]] = {}
    for node in network.graph.nodes:
        if node.kind not in ("parameter", "call"):
            continue
        chosen = solution.assignment[node.name]
        if is_left_whole(network, node, chosen):
            count = problem.variable(node.name).size
            # The states that shard it. Where there is none, the reason is the rule's.
            split = [i for i in range(count) if not is_left_whole(network, node, i)]
            if split:
                wanted[node.name] = split
    try:
        least = least_among(problem, wanted, memo=memo) if wanted else {}
    except TooWideError:
        return {}
    return {name: max(cost - solution.cost, 0.0) for name, cost in least.items()}


def why_whole(network: CostNetwork, node: Node, added: Mapping[str, float]) -> str:
    """Return the reason, in words, why a node is left unsharded.

    added: see cost_of_splitting. That it would cost more than it saves is said only where the
    node could be sharded; else the reason is that of the ops that need it whole.
    """
    if network.world_size == 1:
        return "there is one rank"
    if network.only is not None:
        # Of a network of few states, it is the candidates that tell what could be.
        every = network.splits.values()
        if node.kind == "parameter":
            could = any(splits.shards[node.result.name] for splits in every)
        else:
            could = any(splits.tiles.get(node.name) for splits in every)
    elif node.kind == "parameter":
        choices = network.storages[node.name]
        could = any(isinstance(p, Shard) for choice in choices for p in choice.state)
    else:
        count = len(network.strategies[node.name])
        could = not all(is_left_whole(network, node, state) for state in range(count))
    if could:
        return IMPOSSIBLE if added.get(node.name) == np.inf else DEARER
    if node.kind == "call":
        return f"no loop of {node.target} can be split here"
    return _why_unsplittable(network.graph, network, node.result.name)


def _why_unsplittable(graph: Graph, network: CostNetwork, name: str) -> str:
    """Return the reason why no op that reads a parameter takes it in parts."""
    readers = graph.readers[name]
    shape = tuple(map(hint, graph.values[name].shape))
    if not any(size > 1 for size in shape):
        return f"{shape} has a single element"
    targets = ", ".join(dict.fromkeys(node.target for node in readers))
    why = _reasons(network, readers, name)
    return f"{targets} needs it whole{': ' if why else ''}{why}"


def _reasons(network: CostNetwork, readers: tuple[Node, ...], name: str) -> str:
    """Return the reasons that discovered rules give for loops of a value that stay whole."""
    reasons: dict[str, None] = {}
    for node in readers:
        rule = network.rules[node.name]
        for operand, dims in zip(node.operands(), rule.operands if rule else (), strict=bool(rule)):
            if rule is not None and operand == name:
                loops = (loop for names in dims for loop in names)
                reasons.update({rule.reasons[loop]: None for loop in loops if loop in rule.reasons})
    return "; ".join(reasons)
