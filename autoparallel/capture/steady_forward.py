"""The check that a forward which leaves something behind does the same when called again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from autoparallel.capture.block_calls import AGAIN
from autoparallel.graph.aliasing import is_view, shares_memory
from autoparallel.graph.graph import Graph, Node, Ref, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.support.torch_private import schema_of

__all__ = ["is_steady"]


def is_steady(graph: Graph, results: int) -> bool:
    """Return whether the second of two calls in one graph computes what the first does.

    graph: returns what both calls return; the second call has its inputs through the op `again`.
    results: the number of tensors that one call returns. The second call may go on with what the
    first has left behind only where that was computed from numbers and sizes alone: parameters are
    trained and inputs are others by then, and random numbers are drawn anew.

    Example: a forward that keeps its causal mask for the next call is steady; one that adds its
    input to a running sum is not.
    """
    again = any(node.target == AGAIN for node in graph.calls)
    if not again or len(graph.outputs) != 2 * results:
        return False
    calls = _Calls(graph)
    first, second = graph.outputs[:results], graph.outputs[results:]
    alike = [calls.same[name] for name in first] == [calls.same[name] for name in second]
    fresh = calls.bound.isdisjoint(second)
    return alike and fresh and not calls.stale and calls.writes[0] == calls.writes[1]


class _Calls:
    """The values of both calls, numbered by how they are computed.

    same: a number for each value, equal for values that are computed alike. writes: the in-place
    ops of the first and of the second call. bound: values of the first call that depend on more
    than numbers and sizes. lasting: values that are parameters and buffers, which both calls may
    read. stale: the second call reads a bound value. draws: how many random ops the call at hand
    has had. written: how often each value was written to, by its number.
    """

    def __init__(self, graph: Graph) -> None:
        self.same: dict[str, int] = {}
        self.numbers: dict[Any, int] = {}
        self.writes: tuple[list[Any], list[Any]] = ([], [])
        self.bound: set[str] = set()
        self.lasting: set[str] = set()
        self.stale = self.second = False
        self.draws = 0
        self.written: Counter[int] = Counter()
        for node in graph.nodes:
            if node.target == AGAIN:
                self.begin(node)
            elif node.kind == "call":
                self.call(node, graph)
            else:
                self.give(node, (node.kind, node.target))
                names = self.bound if node.kind == "input" else self.lasting
                if node.kind != "constant":
                    names.add(node.result.name)

    def begin(self, node: Node) -> None:
        """Take up an input of the second call: it stands for that of the first."""
        # All inputs come before the other ops of the second call: the first one begins it.
        if not self.second:
            self.second, self.draws = True, 0
            self.written.clear()
        self.same[node.result.name] = self.same[node.operands()[0]]

    def call(self, node: Node, graph: Graph) -> None:
        """Number the results of an op, and see what they depend on."""
        operator, operands = operator_of(node.target), node.operands()
        seeded = operator is not None and torch.Tag.nondeterministic_seeded in operator.tags
        self.draws += seeded
        # Two random ops draw the same numbers if each is the n-th of its call.
        key = (*self.text(node), self.draws if seeded else None)
        writes = operator is None or schema_of(operator).is_mutable
        if writes:
            self.writes[self.second].append(key)
        if self.second:
            self.stale = self.stale or not self.bound.isdisjoint(operands)
        if operands and (writes or _is_itself(node, graph)):
            # A tracer goes on with the result of these in the operand's place.
            for value in node.results:
                self.same[value.name] = self.same[operands[0]]
                for names in (self.bound, self.lasting):
                    if operands[0] in names:
                        names.add(value.name)
            self.written[self.same[operands[0]]] += writes
            return
        self.give(node, key)
        if not self.second and (seeded or not (self.bound | self.lasting).isdisjoint(operands)):
            self.bound.update(value.name for value in node.results)

    def give(self, node: Node, key: Any) -> None:
        """Number the results of a node, equal keys alike."""
        for index, value in enumerate(node.results):
            self.same[value.name] = self.numbers.setdefault((key, index), len(self.numbers))

    def text(self, node: Node) -> tuple[Any, ...]:
        """Return the call with, for each value that it reads, the value's number and how often
        that was written to by then.
        """

        def leaf(item: Any) -> Any:
            """Return an argument with a value's number in place of its name."""
            if not isinstance(item, Ref):
                return repr(item)
            number = self.same[item.name]
            return ("value", number, self.written[number])

        kwargs = tuple((key, map_leaves(leaf, item)) for key, item in node.kwargs)
        return (node.target, _hashable(map_leaves(leaf, node.args)), _hashable(kwargs))


def _is_itself(node: Node, graph: Graph) -> bool:
    """Return whether the result may be the operand itself, as of a cast to the type it has."""
    if not shares_memory(node.target) or is_view(node.target) or len(node.results) != 1:
        return False
    value = graph.values[node.operands()[0]]
    return (value.shape, value.dtype) == (node.result.shape, node.result.dtype)


def _hashable(item: Any) -> Any:
    """Return nested lists and tuples as tuples."""
    return tuple(map(_hashable, item)) if isinstance(item, (list, tuple)) else item
