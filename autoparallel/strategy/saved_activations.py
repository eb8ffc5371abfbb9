"""Activations saved between the forward and the backward pass: which ones, and their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autoparallel.cost.op_costs import nbytes
from autoparallel.cost.saved_tensors import SavedTensors
from autoparallel.graph.graph import Graph, Node, Value
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.rules.rule import ShardingRule
from autoparallel.strategy.mesh_strategies import MeshStrategy

__all__ = ["SavedActivations"]


class SavedActivations:
    """The tensors that every op saves for its backward pass: operands, results, and internal ones.

    rules: per call node. Views save nothing themselves: a saved view keeps alive the tensor that it
    is a view of, and is counted there. device: as of Hardware. viewed: per result that is a view,
    the place of the first call that saves it, as of `needed_from`. roots: the values whose memory
    is held by some call. passed: values that are counted where views of them are saved.
    """

    def __init__(
        self, graph: Graph, rules: Mapping[str, ShardingRule | None], device: str = "cpu"
    ) -> None:
        self.graph, self.rules, self.device = graph, rules, device
        self.saved = SavedTensors(graph, rules, device=device)
        self.of = self.saved.of
        self.viewed: dict[str, float] = {}
        self._order = {node.name: float(place) for place, node in enumerate(graph.nodes)}
        # Backwards, because a view is saved where a view of it is.
        for node in reversed(graph.calls):
            aliases = self.saved.of(node.name).aliases
            for value, alias in zip(node.results, aliases, strict=True):
                if alias is not None:
                    needed = (
                        self.needed_from(reader, tuple(_places(reader, value.name)))
                        for reader in graph.readers[value.name]
                    )
                    returned = value.name in graph.outputs
                    self.viewed[value.name] = -1.0 if returned else min(needed, default=math.inf)
        self.roots = frozenset(name for node in graph.calls for name in self.saved_by(node))
        self.passed: set[str] = set()
        for node in graph.calls:
            aliases = self.saved.of(node.name).aliases
            for value, alias in zip(node.results, aliases, strict=True):
                starts = alias is None or node.operands()[alias] in self.passed
                if starts and self._is_passed(node, value, alias is None):
                    self.passed.add(value.name)

    def _is_passed(self, node: Node, value: Value, is_own: bool) -> bool:
        """Return whether a result is needed as views of it alone, which share it out among them.

        is_own: it has memory of its own. What is read as a view may be converted before it is
        saved, and then its own memory is not needed. So it is counted where the views are saved.
        """
        if is_own and self.saved.of(node.name).results[node.results.index(value)]:
            return False
        needing = []
        for reader in self.graph.readers[value.name]:
            places = tuple(_places(reader, value.name))
            if self.needed_from(reader, places) < math.inf:
                needing.append((reader, places))
        if len(needing) != 1 or value.name in self.graph.outputs:
            return False
        ((reader, places),) = needing
        saved = self.saved.of(reader.name)
        pairs = zip(reader.results, saved.aliases, strict=True)
        views = [view for view, alias in pairs if alias in places]
        return (
            not any(saved.operands[place] for place in places)
            and all(0 <= self.viewed[view.name] < math.inf for view in views)
            and sum(map(nbytes, views)) == nbytes(value)
        )

    def saves(self, node: Node, places: tuple[int, ...]) -> bool:
        """Say whether the backward pass needs what `node` reads in these places.

        places: of its operands. A view needs its operand where the view itself is saved.
        """
        return self.needed_from(node, places) < math.inf

    def needed_from(self, node: Node, places: tuple[int, ...]) -> float:
        """Return the place of the first call whose backward needs what `node` reads in these
        places of its operands: it is there down to that. -1 for what the caller holds, +inf where
        none needs it.
        """
        saved = self.saved.of(node.name)
        own = any(saved.operands[place] for place in places)
        return min(
            self._order[node.name] if own else math.inf,
            *(
                self.viewed[value.name]
                for value, alias in zip(node.results, saved.aliases, strict=True)
                if alias in places
            ),
            math.inf,
        )

    def reads_saved_by(self, node: Node) -> tuple[bool, ...]:
        """Return, per operand of a call, whether the backward pass needs that value from it."""
        return tuple(self.saves(node, tuple(_places(node, name))) for name in node.operands())

    def saved_by(self, node: Node) -> set[str]:
        """Return the values whose memory a call holds, but for those that are there before."""
        saved = self.saved.of(node.name)
        names = (*node.operands(), *(value.name for value in node.results))
        return {
            self.saved.storage_of(name)
            for name, is_saved in zip(names, (*saved.operands, *saved.results), strict=True)
            if is_saved and self.is_computed(self.saved.storage_of(name))
        }

    def whole_gradient_nbytes(self, node: Node) -> float:
        """Return the bytes of unsplit gradients that are alive while a call's backward runs."""
        return sum(nbytes(value) for value, _ in self._differentiated(node))

    def _differentiated(self, node: Node) -> list[tuple[Value, int]]:
        """Return the operands and results of a call that have gradients while its backward runs.

        Each value comes once, with its place among operands and results. Gradients of inputs and
        parameters are not counted here, nor those of views of them, which become theirs, nor those
        of results that nothing reads.
        """
        graph, names = self.graph, node.operands()
        values = [*map(graph.values.__getitem__, names), *node.results]
        by_name: dict[str, tuple[Value, int]] = {}
        for place, value in enumerate(values):
            read = place < len(names) or graph.readers[value.name]
            is_computed = self.is_computed(self.saved.storage_of(value.name))
            if value.requires_grad and is_computed and read:
                by_name.setdefault(value.name, (value, place))
        return list(by_name.values())

    def gradient_nbytes(self, node: Node, joint: MeshStrategy, sizes: tuple[int, ...]) -> float:
        """Return the bytes per rank of gradients that are alive while a call's backward runs, and
        of what that needs besides.

        joint: the call's strategy. sizes: of the mesh axes.
        """
        layouts = (*joint.operands, *joint.results)
        shares, inner, ranks, second = _split_by(joint, sizes)
        # Of what a kernel does not split, its tensors may still have the loop: this is the least.
        besides = self.saved.workspace_nbytes(node.name, inner, ranks, second)
        return math.prod(shares.values()) * besides + sum(
            nbytes(value) * layout_fraction(value.shape, layouts[place], sizes)
            for value, place in self._differentiated(node)
        )

    def counted_elsewhere(self, node: Node) -> tuple[bool, ...]:
        """Return, per result, whether its memory is counted elsewhere.

        It is where the call itself saves the result, and where the result is a view of a tensor
        that is saved, or that is there before the program starts.
        """
        saved = self.saved.of(node.name)
        roots = [self.saved.storage_of(value.name) for value in node.results]
        operands = node.operands()
        return tuple(
            is_saved
            or (
                alias is not None
                and operands[alias] not in self.passed
                and (root in self.roots or not self.is_computed(root))
            )
            for is_saved, alias, root in zip(saved.results, saved.aliases, roots, strict=True)
        )

    def is_computed(self, name: str) -> bool:
        """Say whether the program computes a value; inputs and parameters are there before."""
        return self.graph.producers[name].kind == "call"

    def nbytes(self, node: Node, joint: MeshStrategy, sizes: tuple[int, ...]) -> float:
        """Return the bytes per rank that an op itself saves: results and internal tensors.

        joint: the op's strategy. sizes: of the mesh axes. Operands are counted where they are read.
        """
        shares, inner, ranks, second = _split_by(joint, sizes)
        saved = self.saved.of(node.name)
        if inner:
            saved = self.saved.of_kernel(node.name, inner, ranks, second)
        total = float(saved.internal_nbytes(shares))
        for value, layout, is_saved, alias in zip(
            node.results, joint.results, saved.results, saved.aliases, strict=True
        ):
            if is_saved and alias is None:
                total += nbytes(value) * layout_fraction(value.shape, layout, sizes)
        return total


