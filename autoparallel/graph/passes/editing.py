"""Edits that every pass makes: nodes that read other values, and graphs of other nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoparallel.graph.graph import Graph, Node, Ref, Value, map_leaves

__all__ = ["Rename", "expand_to", "first_operand", "rebuilt", "renamed", "reshape_to"]

# New names of values by their old names.
Rename = dict[str, str]


def renamed(node: Node, names: Rename) -> Node:
    """Return the node with the values that it reads renamed.

    names: new names by old ones; others stay.
    """
    if not names:
        return node

    def leaf(item: Any) -> Any:
        """Return the argument, renamed where it is a use of a value that is."""
        return Ref(names[item.name]) if isinstance(item, Ref) and item.name in names else item

    return replace(node, args=map_leaves(leaf, node.args), kwargs=map_leaves(leaf, node.kwargs))


def rebuilt(graph: Graph, nodes: list[Node], names: Rename) -> Graph:
    """Return the graph of `nodes`, with the values that it returns and writes back renamed."""
    return Graph(
        tuple(nodes),
        tuple(names.get(name, name) for name in graph.outputs),
        tuple((path, names.get(name, name)) for path, name in graph.mutations),
    )


def first_operand(node: Node) -> str:
    """Return the name of the tensor that is the node's first argument."""
    reference = node.args[0]
    assert isinstance(reference, Ref), node
    return reference.name


def reshape_to(like: Node, result: Value, source: Value) -> Node:
    """Return a reshape of `source` to the value `result`.

    like: the node whose place in the program it has.
    """
    return _view(like, "aten.reshape.default", result, source)


def expand_to(like: Node, result: Value, source: Value) -> Node:
    """Return an expansion of `source` to the value `result`."""
    return _view(like, "aten.expand.default", result, source)


def _view(like: Node, target: str, result: Value, source: Value) -> Node:
    """Return a call that gives `source` the shape of a new value."""
    args = (Ref(source.name), result.shape)
    return replace(like, name=result.name, target=target, results=(result,), args=args, kwargs=())
