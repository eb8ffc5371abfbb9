"""The values of a program of which a split dim lies outermost in memory, so that parts of it are
gathered and scattered without a copy.
"""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.graph import Graph, Value
from autoparallel.placement import Placement, Shard
from autoparallel.rules.any_order import takes_any_order

__all__ = ["MemoryOrder"]

# A value so few ops before an output is not worth another order: the output would be copied.
_NEAR = 4


class MemoryOrder:
    """Decides where dims lie outermost.

    is_free: all ops of the graph take their operands in any order. moved: values that may lie in
    another order than that of their dims, because a conversion before them has brought it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.is_free = all(not n.operands() or takes_any_order(n.target) for n in graph.calls)
        self.moved: set[str] = set()
        self.outputs = set(graph.outputs)

    def placed(self, value: Value, placement: Placement) -> Placement:
        """Return a placement between which and another one a value is moved, with its dim outermost
        in memory where that saves a copy.
        """
        if not self.is_free or not isinstance(placement, Shard):
            return placement
        rows = value.shape[: placement.dim]
        inside = 0 < placement.dim < len(value.shape) - 1 and any(size != 1 for size in rows)
        whole = placement.blocks == placement.repeat == 1
        if not (inside and whole) or self.is_near_output(value.name):
            return placement
        self.follow(value.name)
        return replace(placement, outermost=True)

    def is_near_output(self, name: str) -> bool:
        """Return whether a value is returned, or one that is made of it by a few ops."""
        names, seen = [name], {name}
        for _ in range(_NEAR):
            if not self.outputs.isdisjoint(names):
                return True
            names = [
                value.name
                for some in names
                for reader in self.graph.readers[some]
                for value in reader.results
                if len(value.shape) > 1 and value.name not in seen
            ]
            seen.update(names)
        return False

    def follow(self, name: str) -> None:
        """Note that a value, and all that is made of it, may lie in another order."""
        names = [name]
        while names:
            some = names.pop()
            if some not in self.moved:
                self.moved.add(some)
                names += [v.name for node in self.graph.readers[some] for v in node.results]

    def returned(self, value: Value, name: str) -> str:
        """Return the text of an output, which lies in the order of its dims.

        name: by which it is read.
        """
        is_moved = value.name in self.moved and len(value.shape) > 2
        return f"{name}.contiguous()" if is_moved else name
