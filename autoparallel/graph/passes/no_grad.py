"""A pass that writes regions under torch.no_grad as detach."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.graph import Graph, Node, Ref
from autoparallel.graph.passes.editing import rebuilt, renamed

__all__ = ["explicit_stops"]

_DETACH = "aten.detach.default"


def explicit_stops(graph: Graph) -> Graph:
    """A call without gradient that reads a value with one reads detach(%x) in its place.

    Why: the emitted program has no regions without gradient, and a gradient would flow through.
    After: only detach, and ops whose results can have no gradient (comparisons, say), produce
    values without gradient from values that have one; a second run is a no-op.
    """
    nodes: list[Node] = []
    # One detach serves all readers of a value.
    stopped: dict[str, str] = {}
    for node in graph.nodes:
        # Integers and truth values never have a gradient: their calls say nothing of a region.
        floating = any(v.dtype.is_floating_point or v.dtype.is_complex for v in node.results)
        stops = floating and not any(value.requires_grad for value in node.results)
        if node.kind == "call" and stops and node.target != _DETACH:
            for name in node.operands():
                value = graph.values[name]
                if value.requires_grad and name not in stopped:
                    stopped[name] = f"{name}_stopped"
                    detached = replace(value, name=stopped[name], requires_grad=False)
                    call = (_DETACH, (detached,), (Ref(name),), ())
                    nodes.append(Node(detached.name, "call", *call, node.scope, node.line))
            node = renamed(node, stopped)
        nodes.append(node)
    return rebuilt(graph, nodes, {})
