"""Repeated blocks of a graph: equal runs of calls, each of which one module call became.

Rules, strategies and costs are the same for equal blocks, and need be found for one of them alone.
Blocks are found by what they compute: whether and how modules are numbered does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from autoparallel.graph.checkpoints import without_regions
from autoparallel.graph.graph import Dim, Graph, Node, Ref, map_leaves

__all__ = ["Block", "Key", "Repeats", "find_repeats"]

# A kind of blocks, and a place inside of each block of that kind.
Key = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """The calls that one module call became: nodes[start:stop] of the graph, all of kind "call".

    path: of the module; "path@2" is its third call. kind: a number, equal for blocks that compute
    the same function of inputs of equal shape and type. index: how many blocks of its kind come
    before it. inputs: values that it reads and does not produce, in the order in which they are
    read first. outputs: values that others read, or that are returned or written back, in the order
    in which they are produced. own: nodes of parameters and buffers that it alone reads; they are
    no inputs. Inputs, outputs and own tensors of blocks of one kind correspond by their places.
    """

    path: str
    kind: int
    index: int
    start: int
    stop: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """The path with a star for every number: equal for the blocks of one ModuleList."""
        return _NUMBER.sub("*", self.path)


@dataclass(frozen=True)
class Repeats:
    """The blocks of one graph, in the order of the program; none overlaps another."""

    graph: Graph
    blocks: tuple[Block, ...]

    @cached_property
    def firsts(self) -> tuple[Block, ...]:
        """The first block of each kind, at the index of the kind."""
        return tuple(block for block in self.blocks if block.index == 0)

    @cached_property
    def _places(self) -> Mapping[str, tuple[Block, int]]:
        """The block of each node that belongs to one, and the node's place in it."""
        return {
            name: (block, place)
            for block in self.blocks
            for place, name in enumerate(self._names(block))
        }

    def _names(self, block: Block) -> Iterator[str]:
        """Yield the block's nodes in one order, the same for all blocks of a kind: calls,
        then own tensors.
        """
        yield from (node.name for node in self.graph.nodes[block.start : block.stop])
        yield from block.own

    def block_of(self, node: str) -> Block | None:
        """Return the block that a call, or a tensor that it alone reads, belongs to;
        None outside of blocks.
        """
        place = self._places.get(node)
        return place[0] if place else None

    def key(self, node: str) -> Key | None:
        """Return a key that is equal for corresponding nodes of equal blocks;
        None outside of blocks.
        """
        place = self._places.get(node)
        return (place[0].kind, place[1]) if place else None

    @cached_property
    def _twins(self) -> Mapping[str, str]:
        """For nodes and values of later blocks, those of the first block of the kind."""
        twins: dict[str, str] = {}
        nodes = {node.name: node for node in self.graph.nodes}
        for block in self.blocks:
            first = self.firsts[block.kind]
            if block is first:
                continue
            for name, like in zip(self._names(block), self._names(first), strict=True):
                twins[name] = like
                for value, twin in zip(nodes[name].results, nodes[like].results, strict=True):
                    twins[value.name] = twin.name
        return twins

    def twin(self, name: str) -> str:
        """Return the node or value in the first block of its kind that corresponds to `name`.

        That is the node or value itself where it is in the first block or in none.
        """
        return self._twins.get(name, name)


def find_repeats(graph: Graph) -> Repeats:
    """Return the repeated blocks of a graph whose passes have run.

    A module call is a block if another one consists of the same ops; of calls inside of each other
    the outermost is taken, unless it is mostly a chain of blocks itself (one of two equal towers).
    Beside blocks, calls of modules that are numbered like them are blocks too (a first layer that
    computes something more), perhaps each of a kind of its own. A graph without repeats has none.
    """
    finder = _Finder(graph)
    chosen = sorted(finder.chosen, key=lambda call: call.start)
    kinds: dict[Any, int] = {}
    counts: dict[int, int] = {}
    blocks: list[Block] = []
    for call in chosen:
        content, inputs, outputs, own_tensors = finder.content(call)
        kind = kinds.setdefault(content, len(kinds))
        counts[kind] = counts.get(kind, -1) + 1
        path = call.scope[-1]
        blocks.append(
            Block(path, kind, counts[kind], call.start, call.stop, inputs, outputs, own_tensors)
        )
    return Repeats(graph, tuple(blocks))


