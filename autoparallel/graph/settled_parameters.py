"""Parameters that a forward brings into a range before it reads them, as by `weight.clamp_(-1, 1)`.

Such a write is made before the program runs, in the part that a rank holds: it looks at each number
by itself, and does nothing where it was made before, so that it may be made once or many times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from autoparallel.graph.aliasing import is_view, owner_of
from autoparallel.graph.graph import Graph, Node, Ref, leaves
from autoparallel.graph.operators import BRANCH_TAKEN, operator_of, packet_of
from autoparallel.graph.passes.editing import Rename, rebuilt, renamed
from autoparallel.support.torch_private import schema_of

__all__ = ["SettledParameter", "without_settling"]

# Views of all of a tensor, in its own shape.
_SAME = frozenset({"detach", "alias"})


@dataclass(frozen=True)
class SettledParameter:
    """A write of a forward to a parameter of its own.

    path: of the parameter. target: the op, by its name. args, kwargs: its numbers.
    """

    path: str
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def settle(self, held: torch.Tensor) -> None:
        """Make the write in a parameter, or in a part of it.

        >>> held = torch.tensor([3.0, -1.0])
        >>> SettledParameter("weight", "aten.clamp_.default", (0, 2)).settle(held)
        >>> held
        tensor([2., 0.])
        """
        # `data` has a version of its own: what autograd keeps of the parameter stays valid.
        operator_of(self.target)(held.data, *self.args, **dict(self.kwargs))


def without_settling(graph: Graph) -> tuple[Graph, tuple[SettledParameter, ...]]:
    """Return the graph without the writes that can be made before it, and these in their order.

    graph: as it was traced, with in-place ops. A write is left in it where something has read the
    parameter before, where other tensors or a gradient take part in it, where it reaches only a
    part of the parameter, and where a branch on values comes before it: with other values, the
    forward may not make it.
    """
    views: dict[str, str] = {}
    read: set[str] = set()  # parameters, and others
    settled: dict[str, tuple[SettledParameter, ...]] = {}  # by the parameter's path
    branched = False
    nodes: list[Node] = []
    names: Rename = {}
    for node in graph.nodes:
        branched |= node.target == BRANCH_TAKEN
        write = _write_of(graph, node, views)
        if write is not None:
            target = node.operands()[0]
            before = settled.get(write.path, ())
            after = (*before, write)
            first = not branched and owner_of(target, views) not in read
            if _alike(before, after) or (first and _alike(after, after * 2)):
                settled[write.path] = before if _alike(before, after) else after
                views[node.result.name] = target
                names[node.result.name] = names.get(target, target)
                continue
        if is_view(node.target) and node.kind == "call":
            views.update((value.name, node.operands()[0]) for value in node.results)
        else:
            read.update(owner_of(name, views) for name in node.operands())
        nodes.append(renamed(node, names))
    writes = tuple(write for several in settled.values() for write in several)
    return (rebuilt(graph, nodes, names) if settled else graph), writes


def _alike(some: tuple[SettledParameter, ...], others: tuple[SettledParameter, ...]) -> bool:
    """Return whether it makes no difference which of two runs of writes a parameter is given."""
    if not some:
        return False
    ends = []
    for writes in (some, others):
        held = torch.linspace(-50, 50, 2001, dtype=torch.float64).sinh_()
        for write in writes:
            write.settle(held)
        ends.append(held)
    return torch.equal(*ends)


def _write_of(graph: Graph, node: Node, views: dict[str, str]) -> SettledParameter | None:
    """Return the write that a call makes to all of a parameter, number by number, if it does.

    views: for each view the value that it is one of.
    """
    if node.kind != "call" or len(node.operands()) != 1 or len(node.results) != 1:
        return None
    operator = operator_of(node.target)
    schema = schema_of(operator)
    if schema is None or not schema.is_mutable or torch.Tag.pointwise not in operator.tags:
        return None
    name = node.operands()[0]
    if node.args[:1] != (Ref(name),) or node.result.requires_grad:
        return None
    numbers = (*leaves(node.args[1:]), *(value for _, value in node.kwargs))
    if not all(isinstance(number, (bool, int, float, type(None))) for number in numbers):
        return None
    while name in views:
        maker = graph.producers[name]
        if maker is not node and packet_of(maker.target) not in _SAME and not _is_dropped(maker):
            return None
        name = views[name]
    home = graph.producers[name]
    if home.kind != "parameter":
        return None
    return SettledParameter(home.target, node.target, node.args[1:], node.kwargs)


def _is_dropped(maker: Node) -> bool:
    """Return whether a value of a chain of views is that of a write, which returns its operand."""
    schema = schema_of(operator_of(maker.target))
    return schema is not None and bool(schema.is_mutable)
