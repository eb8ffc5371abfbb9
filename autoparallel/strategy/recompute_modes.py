"""Activation recomputation, block by block: the ops run again in the backward pass in each mode.

By default a block is a region that the model itself checkpoints, and is recomputed in full.
Otherwise it is the planner's choice:
A block is one of a model's repeated modules. In mode "none" it saves all that its backward pass
needs; in "full" only its inputs (arXiv:1604.06174). In "selective" it saves all but what lies
between products of activations with each other, which grows with the square of the sequence
(arXiv:2205.05198). Where these are fused, so that nothing lies between them, "selective" keeps what
products and attention make, and makes what is cheap again, op by op: norms, activations, casts,
rotations, and the copies of these that are gathered.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

from autoparallel.cost.op_costs import nbytes
from autoparallel.cost.saved_tensors import SavedTensors
from autoparallel.graph.checkpoints import find_checkpoints
from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.repeated_blocks import Block, find_repeats
from autoparallel.rules.rule import ShardingRule

__all__ = ["MODES", "Recomputation"]

MODES = ("none", "selective", "full")


class Recomputation:
    """The recompute modes of every block of a graph.

    rules: per call node. weights: values computed from parameters alone. saved: what calls save,
    where it is known already. requested: "model" for the
    regions that the model checkpoints; or, whatever it checkpoints, one of MODES for all blocks (a
    block without products of activations has nothing to select, and saves all), or "auto" for a
    choice between all modes that a block has. decided: the mode of each block in order, where it is
    decided already. device: as of Hardware.
    blocks: the repeated blocks, or the regions. modes: per block, the modes to choose between.
    groups: per block and mode, the names of the ops run again together. made: per block, the ops
    that its mode "selective" makes again one by one, views of what they make among them; remade:
    without the views. place: by node name, the number of its block.
    """

    def __init__(
        self,
        graph: Graph,
        rules: Mapping[str, ShardingRule | None],
        weights: frozenset[str],
        requested: str,
        saved: SavedTensors | None = None,
        decided: Sequence[str] = (),
        device: str = "cpu",
    ) -> None:
        self.saved, self.device = saved, device
        self.graph, self.rules, self.weights = graph, rules, weights
        self.blocks = _blocks(graph, requested)
        self.modes: list[tuple[str, ...]] = []
        self.groups: list[dict[str, tuple[str, ...]]] = []
        self.place: dict[str, int] = {}
        self.made: list[frozenset[str]] = []
        self.remade: list[tuple[str, ...]] = []
        cores: dict[int, tuple[int, int] | None] = {}
        cheap: dict[int, tuple[tuple[int, bool], ...]] = {}
        for index, block in enumerate(self.blocks):
            nodes = graph.nodes[block.start : block.stop]
            self.place.update((node.name, index) for node in nodes)
            # Blocks of one kind are equal op by op, so their cores lie at the same places.
            if block.kind not in cores:
                cores[block.kind] = self._core(nodes)
            core = cores[block.kind]
            names = tuple(node.name for node in nodes)
            groups: dict[str, tuple[str, ...]] = {"none": (), "full": names}
            made: tuple[tuple[int, bool], ...] = ()
            if core is not None:
                groups["selective"] = names[slice(*core)]
            elif requested in ("selective", "auto"):
                if block.kind not in cheap:
                    cheap[block.kind] = tuple(self._cheap(nodes))
                made = cheap[block.kind]
                if made:
                    groups["selective"] = ()
            self.made.append(frozenset(names[at] for at, _ in made))
            self.remade.append(tuple(names[at] for at, is_view in made if not is_view))
            modes = [mode for mode in MODES if mode in groups]
            if requested == "model":
                modes = ["full"]
            elif requested != "auto":
                # A block without a core has no selective mode: it saves all, as if not asked.
                modes = [requested if requested in groups else "none"]
            if len(decided) == len(self.blocks):
                modes = [decided[index] if decided[index] in groups else "none"]
            self.modes.append(tuple(modes))
            self.groups.append(groups)
        self._members = [
            {
                mode: made if mode == "selective" and made else frozenset(names)
                for mode, names in groups.items()
            }
            for groups, made in zip(self.groups, self.made, strict=True)
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

    def _cheap(self, nodes: tuple[Node, ...]) -> Iterator[tuple[int, bool]]:
        """Yield the places of ops of a block that are made again one by one, and whether each is a
        view of what another one has made.

        What is made again is read in its block alone: chains of it end at the block's inputs. Its
        own op does not save it, and the backward pass needs it.
        """
        made = self._able(nodes)
        saved = self.saved
        assert saved is not None
        needed: set[str] = set()
        chosen: list[tuple[int, bool]] = []
        for place in reversed(range(len(nodes))):
            node, seen = nodes[place], saved.of(nodes[place].name)
            operands = node.operands()
            is_needed = any(value.name in needed for value in node.results)
            is_view = all(alias is not None for alias in seen.aliases)
            if is_needed and place in made:
                chosen.append((place, is_view))
            if is_needed and (place in made or is_view):
                needed.update(operands)
            needed.update(name for name, kept in zip(operands, seen.operands, strict=True) if kept)
        yield from reversed(chosen)

    def _able(self, nodes: tuple[Node, ...]) -> frozenset[int]:
        """Return the places of ops whose results need not be saved, and of views of these."""
        saved = self.saving()
        inside = {node.name for node in nodes}
        able: set[int] = set()
        made: set[str] = set()
        kept: set[str] = set()
        for place, node in enumerate(nodes):
            seen, operands = saved.of(node.name), node.operands()
            if node.results and all(alias is not None for alias in seen.aliases):
                # A view lies in the memory of what it is a view of.
                if any(operands[alias] in made for alias in seen.aliases if alias is not None):
                    made.update(value.name for value in node.results)
                    able.add(place)
                continue
            reads = dict.fromkeys(name for name in operands if name not in self.weights)
            if reads and self._is_cheap(node, inside):
                # An addition saves nothing: to keep what it reads takes as much as what it makes.
                roots = {name: saved.storage_of(name) for name in reads}
                added = sum(
                    nbytes(self.graph.values[name])
                    for name, root in roots.items()
                    if root not in kept
                    and name not in made
                    and self.graph.producers[root].name in inside
                )
                if any(seen.operands) or added < nbytes(node.results[0]):
                    made.add(node.results[0].name)
                    kept.update(root for name, root in roots.items() if name not in made)
                    able.add(place)
                    continue
            names = (*operands, *(value.name for value in node.results))
            flags = (*seen.operands, *seen.results)
            kept.update(saved.storage_of(n) for n, flag in zip(names, flags, strict=True) if flag)
        return frozenset(able)

    def _is_cheap(self, node: Node, inside: Container[str]) -> bool:
        """Return whether an op takes little time, may be run again by itself, and makes what only
        its block, of the ops `inside`, reads and its own backward pass does not save.
        """
        rule = self.rules.get(node.name)
        if rule is None or rule.flops or rule.inner is not None or rule.random or rule.discovered:
            return False
        if len(node.results) != 1 or not node.results[0].requires_grad or rule.kernels:
            return False
        assert self.saved is not None
        seen, name = self.saved.of(node.name), node.results[0].name
        if seen.assumed or any(seen.results) or name in self.graph.outputs:
            return False
        return all(reader.name in inside for reader in self.graph.readers[name])

    def saving(self) -> SavedTensors:
        """Return what calls save, which is found when it is first asked for."""
        if self.saved is None:
            self.saved = SavedTensors(self.graph, self.rules, device=self.device)
        return self.saved

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
