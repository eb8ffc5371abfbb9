"""The proof that turns of a loop which a call does not take would add nothing.

A loop over the places where a condition holds is traced with a turn for every place (see
`hit_loops.py`). That is the same where nothing leaves a turn but rows that it adds to a sum, and
where a place for which the condition does not hold has no rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from autoparallel.capture.branch_ways import ValueBranchError
from autoparallel.capture.graph_builder import GraphBuilder, written_by
from autoparallel.graph.graph import Graph, Node, Ref

__all__ = ["HitTurns"]

# Writes to rows that an index names: without rows they do nothing. And where they have the index.
_BY_ROWS = {"aten.index_add_.default": 2, "aten.index_put_.default": 1}
# Ops that hand on the numbers of their operand, or some of them.
_HANDS_ON = {
    "aten.unbind.int",
    "aten.select.int",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.squeeze.default",
    "aten.unsqueeze.default",
    "aten.to.dtype",
    "aten.detach.default",
}
# Ops that hand on all numbers, in another order or as another type.
_MOVES = {
    "aten.permute.default",
    "aten.transpose.int",
    "aten.t.default",
    "aten.numpy_T.default",
    "aten.view.default",
    "aten.reshape.default",
    "aten.unsqueeze.default",
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.detach.default",
    "aten.to.dtype",
}
# Comparisons that hold for counts above zero alone.
_ABOVE_ZERO = {("aten.gt.Scalar", 0), ("aten.ne.Scalar", 0), ("aten.ge.Scalar", 1)}


@dataclass(frozen=True)
class _Turn:
    """A turn: its loop, its place, the name of the condition, and its nodes as a range."""

    loop: int
    place: int
    condition: str
    start: int
    stop: int = -1


class HitTurns:
    """The turns of all loops over the places where a condition holds, as marks tell of them.

    builder: has the nodes between the marks.

    Example: `turns = HitTurns(builder)`, `turns.mark(node)` for each mark, then
    `turns.require_no_trace(graph)`.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder
        self.marks: list[_Turn] = []

    def mark(self, node: Any) -> None:
        """Note the beginning of a turn, or the end of a loop. node: of the exported program."""
        condition, place, loop = self.builder.leaf_all(node.args)
        self.marks.append(_Turn(loop, place, condition.name, len(self.builder.nodes)))

    def require_no_trace(self, graph: Graph) -> None:
        """Raise ValueBranchError where a turn without rows would leave a trace.

        graph: of all nodes, in the order in which they were added.
        """
        for turn, after in pairwise([*self.marks, None]):
            if turn is None or turn.place < 0:
                continue
            if after is None or after.loop != turn.loop:
                raise _unproven(None, "it ends before all places have had their turn")
            self.require_rows_alone(graph, turn, graph.nodes[turn.start : after.start])

    def require_rows_alone(self, graph: Graph, turn: _Turn, nodes: tuple[Node, ...]) -> None:
        """Raise ValueBranchError where anything but rows that are written leaves a turn."""
        made = {value.name for node in nodes for value in node.results}
        inside = {node.name for node in nodes}
        for node in nodes:
            owners = {self.builder.memory_of(name) for name in written_by(node)}
            if owners <= made:
                continue
            place = _BY_ROWS.get(node.target)
            index = None if place is None else node.args[place]
            index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
            along = node.target != "aten.index_add_.default" or node.args[1] == 0
            if not (along and isinstance(index, Ref) and self.is_of_rows(graph, index.name, turn)):
                raise _unproven(node, "it writes to more than the rows that a place has")
            # Whoever reads the sum reads the result of the write.
            made -= {value.name for value in node.results}
        kept = {*graph.outputs, *(name for _, name in graph.mutations)}
        for name in made:
            outside = [node for node in graph.readers[name] if node.name not in inside]
            if outside or name in kept:
                raise _unproven(graph.producers[name], "what a turn computes is used after it")

    def is_of_rows(self, graph: Graph, name: str, turn: _Turn) -> bool:
        """Return whether an index has rows only where the condition holds for the turn's place."""
        places = _source(graph, graph.producers[name], {"aten.nonzero.default"})
        if places is None:
            return False
        row = graph.producers[places.operands()[0]]
        while row.target in _HANDS_ON and row.target != "aten.select.int":
            row = graph.producers[row.operands()[0]]
        if row.target != "aten.select.int" or row.args[1:] != (0, turn.place):
            return False
        return row.operands()[0] == _counted(graph, turn.condition)


def _source(graph: Graph, node: Node, targets: set[str]) -> Node | None:
    """Return the node of one of these ops whose numbers a node hands on, None if there is none."""
    while node.target not in targets:
        if node.target not in _HANDS_ON:
            return None
        node = graph.producers[node.operands()[0]]
    return node


def _counted(graph: Graph, condition: str) -> str:
    """Return the value of which a condition says which rows have anything in them; "" if none."""
    node = graph.producers[condition]
    if node.kind == "call" and node.args[1:2] and (node.target, node.args[1]) in _ABOVE_ZERO:
        node = graph.producers[node.operands()[0]]
    if node.target not in ("aten.sum.dim_IntList", "aten.any.dims"):
        return ""
    source = graph.values[node.operands()[0]]
    rank = len(source.shape)
    dims = node.argument(1, "dim")
    keeps = node.argument(2, "keepdim", False)
    # Numbers below zero may take away what others add, and a small type has the sum of many wrong.
    if node.target == "aten.sum.dim_IntList" and (
        node.argument(3, "dtype") is not None or not _counts(graph, source.name)
    ):
        return ""
    if keeps or not isinstance(dims, tuple) or {dim % rank for dim in dims} != {*range(1, rank)}:
        return ""
    return source.name


def _counts(graph: Graph, name: str) -> bool:
    """Return whether a value has zeros and ones alone."""
    while graph.values[name].dtype != torch.bool:
        node = graph.producers[name]
        if node.target == "aten.one_hot.default":
            return True
        if node.target == "aten.mul.Tensor" and not node.kwargs:
            factors = [leaf.name for leaf in node.args if isinstance(leaf, Ref)]
            return len(factors) == 2 and all(_counts(graph, factor) for factor in factors)
        if node.target not in _MOVES:
            return False
        name = node.operands()[0]
    return True


def _unproven(node: Node | None, why: str) -> ValueBranchError:
    """Return the error for a loop of which turns may not be added."""
    return ValueBranchError(
        "the forward loops over the places where a condition holds",
        where="" if node is None else node.line,
        why=f"how often it does depends on values, and {why}",
        fix="loop over all places, with the rows of each by torch.where, added by index_add_",
    )
