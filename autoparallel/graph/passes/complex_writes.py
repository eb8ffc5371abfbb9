"""The pass that writes to parts of complex tensors by their real and imaginary parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoparallel.graph.graph import Graph, Node, Ref, Value
from autoparallel.graph.passes.editing import rebuilt

__all__ = ["real_scatters"]

_SCATTERS = ("aten.slice_scatter.default", "aten.select_scatter.default")


def real_scatters(graph: Graph) -> Graph:
    """slice_scatter(%x, %part) of complex numbers becomes one of their real and imaginary parts.

    Why: a write to a slice becomes such an op, and torch can differentiate the write, but not the
    op, where numbers are complex ("slice_scatter does not support automatic differentiation for
    outputs with complex dtype", torch 2.11 to 2.15, and select_scatter likewise). After: none of
    these ops has complex operands; surviving nodes keep name, shape and dtype; a second run is a
    no-op.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.target not in _SCATTERS or not node.result.dtype.is_complex:
            nodes.append(node)
            continue
        result = node.result
        real = (result.dtype.to_real(), result.requires_grad)
        operands: list[Any] = []
        for place, name in zip(("whole", "part"), node.operands()[:2], strict=True):
            value = graph.values[name]
            # What is conjugated lazily cannot be seen as real numbers.
            plain = replace(value, name=f"{node.name}_{place}_plain")
            pairs = Value(f"{node.name}_{place}", (*value.shape, 2), real[0], value.requires_grad)
            nodes.append(_call(node, "aten.resolve_conj.default", plain, Ref(name)))
            nodes.append(_call(node, "aten.view_as_real.default", pairs, Ref(plain.name)))
            operands.append(Ref(pairs.name))
        rank = len(result.shape)
        dim = node.argument(2, "dim", 0) % rank
        rest = tuple((key, value) for key, value in node.kwargs if key != "dim")
        pairs = Value(f"{node.name}_pairs", (*result.shape, 2), *real)
        written = _call(node, node.target, pairs, *operands, dim, *node.args[3:])
        nodes.append(replace(written, kwargs=rest))
        nodes.append(_call(node, "aten.view_as_complex.default", result, Ref(pairs.name)))
    return rebuilt(graph, nodes, {})


def _call(node: Node, target: str, result: Value, *args: Any) -> Node:
    """Return a node at the place of another one that makes `result` by an op of its own."""
    return replace(node, name=result.name, target=target, results=(result,), args=args, kwargs=())
