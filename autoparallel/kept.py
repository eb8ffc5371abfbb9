"""What stays in memory between the forward and the backward pass, value by value."""

from __future__ import annotations

from collections.abc import Mapping

from autoparallel.cost.compute import nbytes
from autoparallel.cost.saved import SavedTensors
from autoparallel.graph.graph import Graph, Node
from autoparallel.joint import Joint
from autoparallel.routes import layout_fraction
from autoparallel.rules.rule import ShardingRule

__all__ = ["Kept"]


class Kept:
    """What every op keeps for its backward pass, of what it reads, of what it makes, and besides.

    Views keep nothing, but what is kept of a view is kept of what it is a view of: that is where it
    is counted.
    """

    def __init__(self, graph: Graph, rules: Mapping[str, ShardingRule | None]) -> None:
        self.graph, self.rules = graph, rules
        self.saved = SavedTensors(graph, rules)
        self.of = self.saved.of
        self.viewed: dict[str, bool] = {}
        for node in reversed(graph.calls):
            aliases = self.saved.of(node.name).aliases
            for value, alias in zip(node.results, aliases, strict=True):
                if alias is not None:
                    self.viewed[value.name] = any(
                        self.is_kept(reader, tuple(_places(reader, value.name)))
                        for reader in graph.readers[value.name]
                    )

    def is_kept(self, node: Node, places: tuple[int, ...]) -> bool:
        """Whether the backward pass needs what `node` reads in these places."""
        saved = self.saved.of(node.name)
        return any(saved.operands[place] for place in places) or any(
            alias in places and self.viewed[value.name]
            for value, alias in zip(node.results, saved.aliases, strict=True)
        )

    def own(self, node: Node) -> tuple[bool, ...]:
        """Per result, whether its memory is counted elsewhere already: by its maker, as a view."""
        saved = self.saved.of(node.name)
        return tuple(
            kept or alias is not None
            for kept, alias in zip(saved.results, saved.aliases, strict=True)
        )

    def nbytes(self, node: Node, joint: Joint, sizes: tuple[int, ...]) -> float:
        """Bytes that an op keeps by itself: results, and what is neither result nor operand.

        Of several kernels the innermost one runs; to it the others' loops are as if split without.
        """
        shares: dict[str, float] = {}
        saved = self.saved.of(node.name)
        split = [(part, size) for part, size in zip(joint.parts, sizes, strict=True) if part.tile]
        split.sort(key=lambda item: item[0].kernel is not None and not item[0].kernel.wraps)
        innermost = next((part for part, _ in reversed(split) if part.kernel), None)
        for part, size in split:
            assert part.tile is not None
            if part is innermost:
                saved = self.saved.of_kernel(node.name, part.tile.loop, size)
            else:
                shares[part.tile.loop] = shares.get(part.tile.loop, 1.0) * part.fraction
        total = float(saved.internal_nbytes(shares))
        for value, layout, kept, alias in zip(
            node.results, joint.results, saved.results, saved.aliases, strict=True
        ):
            if kept and alias is None:
                total += nbytes(value) * layout_fraction(value.shape, layout, sizes)
        return total


def _places(node: Node, name: str) -> list[int]:
    return [place for place, operand in enumerate(node.operands()) if operand == name]