_NUMBER = re.compile(r"\d+")


@dataclass(eq=False)
class _Call:
    """A module call: nodes[start:stop], and the calls inside of it that may be blocks.

    count: nodes among those that belong to it, which are fewer where another call's nodes lie in
    between. leaf: no call of a submodule is inside. ops: a number, equal for calls of the same ops.
    """

    scope: tuple[str, ...]
    start: int
    stop: int
    count: int = 0
    leaf: bool = True
    ops: int = -1
    inner: list[_Call] = field(default_factory=list)


class _Finder:
    """A search for the calls that are blocks.

    chosen: the blocks. stored: nodes of parameters and buffers by value. left: values that leave
    the graph. sequences: a number for each sequence of ops. members: how many calls have a
    sequence.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.chosen: list[_Call] = []
        self.stored = {node.result.name: node for node in graph.nodes if node.kind in _STORED}
        self.left = {*graph.outputs, *(name for _, name in graph.mutations)}
        self.whole = self.tree()
        self.sequences: dict[tuple[str, ...], int] = {}
        self.members: dict[int, int] = {}
        self.count(self.whole)
        self.choose(self.whole)

    def tree(self) -> _Call:
        """Return the whole program as a call, with the module calls nested as their scopes are."""
        nodes = self.graph.nodes
        whole = _Call((), 0, len(nodes))
        calls: dict[tuple[str, ...], _Call] = {(): whole}
        chains: dict[tuple[str, ...], tuple[_Call, ...]] = {}
        for index, node in enumerate(nodes):
            if node.kind != "call":
                continue
            if node.scope not in chains:
                # Blocks are the same with and without checkpoints.
                path = without_regions(node.scope)
                chains[node.scope] = tuple(
                    calls.setdefault(scope, _Call(scope, index, index))
                    for scope in (path[:end] for end in range(1, len(path) + 1))
                )
            for call in chains[node.scope]:
                call.stop = index + 1
                call.count += 1
        for scope in calls:
            if scope:
                calls[scope[:-1]].leaf = False
        for scope, call in calls.items():
            # Calls that cannot be blocks are skipped, and what is inside of them moves up.
            if scope and self.may_be(call):
                above = scope[:-1]
                while above and not self.may_be(calls[above]):
                    above = above[:-1]
                calls[above].inner.append(call)
        return whole

    def may_be(self, call: _Call) -> bool:
        """Return whether the call can be a block: its nodes are in one run,
        and it is more than a single layer.
        """
        # Nodes of another call in between: the block would not be one run.
        if call.count != call.stop - call.start:
            return False
        return not call.leaf or sum(len(shape) > 1 for shape in self.shapes(call)) > 1

    def shapes(self, call: _Call) -> tuple[tuple[Dim, ...], ...]:
        """Return the shapes of the parameters and buffers that the call reads, each once."""
        names = dict.fromkeys(
            name
            for node in self.graph.nodes[call.start : call.stop]
            for name in node.operands()
            if name in self.stored
        )
        return tuple(self.stored[name].result.shape for name in names)

    def count(self, above: _Call) -> None:
        """Number the sequences of ops; a call that consists of one other call is counted once."""
        for call in above.inner:
            ops = tuple(node.target for node in self.graph.nodes[call.start : call.stop])
            call.ops = self.sequences.setdefault(ops, len(self.sequences))
            # A wrapper and the module in it are the same run of nodes.
            if (call.start, call.stop) != (above.start, above.stop):
                self.members[call.ops] = self.members.get(call.ops, 0) + 1
            self.count(call)

    def choose(self, above: _Call) -> None:
        """Choose the blocks among the calls inside of `above`, from the outside inwards."""
        blocks = [
            call
            for call in above.inner
            if self.members.get(call.ops, 0) > 1 and not self.is_chain(call)
        ]
        # Blocks of one ModuleList belong together, also where one of them differs.
        lists = {_list_of(call) for call in blocks} - {None}
        for call in above.inner:
            if call in blocks or (_list_of(call) in lists and not self.is_chain(call)):
                self.chosen.append(call)
            else:
                self.choose(call)

    def is_chain(self, call: _Call) -> bool:
        """Return whether most of the call is equal blocks,
        each of which reads what the one before produced.
        """
        # More than half, so that a head or an embedding beside the chain does not matter.
        most = (call.stop - call.start) / 2
        alike: dict[Any, list[_Call]] = {}
        for inner in call.inner:
            if inner.count > most and self.is_chain(inner):
                return True
            alike.setdefault((inner.ops, self.shapes(inner)), []).append(inner)
        return any(
            len(members) > 1
            and sum(member.count for member in members) > most
            and all(map(self.feeds, members, members[1:]))
            for members in alike.values()
        )

    def feeds(self, first: _Call, second: _Call) -> bool:
        """Return whether the second call reads a value that the first one produces."""
        nodes = self.graph.nodes
        produced = {
            value.name for node in nodes[first.start : first.stop] for value in node.results
        }
        return any(
            name in produced
            for node in nodes[second.start : second.stop]
            for name in node.operands()
        )

    def content(self, call: _Call) -> tuple[Any, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Return the call with places in place of names, and its inputs,
        outputs and own tensors.
        """
        nodes = self.graph.nodes[call.start : call.stop]
        names = {node.name for node in nodes}
        # Names become the order in which they are met, so equal content has equal places.
        known: dict[str, Any] = {}
        inputs: list[str] = []
        own_tensors: list[str] = []
        outputs: list[str] = []

        def plain(leaf: Any) -> Any:
            """Return an argument without names. The type counts, because 1 == 1.0 == True."""
            if not isinstance(leaf, Ref):
                return (type(leaf), leaf)
            if leaf.name not in known:
                known[leaf.name] = outside(leaf.name)
            return known[leaf.name]

        def outside(name: str) -> Any:
            """Return the place and type of a value that the call does not produce."""
            value = self.graph.values[name]
            readers = self.graph.readers[name]
            is_own = name in self.stored and name not in self.left
            # Tied parameters are read by several blocks, and are inputs of each.
            is_own = is_own and all(reader.name in names for reader in readers)
            place, kind = (own_tensors, self.stored[name].kind) if is_own else (inputs, "")
            place.append(name)
            return (len(place), kind, value.shape, value.dtype, value.requires_grad)

        rows: list[Any] = []
        for number, node in enumerate(nodes):
            shapes = [(value.shape, value.dtype, value.requires_grad) for value in node.results]
            args, kwargs = map_leaves(plain, node.args), map_leaves(plain, node.kwargs)
            rows.append((node.target, args, kwargs, *shapes))
            for place, value in enumerate(node.results):
                known[value.name] = (number, place)
                readers: tuple[Node, ...] = self.graph.readers[value.name]
                if value.name in self.left or any(item.name not in names for item in readers):
                    outputs.append(value.name)
        content = (*rows, *(known[name] for name in outputs))
        return (
            content,
            tuple(inputs),
            tuple(outputs),
            tuple(self.stored[n].name for n in own_tensors),
        )


_STORED = ("parameter", "buffer")


def _list_of(call: _Call) -> str | None:
    """Return the list that the module is numbered in; None where its name has no number."""
    path = call.scope[-1].partition("@")[0]
    head, _, last = path.rpartition(".")
    starred = _NUMBER.sub("*", last)
    return f"{head}.{starred}" if starred != last else None
