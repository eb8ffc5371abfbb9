"""What stays in memory between the forward and the backward pass, value by value."""

from __future__ import annotations

from collections.abc import Container, Mapping

from autoparallel.cost.op_costs import nbytes
from autoparallel.cost.saved_tensors import SavedTensors
from autoparallel.graph.graph import Graph, Node, Value
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.rules.rule import ShardingRule
from autoparallel.strategy.mesh_strategies import MeshStrategy

__all__ = ["SavedActivations"]


class SavedActivations:
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
                    self.viewed[value.name] = value.name in graph.outputs or any(
                        self.is_kept(reader, tuple(_places(reader, value.name)))
                        for reader in graph.readers[value.name]
                    )
        self.roots = frozenset(name for node in graph.calls for name in self._saved_by(node))

    def is_kept(self, node: Node, places: tuple[int, ...]) -> bool:
        """Whether the backward pass needs what `node` reads in these places."""
        saved = self.saved.of(node.name)
        return any(saved.operands[place] for place in places) or any(
            alias in places and self.viewed[value.name]
            for value, alias in zip(node.results, saved.aliases, strict=True)
        )

    def _saved_by(self, node: Node) -> set[str]:
        """The values in whose memory lies what a call keeps, but for what is there before."""
        own = self.saved.of(node.name)
        names = (*node.operands(), *(value.name for value in node.results))
        return {
            self.saved.storage_of(name)
            for name, keeps in zip(names, (*own.operands, *own.results), strict=True)
            if keeps and self.is_made(self.saved.storage_of(name))
        }

    def peak_call(self, ranks: int, repeated: Container[str]) -> tuple[str, float]:
        """The call at whose backward most is there, as far as is known before anything is planned.

        Its gradients are there beside all that is kept, but for what was freed by then: so many
        bytes, at most. "" where no call has any. Only calls that are not repeated, and of which
        nothing is a view: gradients of a view are those of what it is a view of.
        """
        graph = self.graph
        best, most, least, freed = "", 0.0, 0.0, 0.0
        for node in reversed(graph.calls):
            own = self.saved.of(node.name)
            if node.name not in repeated and all(alias is None for alias in own.aliases):
                made = sum(nbytes(value) for value, _ in self._differentiated(node)) / ranks
                if made - freed > most:
                    best, most, least = node.name, made - freed, freed
            # Of what others keep too, this call may have had a copy.
            freed += sum(nbytes(graph.values[name]) for name in self._saved_by(node))
            freed += own.internal_nbytes({})
        return best, least

    def _differentiated(self, node: Node) -> list[tuple[Value, int]]:
        """What a call reads and makes, as far as it has gradients while its backward runs; each
        with its place among operands and results."""
        graph, names = self.graph, node.operands()
        values = [*map(graph.values.__getitem__, names), *node.results]
        found: dict[str, tuple[Value, int]] = {}
        for place, value in enumerate(values):
            read = place < len(names) or graph.readers[value.name]
            if value.requires_grad and self.is_made(value.name) and read:
                found.setdefault(value.name, (value, place))
        return list(found.values())

    def gradient_nbytes(self, node: Node, joint: MeshStrategy, sizes: tuple[int, ...]) -> float:
        """Bytes of gradients that are there while the backward of a call runs."""
        layouts = (*joint.operands, *joint.results)
        return sum(
            nbytes(value) * layout_fraction(value.shape, layouts[place], sizes)
            for value, place in self._differentiated(node)
        )

    def own(self, node: Node) -> tuple[bool, ...]:
        """Per result, whether its memory is counted elsewhere already: by its maker, or as that of
        what it is a view of, where the backward pass needs that."""
        saved = self.saved.of(node.name)
        roots = [self.saved.storage_of(value.name) for value in node.results]
        return tuple(
            kept or (alias is not None and (root in self.roots or not self.is_made(root)))
            for kept, alias, root in zip(saved.results, saved.aliases, roots, strict=True)
        )

    def is_made(self, name: str) -> bool:
        """Whether a value is none that is there before the program starts."""
        return self.graph.producers[name].kind == "call"

    def nbytes(self, node: Node, joint: MeshStrategy, sizes: tuple[int, ...]) -> float:
        """Bytes that an op keeps by itself: results, and what is neither result nor operand.

        Of several kernels the innermost one runs; to it the others' loops are as if split without,
        and its own as if split once over the ranks of all axes that split it.
        """
        shares: dict[str, float] = {}
        ranks = 1
        saved = self.saved.of(node.name)
        split = [(part, size) for part, size in zip(joint.parts, sizes, strict=True) if part.tile]
        split.sort(key=lambda item: item[0].kernel is not None and not item[0].kernel.wraps)
        innermost = next((part for part, _ in reversed(split) if part.kernel), None)
        inner = innermost.tile.loop if innermost is not None and innermost.tile else ""
        for part, size in split:
            assert part.tile is not None
            if part.tile.loop == inner:
                ranks *= size
            else:
                shares[part.tile.loop] = shares.get(part.tile.loop, 1.0) * part.fraction
        if inner:
            saved = self.saved.of_kernel(node.name, inner, ranks)
        total = float(saved.internal_nbytes(shares))
        for value, layout, kept, alias in zip(
            node.results, joint.results, saved.results, saved.aliases, strict=True
        ):
            if kept and alias is None:
                total += nbytes(value) * layout_fraction(value.shape, layout, sizes)
        return total


def _places(node: Node, name: str) -> list[int]:
    return [place for place, operand in enumerate(node.operands()) if operand == name]
