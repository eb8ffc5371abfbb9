"""Whether a forward that leaves something behind goes the same way when it is called again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from autoparallel.graph.aliasing import is_view, shares_memory
from autoparallel.graph.graph import Graph, Node, Ref, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.support.torch_private import schema_of

__all__ = ["is_steady"]

_AGAIN = "autoparallel.again.default"


def is_steady(graph: Graph, results: int) -> bool:
    """Whether the second of two calls in one graph computes what the first does.

    The graph returns what both return, `results` tensors each; the second call is given the inputs
    through an op of its own. It may go on with what the first has left behind only where that was
    computed from numbers and sizes alone: parameters are trained and inputs are others by then,
    and random numbers are drawn anew.
    """
    again = any(node.target == _AGAIN for node in graph.calls)
    if not again or len(graph.outputs) != 2 * results:
        return False
    calls = _Calls(graph)
    first, second = graph.outputs[:results], graph.outputs[results:]
    alike = [calls.same[name] for name in first] == [calls.same[name] for name in second]
    fresh = calls.bound.isdisjoint(second)
    return alike and fresh and not calls.stale and calls.writes[0] == calls.writes[1]


class _Calls:
    """same: a number for each value, equal for values that are computed alike. writes: what each
    call writes in place. bound: values of the first call that are not of numbers and sizes alone.
    stale: whether the second call reads one of those."""

    def __init__(self, graph: Graph) -> None:
        self.same: dict[str, int] = {}
        self.numbers: dict[Any, int] = {}
        self.writes: tuple[list[Any], list[Any]] = ([], [])
        self.bound: set[str] = set()
        self.lasting: set[str] = set()  # parameters and buffers
        self.stale = self.second = False
        self.draws = 0
        self.written: Counter[int] = Counter()
        for node in graph.nodes:
            if node.target == _AGAIN:
                self.begin(node)
            elif node.kind == "call":
                self.call(node, graph)
            else:
                self.give(node, (node.kind, node.target))
                kept = self.bound if node.kind == "input" else self.lasting
                if node.kind != "constant":
                    kept.add(node.result.name)

    def begin(self, node: Node) -> None:
        """An input of the second call: it stands for that of the first."""
        if not self.second:
            self.second, self.draws = True, 0
            self.written.clear()
        self.same[node.result.name] = self.same[node.operands()[0]]

    def call(self, node: Node, graph: Graph) -> None:
        """Number what an op makes, and see what it is made of."""
        operator, operands = operator_of(node.target), node.operands()
        seeded = operator is not None and torch.Tag.nondeterministic_seeded in operator.tags
        self.draws += seeded
        key = (*self.spelled(node), self.draws if seeded else None)
        writes = operator is None or schema_of(operator).is_mutable
        if writes:
            self.writes[self.second].append(key)
        if self.second:
            self.stale = self.stale or not self.bound.isdisjoint(operands)
        if operands and (writes or _is_itself(node, graph)):
            # A tracer goes on with the result of these in the operand's place.
            for value in node.results:
                self.same[value.name] = self.same[operands[0]]
                for kept in (self.bound, self.lasting):
                    if operands[0] in kept:
                        kept.add(value.name)
            self.written[self.same[operands[0]]] += writes
            return
        self.give(node, key)
        if not self.second and (seeded or not (self.bound | self.lasting).isdisjoint(operands)):
            self.bound.update(value.name for value in node.results)

    def give(self, node: Node, key: Any) -> None:
        """Number what a node makes."""
        for index, value in enumerate(node.results):
            self.same[value.name] = self.numbers.setdefault((key, index), len(self.numbers))

    def spelled(self, node: Node) -> tuple[Any, ...]:
        """The call, with the numbers of the values that it reads, and how often those were written
        to by then."""

        def leaf(item: Any) -> Any:
            if not isinstance(item, Ref):
                return repr(item)
            number = self.same[item.name]
            return ("value", number, self.written[number])

        kwargs = tuple((key, map_leaves(leaf, item)) for key, item in node.kwargs)
        return (node.target, _hashable(map_leaves(leaf, node.args)), _hashable(kwargs))


def _is_itself(node: Node, graph: Graph) -> bool:
    """Whether the result may be the operand, as of a cast to the type that it has."""
    if not shares_memory(node.target) or is_view(node.target) or len(node.results) != 1:
        return False
    value = graph.values[node.operands()[0]]
    return (value.shape, value.dtype) == (node.result.shape, node.result.dtype)


def _hashable(item: Any) -> Any:
    return tuple(map(_hashable, item)) if isinstance(item, (list, tuple)) else item
