"""Larger hints for symbolic sizes, where example inputs are too small to plan for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoparallel.graph.graph import (
    Graph,
    Sym,
    map_leaves,
    numel_hint,
)

__all__ = ["with_larger_hints"]


def with_larger_hints(graph: Graph, elements: int) -> Graph:
    """Return the same program with hints as for inputs of at least `elements` elements.

    Why: example inputs are often tiny, and a plan for tiny inputs saves latency, not work. The last
    symbolic dim of every input grows by one common factor; names and expressions stay. The graph is
    returned as it is where it needs no growth, has no symbolic sizes, or where sizes that add up to
    a fixed one cannot all grow.
    """
    inputs = [node.result for node in graph.nodes if node.kind == "input"]
    largest = max(
        (numel_hint(tuple(d for d in value.shape if isinstance(d, Sym))) for value in inputs),
        default=elements,
    )
    # Rounded up: -(-a // b) is the ceiling of a / b.
    factor = -(-elements // max(largest, 1))
    # A symbol may be a dim of several inputs; the first one decides.
    hints: dict[Any, int] = {}
    for value in inputs:
        symbolic = [dim for dim in value.shape if isinstance(dim, Sym)]
        for index, dim in enumerate(symbolic):
            if dim.expr.is_Symbol:
                hints.setdefault(dim.expr, dim.hint * (factor if index == len(symbolic) - 1 else 1))
    if factor <= 1 or not hints:
        return graph
    scaled: dict[Any, Sym] = {}

    def grow(leaf: Any) -> Any:
        """Return the size with the hint that follows from the inputs' new ones."""
        if not isinstance(leaf, Sym):
            return leaf
        if leaf.expr not in scaled:
            scaled[leaf.expr] = Sym(leaf.expr, int(leaf.expr.subs(hints)))
        return scaled[leaf.expr]

    nodes = tuple(
        replace(
            node,
            results=tuple(replace(v, shape=map_leaves(grow, v.shape)) for v in node.results),
            args=map_leaves(grow, node.args),
        )
        for node in graph.nodes
    )
    # Sizes that add up to a fixed one cannot all grow.
    possible = all(size.hint >= 0 for size in scaled.values())
    return replace(graph, nodes=nodes) if possible else graph
