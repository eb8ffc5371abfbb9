"""Sizes of inputs that must be equal get one symbol, for graphs whose batch comes in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import sympy

from autoparallel.graph.captured import Captured, SizeNumber
from autoparallel.graph.graph import Dim, Graph, Node, Sym
from autoparallel.graph.passes.flattened_batches import is_pointwise
from autoparallel.support.pytree import with_constants

__all__ = ["with_equal_sizes"]

# Losses of rows: their operands have the rows in the first dim.
_OF_ROWS = {
    "aten.cross_entropy_loss.default",
    "aten.nll_loss.default",
    "aten.nll_loss_nd.default",
}
_GATHER = "aten.gather.default"


def with_equal_sizes(captured: Captured) -> Captured:
    """Return a traced model with one symbol for sizes of its inputs that it takes to be equal.

    Why: the tracer gives every input sizes of its own, (b, s) and (c, t), and all it knows after
    cross_entropy(reshape(%logits, (b*s, k)), reshape(%labels, (c*t,))) is that b*s is c*t. A part
    of the batch is one of the logits and of the labels only where b is c. After: sizes that an op
    takes to be equal are, and products of two inputs' sizes that are equal have equal factors,
    where they had in the example. Calls with other sizes do not fit, and are traced again. A second
    run is a no-op.
    """
    graph = captured.graph
    equal = _equal_symbols(graph)
    if not equal:
        return captured

    def leaf(item: Any) -> Any:
        """Return the argument or the size in the symbols that stand for all."""
        return Sym(item.expr.xreplace(equal), item.hint) if isinstance(item, Sym) else item

    guards = (guard.xreplace(equal) for guard in captured.guards)

    def constant(item: Any) -> Any:
        """Return what the model returns beside tensors, in the same symbols."""
        if isinstance(item, SizeNumber):
            return replace(item, expression=item.expression.xreplace(equal))
        return item

    return replace(
        captured,
        graph=graph.map_leaves(leaf).verify(),
        guards=tuple(guard for guard in guards if guard != sympy.true),
        outputs=with_constants(captured.outputs, constant),
    )


def _equal_symbols(graph: Graph) -> dict[Any, Any]:
    """Return the symbols that are equal to one that an earlier dim of the inputs has."""
    places: dict[Any, tuple[int, int]] = {}
    hints: dict[Any, int] = {}
    for number, node in enumerate(node for node in graph.nodes if node.kind == "input"):
        for dim, size in enumerate(node.result.shape):
            if isinstance(size, Sym) and size.expr.is_Symbol:
                places.setdefault(size.expr, (number, dim))
                hints[size.expr] = size.hint
    equal: dict[Any, Any] = {}
    for one, other in _taken_as_equal(graph):
        left, right = (size.expr.xreplace(equal) for size in (one, other))
        if left == right:
            continue
        factors = [sorted(side.free_symbols, key=lambda s: places.get(s, (-1, 0)))
                   for side in (left, right)]  # fmt: skip
        if not all(symbol in places for side in factors for symbol in side):
            continue
        pairs = list(zip(*factors, strict=False))
        if len(factors[0]) != len(factors[1]) or any(hints[a] != hints[b] for a, b in pairs):
            continue
        renamed = {max(pair, key=places.__getitem__): min(pair, key=places.__getitem__)
                   for pair in pairs if pair[0] != pair[1]}  # fmt: skip
        if sympy.expand(left.xreplace(renamed) - right.xreplace(renamed)) != 0:
            continue
        equal = {symbol: known.xreplace(renamed) for symbol, known in equal.items()} | renamed
    return equal


def _taken_as_equal(graph: Graph) -> Iterator[tuple[Sym, Sym]]:
    """Yield pairs of sizes that are equal in every call that the program can run."""
    for node in graph.calls:
        for sizes in _aligned(node, graph):
            symbolic = [size for size in sizes if isinstance(size, Sym)]
            yield from pairwise(dict.fromkeys(symbolic))


def _aligned(node: Node, graph: Graph) -> Iterator[list[Dim]]:
    """Yield the sizes that one call takes to be equal, or to be 1, which no symbol is."""
    shapes = [graph.values[name].shape for name in node.operands()]
    if node.target in _OF_ROWS:
        logits, target = shapes[:2]
        if len(target) == len(logits) - 1:
            rows = (logits[0], *logits[2:])
            yield from (list(pair) for pair in zip(rows, target, strict=True))
        elif len(target) == len(logits):
            yield from (list(pair) for pair in zip(logits, target, strict=True))
        return
    if node.target == _GATHER:
        dim = node.args[1] % max(1, len(shapes[0]))
        yield from (list(pair) for at, pair in enumerate(zip(*shapes, strict=True)) if at != dim)
        return
    if is_pointwise(node.target) and len(node.results) == 1:
        all_shapes = [*shapes, node.result.shape]
        for back in range(1, len(node.result.shape) + 1):
            yield [shape[-back] for shape in all_shapes if len(shape) >= back]
