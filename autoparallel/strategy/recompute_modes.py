"""Activation recomputation, block by block: the ops run again in the backward pass in each mode.

By default a block is a region that the model itself checkpoints, and is recomputed in full.
Otherwise it is the planner's choice:
A block is one of a model's repeated modules. In mode "none" it saves all that its backward pass
needs; in "full" only its inputs (arXiv:1604.06174); in "selective" all but what lies between
products of activations with each other, which grows with the square of the sequence
(arXiv:2205.05198).
"""

from __future__ import annotations

from collections.abc import Mapping

from autoparallel.graph.checkpoints import find_checkpoints
from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.repeated_blocks import Block, find_repeats
from autoparallel.rules.rule import ShardingRule

__all__ = ["MODES", "Recomputation"]

MODES = ("none", "selective", "full")


class Recomputation:
    """The recompute modes of every block of a graph.

    rules: per call node. weights: values computed from parameters alone. requested: "model" for the
    regions that the model checkpoints; or, whatever it checkpoints, one of MODES for all blocks (a
    block without products of activations has nothing to select, and saves all), or "auto" for a
    choice between all modes that a block has.
    blocks: the repeated blocks, or the regions. modes: per block, the modes to choose between.
    groups: per block and mode, the names of the ops run again. place: by node name, the number of
    its block.
    """

    def __init__(
        self,
        graph: Graph,
        rules: Mapping[str, ShardingRule | None],
        weights: frozenset[str],
        requested: str,
    ) -> None:
        self.graph, self.rules, self.weights = graph, rules, weights
        self.blocks = _blocks(graph, requested)
        self.modes: list[tuple[str, ...]] = []
        self.groups: list[dict[str, tuple[str, ...]]] = []
        self.place: dict[str, int] = {}
        cores: dict[int, tuple[int, int] | None] = {}
        for index, block in enumerate(self.blocks):
            nodes = graph.nodes[block.start : block.stop]
            self.place.update((node.name, index) for node in nodes)
            # Blocks of one kind are equal op by op, so their cores lie at the same places.
            if block.kind not in cores:
                cores[block.kind] = self._core(nodes)
            core = cores[block.kind]
            names = tuple(node.name for node in nodes)
            groups: dict[str, tuple[str, ...]] = {"none": (), "full": names}
            if core is not None:
                groups["selective"] = names[slice(*core)]
            modes = [mode for mode in MODES if mode in groups]
            if requested == "model":
                modes = ["full"]
            elif requested != "auto":
                # A block without a core has no selective mode: it saves all, as if not asked.
                modes = [requested if requested in groups else "none"]
            self.modes.append(tuple(modes))
            self.groups.append(groups)
        self._members = [
            {mode: frozenset(names) for mode, names in groups.items()} for groups in self.groups
        ]

    def _core(self, nodes: tuple[Node, ...]) -> tuple[int, int] | None:
        """Return the run of ops between the first and the last product of activations.

        As start and stop among `nodes`; None unless one such product follows from another.
        """
        reached: dict[str, int] = {}
        core: tuple[int, int] | None = None
        for index, node in enumerate(nodes):
            rule = self.rules.get(node.name)
            operands = node.operands()
            # reached: per value, the earliest product of activations that it comes from.
            before = [reached[name] for name in operands if name in reached]
            product = (
                rule is not None
                and bool(rule.flops)
                # A product with a weight is cheap to keep; attention's two products are those to
                # recompute.
                and len(operands) > 1
                and not any(name in self.weights for name in operands)
            )
            if product and before:
                first = min(before)
                core = (min(first, core[0]) if core else first, index + 1)
            if any(name in self.weights for name in operands) and rule and rule.flops:
                continue  # The output of a linear layer is no longer part of the core.
            if product:
                before.append(index)
            if before:
                reached.update((value.name, min(before)) for value in node.results)
        return core

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a node belongs to, None for no block."""
        return self.place.get(name)

    def variable(self, block: int) -> str:
        """Return the name of the planner's variable of a block's mode."""
        return f"block:{self.blocks[block].path}"

    def inside(self, name: str, block: int) -> tuple[bool, ...]:
        """Return, per mode of the block, whether a node is run again."""
        return tuple(name in self._members[block][mode] for mode in self.modes[block])


def _blocks(graph: Graph, requested: str) -> tuple[Block, ...]:
    """Return what may be recomputed: the model's own regions, or its repeated blocks."""
    if requested == "model":
        regions = enumerate(find_checkpoints(graph))
        return tuple(
            Block(region.path, kind, 0, region.start, region.stop, (), (), ())
            for kind, region in regions
        )
    return find_repeats(graph).blocks if requested != "none" else ()
