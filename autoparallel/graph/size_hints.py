"""Larger hints for symbolic sizes, where example inputs are too small to plan for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import sympy

from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import (
    Dim,
    Graph,
    Node,
    Sym,
    numel_hint,
)

__all__ = ["with_larger_hints"]

_LOOK_UP = "aten.embedding.default"
_COUNT, _RUNNING_SUM = "aten.arange.", "aten.cumsum.default"


def with_larger_hints(captured: Captured, elements: int) -> Graph:
    """Return the same program with hints as for inputs of at least `elements` elements, if it takes
    such.

    Why: example inputs are often tiny, and a plan for tiny inputs saves latency, not work. Their
    batch grows: the first dims of the inputs, where they are symbolic, by one common factor; all
    other dims stay, because a model that takes a longer sequence than it was made for is rare.
    Names and expressions stay. No size is used that the model refuses: what the tracer took for
    granted holds, no size is negative, and no table of positions is read past its end.
    """
    graph = captured.graph
    shapes = [node.result.shape for node in graph.nodes if node.kind == "input"]
    hints = {dim.expr: dim.hint for shape in shapes for dim in shape if _is_free(dim)}
    batch = _batch(shapes)
    own = [
        numel_hint(tuple(dim for dim in shape if isinstance(dim, Sym)))
        for shape in shapes
        if any(isinstance(dim, Sym) and dim.expr in batch for dim in shape)
    ]
    factor = -(-elements // max(own)) if own else 1
    bounds = _table_bounds(graph) if factor > 1 else ()
    while factor > 1:
        grown = {expr: size * (factor if expr in batch else 1) for expr, size in hints.items()}
        kept = all(guard.subs(grown) != sympy.false for guard in captured.guards)
        if kept and all(expr.subs(grown) <= rows for expr, rows in bounds):
            larger = _resized(graph, grown)
            if larger is not None:
                return larger
        factor //= 2
    return graph


def _batch(shapes: Sequence[tuple[Dim, ...]]) -> frozenset[Any]:
    """Return the symbols that the batch consists of.

    They are first dims of inputs. A symbol that is a later dim of some input is the batch only
    where nothing else is: a mask of (sequence, sequence) does not make the sequence the batch, and
    a graph's adjacency matrix of (nodes, nodes) leaves its nodes the batch.
    """
    first = {dim.expr for shape in shapes for dim in shape[:1] if _is_free(dim)}
    later = {dim.expr for shape in shapes for dim in shape[1:] if _is_free(dim)}
    return frozenset(first - later or first)


def _is_free(dim: Dim) -> TypeGuard[Sym]:
    return isinstance(dim, Sym) and bool(dim.expr.is_Symbol)


def _table_bounds(graph: Graph) -> tuple[tuple[sympy.Expr, int], ...]:
    """Return sizes that are counted up to, as (size, rows of the table that is read at the numbers
    counted).

    The numbers may be shifted, masked or repeated on their way. Where the size is already beyond
    the rows they are put into buckets or the like, and it is no bound.
    """
    counted: dict[str, frozenset[Sym]] = {}
    bounds: dict[tuple[sympy.Expr, int], None] = {}
    for node in graph.nodes:
        sizes = frozenset(_counts(node))
        for name in node.operands():
            if not graph.values[name].dtype.is_floating_point:
                sizes |= counted.get(name, frozenset())
        for value in node.results:
            counted[value.name] = sizes
        if node.target == _LOOK_UP:
            rows = graph.values[node.operands()[0]].shape[0]
            if isinstance(rows, int):
                bounds |= dict.fromkeys((s.expr, rows) for s in sizes if s.hint <= rows)
    return tuple(bounds)


def _counts(node: Node) -> Iterator[Sym]:
    """Yield the symbolic size up to which the results of a node count."""
    if node.target.startswith(_COUNT):
        dims: Iterable[Any] = node.result.shape
    elif node.target == _RUNNING_SUM:
        dims = (node.result.shape[node.args[1]],)
    else:
        dims = ()
    return (dim for dim in dims if isinstance(dim, Sym))


def _resized(graph: Graph, sizes: dict[Any, int]) -> Graph | None:
    """Return the program with hints for these sizes of the inputs; None where a size comes out
    negative, or without end.

    Sizes that add up to a fixed one cannot all grow, and torch takes a large power for infinity.
    """
    resized: dict[Any, Sym] = {}

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Sym):
            return leaf
        if leaf.expr not in resized:
            size = leaf.expr.subs(sizes)
            resized[leaf.expr] = Sym(leaf.expr, int(size) if size <= sys.maxsize else -1)
        return resized[leaf.expr]

    grown = graph.map_leaves(resize)
    return grown if all(size.hint >= 0 for size in resized.values()) else None
