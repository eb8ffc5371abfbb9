"""Rows that are split into as many as values say: `x.split(counts.tolist())`.

A trace has a number for each count that is read, which nobody knows before the model runs. Where
they are all that a split reads, one behind the other, the graph has an op that reads the tensor of
counts instead. A pass may see what becomes of the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.graph.graph import Node, Ref
from autoparallel.graph.passes.row_orders import numel
from autoparallel.graph.passes.split_rows import SPLIT
from autoparallel.support.torch_private import expression_of

__all__ = ["CHECKS", "ITEMS", "CountedSplits", "is_checked", "is_only_for"]

# Checks of values, which a graph leaves out: they compute nothing.
CHECKS = {
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default",
    "aten._assert_scalar.default",
    "aten._assert_async.msg",
}
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
# Ops that read a number out of a tensor.
ITEMS = {"aten.item.default", "aten._local_scalar_dense.default"}
_SPLITS = {"aten.split_with_sizes.default", "aten.split.sizes"}


class CountedSplits:
    """The splits by counts in a graph that `builder` writes.

    counts: by nodes of the exported program, the vectors as they were when they were read.

    Example: `CountedSplits(builder).reads(node)`.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder
        self.counts: dict[Any, Ref] = {}

    def reads(self, node: Any) -> bool:
        """Return whether a number is a count by which rows are split, and nothing else is done with
        it; remember the vector that it is read of.
        """
        vector = _place(node)[0]
        if vector is None or not is_only_for(node, lambda user: _vector(user) is not None):
            return False
        if vector not in self.counts:
            builder = self.builder
            value = builder.value(builder.fresh("counts"), vector.meta["val"], False)
            args = builder.leaf_all((vector,))
            where = builder.origins.scope(vector), builder.origins.line(vector)
            copy = Node(value.name, "call", "aten.clone.default", (value,), args, (), *where)
            builder.add(copy, False, builder.origins.frames(vector))
            self.counts[vector] = Ref(value.name)
        return True

    def call(self, node: Any, call: Node) -> Node:
        """Return the call of a split as it is, or that of the op that splits by counts.

        node: of the exported program.
        """
        vector = _vector(node)
        if vector is None:
            return call
        dim = call.argument(2, "dim", 0)
        sizes = sum(expression_of(part.meta["val"]) for part in node.args[1])
        # It is all rows that are split.
        whole = self.builder.values[call.args[0].name].shape[dim]
        self.builder.equal_sizes[sizes] = numel((whole,))
        return replace(call, target=SPLIT, args=(call.args[0], self.counts[vector], dim), kwargs=())


def is_checked(node: Any) -> bool:
    """Return whether a node is a check, or a number that is computed for checks alone.

    What is read out of a tensor for a check of the user's is more than that.

    Example: `is_checked(node)`, a node of an exported program.
    """
    if str(node.target) in ITEMS:
        return all(str(user.target) in CHECKS for user in node.users)
    return _ends_in_checks(node)


def is_only_for(node: Any, takes: Callable[[Any], bool]) -> bool:
    """Return whether a number that is read out of a tensor is for what takes it, and for checks.

    takes: whether a node takes the number. Example: `is_only_for(node, lambda user: True)`.
    """
    others = [user for user in node.users if not takes(user)]
    return len(others) < len(node.users) and all(map(_ends_in_checks, others))


def _ends_in_checks(node: Any) -> bool:
    """Return whether a node is a check, or a number of which nothing but checks is made."""
    return str(node.target) in CHECKS or (
        isinstance(node.meta.get("val"), _NUMBERS) and all(map(_ends_in_checks, node.users))
    )


def _vector(node: Any) -> Any:
    """Return the vector with the sizes of a split's parts; None where the node is no such split."""
    if str(node.target) not in _SPLITS:
        return None
    places = [_place(size) for size in node.args[1]]
    vector = places[0][0] if places else None
    fits = vector is not None and vector.meta["val"].shape == (len(places),)
    return vector if fits and places == [(vector, at) for at in range(len(places))] else None


def _place(node: Any) -> tuple[Any, int]:
    """Return the vector of which a number is an element, and its place there; (None, 0) if none."""
    if not isinstance(node, torch.fx.Node) or str(node.target) not in ITEMS:
        return None, 0
    item: Any = node.args[0]
    picks = getattr(item.target, "__name__", "") == "getitem"
    part: Any = item.args[0] if picks else item
    takes = "aten.unbind.int" if picks else "aten.select.int"
    if str(part.target) != takes or part.args[1:2] not in ((), (0,)):
        return None, 0
    vector = part.args[0]
    if vector.meta["val"].dim() != 1 or vector.meta["val"].is_floating_point():
        return None, 0
    return vector, item.args[1 if picks else 2]
