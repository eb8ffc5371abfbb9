"""Where gradients stop: regions under torch.no_grad, spelled out."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.graph import Graph, Node, Ref
from autoparallel.graph.passes.editing import rebuilt, renamed

__all__ = ["explicit_stops"]

_DETACH = "aten.detach.default"


def explicit_stops(graph: Graph) -> Graph:
    """What a call without gradient reads of values that have one, it reads as detach(%x).

    Why: the program that is emitted has no regions without gradient, and a gradient would flow
    through. After: only detach, and ops whose results can have no gradient (comparisons, say),
    make values without gradient from values that have one; a second run is a no-op.
    """
    nodes: list[Node] = []
    stopped: dict[str, str] = {}
    for node in graph.nodes:
        floating = any(v.dtype.is_floating_point or v.dtype.is_complex for v in node.results)
        stops = floating and not any(value.requires_grad for value in node.results)
        if node.kind == "call" and stops and node.target != _DETACH:
            for name in node.operands():
                value = graph.values[name]
                if value.requires_grad and name not in stopped:
                    stopped[name] = f"{name}_stopped"
                    made = replace(value, name=stopped[name], requires_grad=False)
                    nodes.append(
                        Node(made.name, "call", _DETACH, (made,), (Ref(name),), (), node.scope,
                             node.line)
                    )  # fmt: skip
            node = renamed(node, stopped)
        nodes.append(node)
    return rebuilt(graph, nodes, {})
