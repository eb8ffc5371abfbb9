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

    is_free: all ops that may be given a gradient in another order take any. ordered: values that
    reach, themselves or by what is made of them, an op that does not, also where no gradient flows.
    moved: values that may lie in another order than that of their dims, which a conversion has
    brought.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.moved: set[str] = set()
        self.outputs = set(graph.outputs)
        # Gradients flow to whatever needs one, and values to all that is made of that. The rest,
        # such as masks and labels, has no gradient that could come in another order.
        flowing = self.made_of([name for name, v in graph.values.items() if v.requires_grad])
        self.is_free = all(
            takes_any_order(node.target) or flowing.isdisjoint(node.operands())
            for node in graph.calls
        )
        self.ordered: set[str] = set()
        for node in reversed(graph.calls):
            makes = {value.name for value in node.results}
            if not takes_any_order(node.target) or not self.ordered.isdisjoint(makes):
                self.ordered.update(node.operands())

    def placed(self, value: Value, placement: Placement) -> Placement:
        """Return a placement between which and another one a value is moved, with its dim outermost
        in memory where that saves a copy.
        """
        if not self.is_free or not isinstance(placement, Shard):
            return placement
        rows = value.shape[: placement.dim]
        inside = 0 < placement.dim < len(value.shape) - 1 and any(size != 1 for size in rows)
        whole = placement.blocks == placement.repeat == 1
        if not (inside and whole) or value.name in self.ordered:
            return placement
        if self.is_near_output(value.name):
            return placement
        self.moved |= self.made_of([value.name])
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

    def made_of(self, names: list[str]) -> set[str]:
        """Return some values and all that are computed of them."""
        made: set[str] = set()
        while names:
            name = names.pop()
            if name not in made:
                made.add(name)
                names += [v.name for node in self.graph.readers[name] for v in node.results]
        return made

    def returned(self, value: Value, name: str) -> str:
        """Return the text of an output, which lies in the order of its dims.

        name: by which it is read.
        """
        is_moved = value.name in self.moved and len(value.shape) > 1
        return f"{name}.contiguous()" if is_moved else name
