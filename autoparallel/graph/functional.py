"""In-place ops become ops that make new values, where that means the same."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.errors import CaptureError
from autoparallel.graph.edit import Rename, rebuilt, renamed
from autoparallel.graph.graph import Graph, Node

__all__ = ["functional"]


def functional(graph: Graph) -> Graph:
    """%y = add_(%x, 1) becomes %y = add(%x, 1), and later reads of %x read %y.

    Why: a value must have one meaning. After: no in-place op left; what was written to a buffer is
    in the graph's mutations. Raises CaptureError where the memory written is also seen through
    another value that is read later, or belongs to an input or a parameter.
    """
    nodes: list[Node] = []
    names: Rename = {}
    memory: dict[str, str] = {}
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        last.update(dict.fromkeys(node.operands(), index))
    last.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
    mutations = dict(graph.mutations)
    for index, node in enumerate(graph.nodes):
        original = node
        node = renamed(node, names)
        packet, _, overload = node.target.removeprefix("aten.").partition(".")
        reads = original.operands()
        if node.kind == "call" and packet.endswith("_") and not packet.endswith("__"):
            written = reads[0]
            owner = memory.get(written, written)
            others = [
                name
                for name, base in memory.items()
                if base == owner and name != written and last.get(name, -1) > index
            ]
            if owner != written and last.get(owner, -1) > index:
                others.append(owner)
            home = graph.producers[owner]
            if others or home.kind in ("input", "parameter"):
                raise CaptureError(
                    f"{node.target} writes to memory that is read under another name",
                    where=", ".join(text for text in (node.where, node.line) if text),
                    why=f"%{written} shares memory with %{(others or [owner])[0]}",
                    fix="use the op that returns a new tensor (without the underscore)",
                )
            node = replace(node, target=f"aten.{packet[:-1]}.{overload}")
            for old, new in list(names.items()):
                if new == names.get(written, written):
                    names[old] = node.result.name
            names[written] = node.result.name
            memory[node.result.name] = owner
            if home.kind == "buffer":
                mutations[home.target] = node.result.name
        elif node.kind == "call" and reads and packet in _SHARES_MEMORY:
            for value in node.results:
                memory[value.name] = memory.get(reads[0], reads[0])
        nodes.append(node)
    made = rebuilt(graph, nodes, names)
    final = tuple((path, names.get(name, name)) for path, name in mutations.items())
    return replace(made, mutations=final)


_SHARES_MEMORY = frozenset(
    """
    view reshape _unsafe_view expand slice select transpose permute t unsqueeze squeeze split
    split_with_sizes chunk unbind narrow diagonal alias detach flatten unflatten movedim swapaxes
    expand_as view_as unfold contiguous to numpy_T mT
    """.split()
)
