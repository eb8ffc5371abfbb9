"""The calls of a graph that follow from inputs, buffers and constants alone, without a gradient."""

from __future__ import annotations

from autoparallel.graph.graph import Graph

__all__ = ["inert_calls"]


def inert_calls(graph: Graph) -> set[str]:
    """Return the calls that no gradient and no parameter touches: masks, positions, rotary tables.

    Every rank computes them whole.
    """
    touched: set[str] = set()
    inert: set[str] = set()
    for node in graph.nodes:
        grad = any(value.requires_grad for value in node.results)
        reads = node.kind == "call" and any(name in touched for name in node.operands())
        if node.kind == "parameter" or grad or reads:
            touched.update(value.name for value in node.results)
        # Only calls count: inputs and constants have no strategies.
        elif node.kind == "call":
            inert.add(node.name)
    return inert
