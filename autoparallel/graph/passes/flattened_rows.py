"""The pass that computes losses of flattened rows on rows that are not flattened, for graphs whose
batch comes in parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, Value, hint, map_leaves
from autoparallel.graph.loss_ops import MEAN, OF_ELEMENTS, OF_LABELS
from autoparallel.graph.passes.editing import rebuilt
from autoparallel.graph.passes.flattened_batches import is_pointwise, shifted_arguments

__all__ = ["unflatten_rows"]

_RESHAPE, _GATHER = "aten.reshape.default", "aten.gather.default"
_UNSQUEEZE = "aten.unsqueeze.default"
_SUMS = {"aten.sum.default", "aten.sum.dim_IntList"}


def unflatten_rows(graph: Graph) -> Graph:
    """sum(mul(cross_entropy(reshape(%x, (b*s, c)), %y, none), reshape(%m, (b*s,)))) becomes the
    same on %x of (b, s, c), with labels and mask of (b, s).

    Why: a batch and a sequence that are merged into one dim of an unknown size cannot be shared out
    by the batch. After: no op that treats each row by itself, and no sum over all rows, reads a
    value that such a reshape has made; surviving nodes keep name, shape and dtype; what nobody
    reads is dropped; a second run is a no-op.
    """
    return _Unflattened(graph).run()


@dataclass(frozen=True, slots=True)
class _Apart:
    """A flattened value, seen apart: a reshape of `value`, which has the dims `batch` in place of
    the first.
    """

    value: Value
    batch: tuple[Dim, ...]


class _Unflattened:
    """One run of the pass. nodes: of the new graph. apart: flattened values, by name."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.apart: dict[str, _Apart] = {}

    def run(self) -> Graph:
        """Return the new graph."""
        for node in self.graph.nodes:
            if node.kind != "call" or not self.replaced(node):
                self.nodes.append(node)
                self.note(node)
        return rebuilt(self.graph, _read(self.nodes, self.graph), {})

    def note(self, node: Node) -> None:
        """Remember what a reshape flattens: first dims, one of them of an unknown size or all
        fixed, and nothing behind them.
        """
        if node.target != _RESHAPE:
            return
        before, after = self.graph.values[node.operands()[0]], node.result
        count = len(before.shape) - len(after.shape) + 1
        if count > 1 and before.shape[count:] == after.shape[1:]:
            self.apart[after.name] = _Apart(before, before.shape[:count])

    def replaced(self, node: Node) -> bool:
        """Append the same call on rows that are not flattened; return False where there is none."""
        flat = next((name for name in node.operands() if name in self.apart), None)
        if flat is None:
            return False
        if node.target == _RESHAPE:
            return self.reshaped(node, flat)
        if node.target in _SUMS:
            return self.summed(node, flat)
        if node.target in OF_LABELS:
            return self.of_labels(node, flat)
        if node.target in OF_ELEMENTS or (is_pointwise(node.target) and len(node.results) == 1):
            return self.of_elements(node, flat)
        return self.of_rows(node, flat)

    def reshaped(self, node: Node, flat: str) -> bool:
        """A reshape that divides the rows again, or leaves them flattened."""
        apart = self.apart[flat]
        count, shape = len(apart.batch), node.result.shape
        if shape[:count] == apart.batch:
            self.nodes.append(_view(node, node.result, apart.value))
            return True
        source = self.graph.values[flat]
        if shape and shape[0] == source.shape[0] and len(shape) > 1:
            self.emit(node, apart, _view(node, self.value(node, apart), apart.value))
            return True
        return False

    def summed(self, node: Node, flat: str) -> bool:
        """A sum over all of the rows, or over none of them."""
        apart, source = self.apart[flat], self.graph.values[flat]
        count, rank = len(apart.batch), len(source.shape)
        if node.target == "aten.sum.default":
            self.nodes.append(replace(node, args=(Ref(apart.value.name), *node.args[1:])))
            return True
        dims = node.argument(1, "dim")
        dims = tuple(range(rank)) if dims in (None, ()) else dims
        dims = tuple(dim % rank for dim in (dims if isinstance(dims, tuple) else (dims,)))
        keeps = bool(node.argument(2, "keepdim", False))
        moved = tuple(dim + count - 1 for dim in dims if dim)
        kwargs = tuple(pair for pair in node.kwargs if pair[0] not in ("dim", "keepdim"))
        if 0 not in dims:
            call = replace(
                node,
                args=(Ref(apart.value.name), moved, keeps),
                kwargs=kwargs,
                name=self.value(node, apart).name,
                results=(self.value(node, apart),),
            )
            self.emit(node, apart, call)
            return True
        if keeps:
            return False
        args = (Ref(apart.value.name), (*range(count), *moved), False)
        self.nodes.append(replace(node, args=args, kwargs=kwargs))
        return True

    def of_labels(self, node: Node, flat: str) -> bool:
        """A loss of each row and its label, or their sum or mean."""
        apart = self.apart[flat]
        names = node.operands()
        logits, target = (self.graph.values[name] for name in names[:2])
        plain = len(logits.shape) == 2 and len(target.shape) == 1 and names[0] == flat
        if not plain or len(apart.value.shape) != len(apart.batch) + 1:
            return False
        count = len(apart.batch)
        classes = apart.value.shape[-1]
        # Torch wants the classes second, behind the first dim of the batch.
        order = (0, count, *range(1, count))
        shape = (apart.batch[0], classes, *apart.batch[1:])
        moved = replace(apart.value, name=f"{node.name}_logits", shape=shape)
        self.nodes.append(
            replace(
                node,
                name=moved.name,
                target="aten.permute.default",
                results=(moved,),
                args=(Ref(apart.value.name), order),
                kwargs=(),
            )
        )
        labels = self.operand(node, names[1], apart)
        target_name = "aten.nll_loss_nd.default" if "nll" in node.target else node.target
        call = replace(
            node, target=target_name, args=(Ref(moved.name), Ref(labels), *node.args[2:])
        )
        if not node.result.shape:
            self.nodes.append(call)
            return True
        value = self.value(node, apart)
        self.emit(node, apart, replace(call, name=value.name, results=(value,)))
        return True

    def of_elements(self, node: Node, flat: str) -> bool:
        """An op that computes each element by itself, or a sum of such."""
        apart, rank = self.apart[flat], len(self.graph.values[flat].shape)
        place = OF_ELEMENTS.get(node.target)
        total = place is not None and not node.result.shape
        if total and node.argument(place or 0, "reduction", MEAN) == MEAN:
            return False
        if not total and len(node.result.shape) != rank:
            return False
        args, kwargs = self.read_apart(node, apart, (node.args, node.kwargs), rank)
        if total:
            self.nodes.append(replace(node, args=args, kwargs=kwargs))
            return True
        value = self.value(node, apart)
        call = replace(node, name=value.name, results=(value,), args=args, kwargs=kwargs)
        self.emit(node, apart, call)
        return True

    def of_rows(self, node: Node, flat: str) -> bool:
        """An op that works along the dims behind the rows."""
        apart, source = self.apart[flat], self.graph.values[flat]
        # Of others, a weight may have as many rows by chance.
        alone = len(node.operands()) == 1 or node.target == _GATHER
        if not alone or len(node.results) != 1 or not node.result.shape:
            return False
        # Of rows of one number each, any other op works along the rows.
        if len(source.shape) < 2 and node.target != _UNSQUEEZE:
            return False
        if not _is_same(node.result.shape[0], source.shape[0]):
            return False
        args = shifted_arguments(node, len(source.shape), len(apart.batch) - 1)
        others = [self.graph.values[name] for name in node.operands() if name != flat]
        rows = all(
            len(other.shape) == len(source.shape) and _is_same(other.shape[0], source.shape[0])
            for other in others
        )
        if args is None or not rows or node.operands()[0] != flat:
            return False
        value = self.value(node, apart)
        call = replace(
            node, name=value.name, results=(value,), args=self.read_apart(node, apart, args)
        )
        self.emit(node, apart, call)
        return True

    def read_apart(self, node: Node, apart: _Apart, args: Any, rank: int = 0) -> Any:
        """Return arguments that read what is unflattened. rank: see `operand`."""
        reads = {name: self.operand(node, name, apart, rank) for name in node.operands()}

        def leaf(item: Any) -> Any:
            """Return the argument, read as it is unflattened."""
            return Ref(reads[item.name]) if isinstance(item, Ref) else item

        return map_leaves(leaf, args)

    def value(self, node: Node, apart: _Apart) -> Value:
        """Return the result of a call as it is unflattened."""
        result = node.result
        return replace(result, name=f"{result.name}_rows", shape=(*apart.batch, *result.shape[1:]))

    def emit(self, node: Node, apart: _Apart, call: Node) -> None:
        """Append a call on unflattened rows, and the reshape that flattens what it returns."""
        self.nodes += [call, _view(node, node.result, call.result)]
        self.apart[node.result.name] = _Apart(call.result, apart.batch)

    def operand(self, reader: Node, name: str, apart: _Apart, rank: int = 0) -> str:
        """Return the name of an operand with the dims of the batch in place of its rows.

        rank: of the flattened operands, where others may be broadcast against them.
        """
        value, known = self.graph.values[name], self.apart.get(name)
        if known is not None and known.batch == apart.batch:
            return known.value.name
        if len(value.shape) < rank or not value.shape:
            return name
        batch = (1,) * len(apart.batch) if value.shape[0] == 1 else apart.batch
        rows = replace(value, name=f"{reader.name}_{name}", shape=(*batch, *value.shape[1:]))
        source = value if known is None else known.value
        self.nodes.append(_view(reader, rows, source))
        return rows.name


def _is_same(one: Dim, other: Dim) -> bool:
    """Return whether two sizes of rows that one call reads are the same number."""
    return hint(one) == hint(other) and isinstance(one, Sym) == isinstance(other, Sym)


def _view(like: Node, result: Value, source: Value) -> Node:
    """Return a call that gives `source` the shape of `result`, in the node's place."""
    args = (Ref(source.name), result.shape)
    return replace(like, name=result.name, target=_RESHAPE, results=(result,), args=args, kwargs=())


def _read(nodes: list[Node], graph: Graph) -> list[Node]:
    """Return the nodes without reshapes that nobody reads."""
    needed = {*graph.outputs, *(name for _, name in graph.mutations)}
    kept: list[Node] = []
    for node in reversed(nodes):
        if node.target == _RESHAPE and node.result.name not in needed:
            continue
        needed.update(node.operands())
        kept.append(node)
    return kept[::-1]