def _split_by(
    joint: MeshStrategy, sizes: tuple[int, ...]
) -> tuple[dict[str, float], str, int, str]:
    """Return the share of each loop that a rank has, as the call itself is run; and the loop that
    its kernel splits, over how many ranks, and the loop that is split together with it: "", 1 and
    "" without one.

    joint: the op's strategy. sizes: of the mesh axes. Of several kernels the innermost one runs the
    op; seen from it, loops of the others are split as if without a kernel, and its own loop is
    split once over the ranks of all axes that split it.
    """
    shares: dict[str, float] = {}
    ranks = 1
    split = [(part, size) for part, size in zip(joint.parts, sizes, strict=True) if part.tile]
    # Kernels that wrap the op come first, the one that does not wrap it last: it is the innermost.
    split.sort(key=lambda item: item[0].kernel is not None and not item[0].kernel.wraps)
    innermost = next((part for part, _ in reversed(split) if part.kernel), None)
    inner = innermost.tile.loop if innermost is not None and innermost.tile else ""
    for part, size in split:
        assert part.tile is not None
        loop = part.second or part.tile.loop
        if part.tile.loop == inner:
            ranks *= size
        else:
            shares[loop] = shares.get(loop, 1.0) * part.fraction
    second = innermost.second if innermost is not None and inner else ""
    return shares, inner, ranks, second


def _places(node: Node, name: str) -> list[int]:
    """Return the places at which a node reads a value."""
    return [place for place, operand in enumerate(node.operands()) if operand == name]
