"""Which ops are run again in the backward pass, block by block, so that less has to be kept.

A block is one of a model's repeated modules. It keeps all that its backward pass needs ("none"), or
only what goes into it ("full"), or all but what lies between products of activations with each
other, which grows with the square of the sequence ("selective", arXiv:2205.05198).
"""

from __future__ import annotations

from collections.abc import Mapping

from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.repeated_blocks import Block, find_repeats
from autoparallel.rules.rule import ShardingRule

__all__ = ["MODES", "Recomputation"]

MODES = ("none", "selective", "full")


class Recomputation:
    """The modes of every block of a graph.

    asked: one of MODES for all blocks (a block without such products has nothing to select, and
    keeps all), or "auto" for a choice between them.
    """

    def __init__(
        self,
        graph: Graph,
        rules: Mapping[str, ShardingRule | None],
        weights: frozenset[str],
        asked: str,
    ) -> None:
        self.graph, self.rules, self.weights = graph, rules, weights
        self.blocks: tuple[Block, ...] = find_repeats(graph).blocks if asked != "none" else ()
        self.modes: list[tuple[str, ...]] = []
        self.groups: list[dict[str, tuple[str, ...]]] = []
        self.place: dict[str, int] = {}
        cores: dict[int, tuple[int, int] | None] = {}
        for index, block in enumerate(self.blocks):
            nodes = graph.nodes[block.start : block.stop]
            self.place.update((node.name, index) for node in nodes)
            if block.kind not in cores:
                cores[block.kind] = self._core(nodes)
            core = cores[block.kind]
            names = tuple(node.name for node in nodes)
            groups: dict[str, tuple[str, ...]] = {"none": (), "full": names}
            if core is not None:
                groups["selective"] = names[slice(*core)]
            modes = [mode for mode in MODES if mode in groups]
            if asked != "auto":
                modes = [asked if asked in groups else "none"]
            self.modes.append(tuple(modes))
            self.groups.append(groups)
        self._members = [
            {mode: frozenset(names) for mode, names in groups.items()} for groups in self.groups
        ]

    def _core(self, nodes: tuple[Node, ...]) -> tuple[int, int] | None:
        """Where the run of ops from the first to the last product of activations lies, if one of
        them follows from another."""
        reached: dict[str, int] = {}
        best: tuple[int, int] | None = None
        for index, node in enumerate(nodes):
            rule = self.rules.get(node.name)
            operands = node.operands()
            before = [reached[name] for name in operands if name in reached]
            product = (
                rule is not None
                and bool(rule.flops)
                and len(operands) > 1
                and not any(name in self.weights for name in operands)
            )
            if product and before:
                first = min(before)
                best = (min(first, best[0]) if best else first, index + 1)
            if any(name in self.weights for name in operands) and rule and rule.flops:
                continue  # what a layer makes of it is no longer part of the core
            if product:
                before.append(index)
            if before:
                reached.update((value.name, min(before)) for value in node.results)
        return best

    def block_of(self, name: str) -> int | None:
        """The number of the block that a node belongs to."""
        return self.place.get(name)

    def variable(self, block: int) -> str:
        """The name of the planner's variable of a block's mode."""
        return f"block:{self.blocks[block].path}"

    def inside(self, name: str, block: int) -> tuple[bool, ...]:
        """Per mode of the block, whether a node is run again."""
        return tuple(name in self._members[block][mode] for mode in self.modes[block])
