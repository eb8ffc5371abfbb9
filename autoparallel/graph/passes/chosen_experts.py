"""A loop over experts says whose turn it is, by finding the tokens that have chosen the expert.

Either the numbers of the chosen experts are compared with the expert's own, or they are spread out
as zeros and ones along a dim of experts, of which one is selected.
"""

from __future__ import annotations

import contextlib

from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.passes.editing import first_operand
from autoparallel.graph.passes.sorted_experts import NoRowsError

__all__ = ["chosen_expert", "numbers_of_experts"]

# What may lie between the numbers of experts as zeros and ones and a mask of some of them.
_MASKED = {"aten.mul.Tensor", "aten.reshape.default", "aten.view.default"}


def chosen_expert(graph: Graph, tokens: str) -> tuple[str, int]:
    """Return the chosen experts, and the number of the one that the tokens have in common.

    Where some choices are masked out, it is the mask that is returned, with a last dim of experts.
    Raises NoRowsError where the value is not the tokens that chose an expert.
    """
    where = graph.producers[tokens]
    places = graph.producers[first_operand(where)] if where.kind == "call" else where
    columns = where.target == "aten.unbind.int" and where.args[1:] == (1,)
    if not columns or places.target != "aten.nonzero.default" or len(where.results) != 2:
        raise NoRowsError
    mask = graph.producers[first_operand(places)]
    place = [value.name for value in where.results].index(tokens)
    if mask.target == "aten.eq.Scalar" and isinstance(mask.args[1], int) and place == 0:
        return first_operand(mask), mask.args[1]
    if mask.target == "aten.select.int":
        turned = graph.producers[first_operand(mask)]
        order: tuple[int, ...] = (0, 1, 2)
        if turned.target == "aten.permute.default":
            order = tuple(dim % 3 for dim in turned.args[1])
            turned = graph.producers[first_operand(turned)]
        axis = mask.args[1] % 3
        left = [dim for at, dim in enumerate(order) if at != axis]
        if order[axis] == 2 and left[place] == 0:
            if turned.target not in _MASKED:
                return _one_hot(graph, turned)[0], mask.args[2]
            # It raises an error where a choice may be of several experts.
            numbers_of_experts(graph, turned.result.name)
            return turned.result.name, mask.args[2]
    raise NoRowsError


def numbers_of_experts(graph: Graph, name: str) -> str:
    """Return the numbers 0, 1, .. along the last dim of a mask, of which a row has one at most.

    Raises NoRowsError where it may have more, or has no such dim.
    """
    node, count = graph.producers[name], graph.values[name].shape[-1]
    if node.target not in _MASKED:
        return _one_hot(graph, node)[1]
    for operand in node.operands():
        # A row of a product has zeros where one of the factors has.
        if graph.values[operand].shape[-1:] == (count,):
            with contextlib.suppress(NoRowsError):
                return numbers_of_experts(graph, operand)
    raise NoRowsError


def _one_hot(graph: Graph, node: Node) -> tuple[str, str]:
    """Return the values of which a node tells which of 0, 1, .. each is, along a last dim, and
    these numbers. Raises NoRowsError where it does not.
    """
    while node.target == "aten.to.dtype":
        node = graph.producers[first_operand(node)]
    if node.target != "aten.eq.Tensor":
        raise NoRowsError
    column, numbers = (graph.producers[name] for name in node.operands())
    count = node.result.shape[-1]
    counted = numbers.target == "aten.arange.default" and numbers.args == (count,)
    last = (-1, len(node.result.shape) - 1)
    if not counted or column.target != "aten.unsqueeze.default" or column.args[1] not in last:
        raise NoRowsError
    return first_operand(column), numbers.result.name
