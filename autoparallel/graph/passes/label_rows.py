"""A pass that gives the CTC loss a row of labels for each sequence."""

from __future__ import annotations

from dataclasses import replace

import torch

from autoparallel.graph.graph import Graph, Node, Ref, Value
from autoparallel.graph.passes.editing import first_operand, rebuilt

__all__ = ["apart_labels"]

_LOSS = "autoparallel.ctc_loss.default"


def apart_labels(graph: Graph) -> Graph:
    """ctc_loss(%scores, masked_select(%labels, %kept), .., sum(%kept, (-1,))) becomes
    ctc_loss(%scores, gather(%labels, 1, %order), .., sum(%kept, (-1,))), where %order has the
    labels that are kept first.

    Why: how many labels all sequences have depends on values, and a part of the sequences has a
    part of them that begins at an unknown place. After: no labels in one row are left that a mask
    keeps and counts; a second run is a no-op.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes += _apart(graph, node) if node.target == _LOSS else [node]
    return rebuilt(graph, nodes, {})


def _apart(graph: Graph, node: Node) -> list[Node]:
    """Return the loss with a row of labels for each sequence, behind what makes these; the loss as
    it is where it has them, or where other labels are counted than are in the row.
    """
    _, row, _, lengths = node.operands()
    picked = graph.producers[row]
    if picked.target not in ("aten.masked_select.default", "aten.index.Tensor"):
        return [node]
    mask = picked.args[1]
    if isinstance(mask, tuple):
        mask = mask[0] if len(mask) == 1 else None
    if not isinstance(mask, Ref) or not _counts(graph, lengths, mask.name):
        return [node]
    labels, kept = graph.values[first_operand(picked)], graph.values[mask.name]
    fits = labels.shape == kept.shape and labels.shape[:1] == node.result.shape
    if not fits or kept.dtype != torch.bool:
        return [node]
    base = f"{node.name}_labels"

    def value(name: str, dtype: torch.dtype) -> Value:
        """Return a value with a number for each label."""
        return Value(f"{base}_{name}", labels.shape, dtype)

    dropped, flags = value("dropped", torch.bool), value("flags", torch.bool)
    order, rows = value("order", torch.int64), value("rows", labels.dtype)
    sort = replace(node, name=f"{base}_sort", target="aten.sort.stable", results=(flags, order))
    options = (("stable", True), ("dim", 1), ("descending", False))
    return [
        _call(node, "aten.logical_not.default", dropped, mask),
        replace(sort, args=(Ref(dropped.name),), kwargs=options),
        _call(node, "aten.gather.default", rows, Ref(labels.name), 1, Ref(order.name)),
        replace(node, args=(node.args[0], Ref(rows.name), *node.args[2:])),
    ]


def _call(like: Node, target: str, result: Value, *args: object) -> Node:
    """Return a call with one result. like: the node whose place in the program it has."""
    return replace(like, name=result.name, target=target, results=(result,), args=args, kwargs=())


def _counts(graph: Graph, lengths: str, mask: str) -> bool:
    """Return whether a value says how often each row of a mask is true."""
    node = graph.producers[lengths]
    while node.target == "aten.to.dtype" and not node.result.dtype.is_floating_point:
        node = graph.producers[first_operand(node)]
    return (
        node.target == "aten.sum.dim_IntList"
        and first_operand(node) == mask
        and len(node.result.shape) == 1
        and node.argument(1, "dim") in ((-1,), (1,))
    )
