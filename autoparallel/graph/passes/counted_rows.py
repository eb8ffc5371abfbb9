"""A pass that checks how many rows a mask keeps, where a forward takes their number for known.

`x[mask] + w` is right where the mask keeps as many rows as `w` has, of which a tracer has made one
size. Nothing else in a program would ask: a part of `w` may fit whatever a mask keeps of it.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch

from autoparallel.errors import CaptureError
from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, Value
from autoparallel.graph.operators import BRANCH_TAKEN
from autoparallel.graph.passes.editing import rebuilt
from autoparallel.graph.passes.masked_rows import next_check, unknown_symbols

__all__ = ["check_counts"]

_TRUTHS = (torch.bool, torch.uint8)
# Other calls that return as many elements as values say.
_COUNTING = {
    "aten._unique2.default",
    "aten.bincount.default",
    "aten.masked_select.default",
    "aten.unique_consecutive.default",
    "aten.unique_dim.default",
}
_Counted = tuple[str, Dim]  # a mask, and how many of its elements are to be true


def check_counts(graph: Graph) -> Graph:
    """%y = index(%x, %mask) of n rows is preceded by a check of sum(%mask) == n.

    Why: a call in which the mask keeps others must end as the forward itself would. After: each
    call whose result has as many rows as a mask keeps has a check, or rows of unknown number; a
    second run is a no-op. Raises CaptureError where several masks pick, or a mask of other dims.
    """
    unknown, names = unknown_symbols(graph), set(graph.values)
    known = {_checked(graph, node) for node in graph.calls if node.target == BRANCH_TAKEN}
    number = next_check(graph)
    nodes: list[Node] = []
    for node in graph.nodes:
        counted = _counted(graph, node, unknown) if node.kind == "call" else None
        if counted is not None and counted not in known:
            known.add(counted)
            nodes += _check(node, counted, number, names)
        nodes.append(node)
    return rebuilt(graph, nodes, {}) if len(nodes) > len(graph.nodes) else graph


def _counted(graph: Graph, node: Node, unknown: set[Any]) -> _Counted | None:
    """Return the mask whose true elements a call picks as rows of a known number, if it does."""
    read = [graph.values[name] for name in node.operands()]
    dims: list[int] = []  # of the result: those whose size is the number of rows
    masks: list[Value] = []
    if node.target == "aten.index.Tensor":
        given = [at for at, index in enumerate(node.args[1]) if index is not None]
        if all(index.dtype not in _TRUTHS for index in read[1:]):
            return None
        dims, masks = given, read[1:]
    elif node.target == "aten.nonzero.default":
        dims, masks = [0], read
    elif node.target not in _COUNTING:
        return None
    shape = node.results[0].shape
    if any(isinstance(size, Sym) and size.expr.free_symbols & unknown for size in shape):
        return None
    if 0 in read[0].shape:  # of nothing, the number is known
        return None
    if len(masks) != 1 or masks[0].dtype != torch.bool:
        raise CaptureError(
            "the number of elements of a tensor, which depends on values, is taken for known",
            why="a program asks whether it is right where one mask picks them, of their own dims",
            fix="index by one mask, or keep the shape: torch.where(mask, x, 0)",
        )
    return masks[0].name, shape[dims[0]]


def _checked(graph: Graph, check: Node) -> _Counted | None:
    """Return the mask and the number that a check of this pass asks for, if it is one."""
    equal = graph.producers[check.operands()[0]]
    if equal.target != "aten.eq.Scalar":
        return None
    total = graph.producers[equal.operands()[0]]
    number: Any = equal.args[1]
    return (total.operands()[0], number) if total.target == "aten.sum.default" else None


def _check(node: Node, counted: _Counted, number: int, names: set[str]) -> list[Node]:
    """Return the calls that check a mask, before the call that reads it."""
    mask, size = counted
    made: list[Node] = []
    source, integer, truth = Ref(mask), torch.int64, torch.bool
    for target, args, dtype in (
        ("aten.sum.default", (), integer),
        ("aten.eq.Scalar", (size,), truth),
        (BRANCH_TAKEN, (True, number), truth),
    ):
        base = f"{node.name}_count"
        name = next(new for at in count() if (new := f"{base}_{at}") not in names)
        names.add(name)
        result = (Value(name, (), dtype, False),)
        made.append(Node(name, "call", target, result, (source, *args), (), node.scope, node.line))
        source = Ref(name)
    return made
