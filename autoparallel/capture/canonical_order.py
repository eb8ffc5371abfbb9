"""One order for calls that a forward makes in any order, as in a loop over a set.

`for kind in set(kinds): rotary[kind] = self.rotary_emb(x, kind)` runs in another order in every
process, because the hashes of strings differ (PYTHONHASHSEED). The programs compute the same, but
they would be other graphs, with other names and other fingerprints: a plan would not fit the model
it was made for, and the ranks of one job would not agree. Here such calls are put in the order in
which their results are first read, which every process sees alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby

import torch

from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.graph.graph import Graph, Node, Ref, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.support.torch_private import schema_of

__all__ = ["in_canonical_order"]

_Frames = Mapping[str, tuple[str, ...]]
# Nodes that stay together: one call outside of modules, or all that one module call became.
_Item = list[Node]


def in_canonical_order(graph: Graph, builder: GraphBuilder, anew: bool = False) -> Graph:
    """Return the same program with the independent calls of each statement in order of first use.

    graph: as traced. builder: has built it, and knows the statement and the unnumbered name of each
    call. anew: whether nodes were left out, so that names are given anew in any case.
    Calls change places only within one statement of one forward, run once or several times in a
    row, and only if none of them reads what another computes. Statements that write in place or
    draw random numbers stay as they are: there the order has a meaning. Names and the numbers of
    module calls are given anew, in the new order. A graph in canonical order is returned as it is.
    A loop whose body has several statements stays as it was traced.

    Example: `in_canonical_order(graph, builder).fingerprint`.
    """
    calls = _Arrangement(graph, builder.frames).in_order(list(graph.calls))
    if calls == list(graph.calls) and not anew:
        return graph
    return _renamed(graph, calls, builder.bases)


class _Arrangement:
    """Places the calls of a graph from the last to the first.

    All readers of a result are later than the call that produces it. Seen from the end, they are
    where they will stay when that call is placed.

    frames: as in GraphBuilder. ranks: of the calls placed so far; the earlier in the program, the
    lower. returned: places of the values that are returned or written back. live: names of the
    calls that these, or calls with effects, depend on.
    """

    def __init__(self, graph: Graph, frames: _Frames) -> None:
        self.frames = frames
        self.readers = graph.readers
        self.ranks: dict[str, int] = {}
        returned = (*graph.outputs, *(name for _, name in graph.mutations))
        self.returned = {name: index for index, name in reversed(list(enumerate(returned)))}
        self.live: set[str] = set()
        for node in reversed(graph.calls):
            if any(self._is_used(value.name) for value in node.results) or _has_effect(node):
                self.live.add(node.name)

    def _is_used(self, value: str) -> bool:
        """Return whether a value is returned or read by a call that is live."""
        readers = self.readers[value]
        return value in self.returned or any(node.name in self.live for node in readers)

    def in_order(self, nodes: _Item, depth: int = 0) -> list[Node]:
        """Place the calls of one module call, `depth` module calls below the whole model.

        nodes: in the order of the trace. Returns them in their new order.
        """
        placed: list[Node] = []
        # By statement: the lines of the forwards that are at work, down to this module's.
        for _, run in reversed(list(_runs(nodes, depth, self.frames))):
            for item in reversed(self._by_first_use(run)):
                if len(item[0].scope) > depth:
                    placed += reversed(self.in_order(item, depth + 1))
                else:
                    self.ranks[item[0].name] = -len(self.ranks)
                    placed += item
        return placed[::-1]

    def _by_first_use(self, run: list[_Item]) -> list[_Item]:
        """Return the items of one statement, the independent ones in order of first use."""
        if len(run) == 1 or any(_has_effect(node) for item in run for node in item):
            return run
        parts = self._independent(run)
        return [item for part in sorted(parts, key=self._first_use) for item in part]

    def _independent(self, run: list[_Item]) -> list[list[_Item]]:
        """Return the items in parts that do not read from each other, by the first item of each.

        A part whose results nobody needs goes along with the item behind it.
        """
        above = list(range(len(run)))  # a forest, whose trees are the parts
        producers: dict[str, int] = {}

        def root(index: int) -> int:
            """Return the first item of the part that an item is in, and shorten the way to it."""
            while above[index] != index:
                above[index] = index = above[above[index]]
            return index

        def join(first: int, second: int) -> None:
            """Make one part of those that two items are in."""
            low, high = sorted((root(first), root(second)))
            above[high] = low

        for index, item in enumerate(run):
            for node in item:
                for name in node.operands():
                    if name in producers:
                        join(producers[name], index)
                producers.update((value.name, index) for value in node.results)
        used = {
            root(index)
            for index, item in enumerate(run)
            if any(node.name in self.live for node in item)
        }
        for index in range(len(run) - 2, -1, -1):
            if root(index) not in used:
                join(index, index + 1)
                used.add(root(index))
        parts: dict[int, list[_Item]] = {}
        for index, item in enumerate(run):
            parts.setdefault(root(index), []).append(item)
        return list(parts.values())

    def _first_use(self, part: list[_Item]) -> tuple[int, int]:
        """Return (rank of the first reader, which of its operands) of a part's results.

        Results that are returned come after those that are read. All ranks are 0 or less.
        """
        values = {value.name for item in part for node in item for value in node.results}
        uses = [
            (self.ranks[reader.name], reader.operands().index(name))
            for name in values
            for reader in self.readers[name]
            if reader.name in self.ranks
        ]
        uses += [(1, self.returned[name]) for name in values if name in self.returned]
        return min(uses, default=(2, 0))


def _runs(
    nodes: _Item, depth: int, frames: _Frames
) -> Iterable[tuple[tuple[str, ...], list[_Item]]]:
    """Return (statement, its items) for one module call, in the order of the program.

    A statement is the lines of the forwards that are at work, down to the module's own.
    """

    def call(node: Node) -> object:
        """Return a value that is equal for neighbours that one inner module call became."""
        return node.scope[: depth + 1] if len(node.scope) > depth else node.name

    def statement(item: _Item) -> tuple[str, ...]:
        """Return the lines that an item was made in."""
        lines = frames.get(item[0].name, ())[: depth + 1]
        # A name is no line: what cannot be told is a statement of its own.
        return lines if len(lines) > depth else (item[0].name,)

    items = [list(group) for _, group in groupby(nodes, call)]
    return [(lines, list(group)) for lines, group in groupby(items, statement)]


def _has_effect(node: Node) -> bool:
    """Return whether it matters when the call runs: it writes in place or draws, or is unknown."""
    operator = operator_of(node.target)
    schema = schema_of(operator)
    if schema is None or schema.is_mutable:
        return True
    return torch.Tag.nondeterministic_seeded in operator.tags


def _renamed(graph: Graph, calls: list[Node], bases: Mapping[str, str]) -> Graph:
    """Return the graph with its calls in this order, named as if they had been traced in it.

    bases: names without numbers, in the order in which names were given.
    """
    names = GraphBuilder()
    stored = {node.name: node for node in graph.nodes if node.kind != "call"}
    for name, base in bases.items():
        if name in stored:
            names.fresh(base)
    renamed: dict[str, str] = {}
    scopes: dict[tuple[str, ...], tuple[str, ...]] = {(): ()}
    counts: dict[tuple[tuple[str, ...], str], int] = {}

    def rename(item: object) -> object:
        """Return an argument with a reference under its new name."""
        return Ref(renamed.get(item.name, item.name)) if isinstance(item, Ref) else item

    nodes = list(stored.values())
    for node in calls:
        single = len(node.results) == 1 and node.result.name == node.name
        # A cast under autocast is named by its operand, which has another name now.
        operand, cast, rest = bases[node.name].rpartition("_cast")
        base = renamed.get(operand, operand) + cast + rest
        name = names.fresh(base, 1 if single else len(node.results))
        results = tuple(
            replace(value, name=name if single else f"{name}_{index}")
            for index, value in enumerate(node.results)
        )
        renamed |= {old.name: new.name for old, new in zip(node.results, results, strict=True)}
        for end in range(1, len(node.scope) + 1):
            inside = node.scope[:end]
            if inside not in scopes:
                outer, path = scopes[inside[:-1]], inside[-1].partition("@")[0]
                count = counts[outer, path] = counts.get((outer, path), -1) + 1
                scopes[inside] = (*outer, f"{path}@{count}" if count else path)
        nodes.append(
            replace(
                node,
                name=name,
                results=results,
                args=map_leaves(rename, node.args),
                kwargs=tuple((key, map_leaves(rename, item)) for key, item in node.kwargs),
                scope=scopes[node.scope],
            )
        )
    return Graph(
        tuple(nodes),
        tuple(renamed.get(name, name) for name in graph.outputs),
        tuple((path, renamed.get(name, name)) for path, name in graph.mutations),
    )
