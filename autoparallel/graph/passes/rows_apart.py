"""Ops that treat every row by itself, whatever the order of rows is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autoparallel.graph.graph import Graph, Node, Ref, Value
from autoparallel.graph.operators import draws
from autoparallel.graph.passes.flattened_batches import is_pointwise

__all__ = ["keeps_rows_apart"]

# Ops on rows that name dims of their operand, and at which place of their arguments: none of them
# may be the dim of rows.
_NAMED_DIMS = {
    "aten.chunk.default": 2,
    "aten.split.Tensor": 2,
    "aten.split_with_sizes.default": 2,
    "aten.slice.Tensor": 1,
    "aten.select.int": 1,
    "aten.softmax.int": 1,
    "aten.log_softmax.int": 1,
    "aten.sum.dim_IntList": 1,
    "aten.mean.dim": 1,
    "aten.amax.default": 1,
    "aten.unsqueeze.default": 1,
    "aten.squeeze.dim": 1,
    "aten.unbind.int": 1,
}
# Ops of the last dims of their first operand, whatever lies before them.
_OF_LAST_DIMS = {"aten.linear.default", "aten.layer_norm.default", "aten.rms_norm.default"}


def keeps_rows_apart(graph: Graph, node: Node, has_rows: Callable[[Value], bool]) -> bool:
    """Return whether an op treats each row by itself, and draws no numbers.

    has_rows: whether a value has one part for each row. Example: `keeps_rows_apart(graph, node,
    search.has_rows)`.
    """
    if draws(node.target) or "dropout" in node.target:
        return False
    if is_pointwise(node.target):
        return True
    rank = len(graph.values[node.operands()[0]].shape) if node.operands() else 0
    if node.target in _OF_LAST_DIMS:
        dims = len(node.args[1]) if "norm" in node.target else 1
        return dims < rank
    if node.target == "aten.cat.default":
        return all(isinstance(item, Ref) for item in node.args[0]) and (
            node.argument(1, "dim", 0) % len(node.result.shape) != 0
        )
    if node.target in ("aten.reshape.default", "aten.view.default"):
        return has_rows(graph.values[node.operands()[0]])
    if node.target == "aten.transpose.int":
        return all(dim % rank != 0 for dim in node.args[1:3])
    position = _NAMED_DIMS.get(node.target)
    if position is None:
        return False
    unsqueezed = rank + (node.target == "aten.unsqueeze.default")
    given = node.argument(position, "dim", 0)
    named: tuple[Any, ...] = given if isinstance(given, tuple) else (given,)
    return bool(named) and all(isinstance(dim, int) and dim % unsqueezed != 0 for dim in named)
