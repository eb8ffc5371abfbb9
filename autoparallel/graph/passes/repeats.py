"""A pass that writes repetitions of the places along a dim as such: of heads of keys, mostly."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.graph import Graph, Node, Ref
from autoparallel.graph.passes.editing import first_operand, rebuilt

__all__ = ["explicit_repeats"]


def explicit_repeats(graph: Graph) -> Graph:
    """reshape(expand(unsqueeze(%x, 2), (b, 4, 2, s)), (b, 8, s)) becomes repeat_interleave(%x, 2,
    1).

    Why: where there are more ranks than %x has places, those that share one have other repetitions
    of it. In between, two dims would have to be split for that. After: no merge of a dim with one
    that was put behind it and expanded; a second run is a no-op.
    """
    nodes = []
    for node in graph.nodes:
        repeated = _repeated(node, graph) if node.target == "aten.reshape.default" else None
        nodes.append(node if repeated is None else repeated)
    return rebuilt(graph, nodes, {})


def _repeated(node: Node, graph: Graph) -> Node | None:
    """Return the repetition that a reshape ends; None where it ends none."""
    expand = graph.producers[first_operand(node)]
    if expand.target != "aten.expand.default":
        return None
    before = graph.producers[first_operand(expand)]
    if before.target not in ("aten.unsqueeze.default", "aten.reshape.default"):
        return None
    source = graph.values[first_operand(before)]
    wide, narrow = expand.result.shape, before.result.shape
    if len(wide) != len(narrow) or len(narrow) != len(source.shape) + 1:
        return None
    grown = [dim for dim, (old, new) in enumerate(zip(narrow, wide, strict=True)) if old != new]
    if len(grown) != 1 or not grown[0]:
        return None
    dim, times = grown[0] - 1, wide[grown[0]]
    size = source.shape[dim]
    if not (isinstance(times, int) and isinstance(size, int) and times > 1 and size > 1):
        return None
    inserted = (*source.shape[: dim + 1], 1, *source.shape[dim + 1 :])
    merged = (*source.shape[:dim], size * times, *source.shape[dim + 1 :])
    if narrow != inserted or node.result.shape != merged:
        return None
    target, args = "aten.repeat_interleave.self_int", (Ref(source.name), times, dim)
    return replace(node, target=target, args=args, kwargs=())
