"""A dim of each value has the rows that a mask keeps: it is followed through calls that treat rows
alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy

from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, Value, map_leaves, size_expression
from autoparallel.graph.operators import draws
from autoparallel.graph.passes.flattened_batches import is_pointwise

__all__ = ["CREATED", "SHAPED", "Followed", "NotRowsError", "first_of_alike"]

# Calls that make as many rows as they are told, all the same.
CREATED = {
    "aten.ones.default",
    "aten.zeros.default",
    "aten.full.default",
    "aten.new_ones.default",
    "aten.new_zeros.default",
    "aten.new_full.default",
}
# Calls that give a tensor another shape, in the order in which its elements are.
SHAPED = {
    "aten.view.default",
    "aten.reshape.default",
    "aten.unsqueeze.default",
    "aten.squeeze.dim",
    "aten.expand.default",
}
# Calls that name dims, in which they do something that is no matter to the others; and which of
# their arguments those are.
_ALONG = {
    "aten.softmax.int": 1,
    "aten.log_softmax.int": 1,
    "aten.slice.Tensor": 1,
    "aten.select.int": 1,
    "aten.unbind.int": 1,
    "aten.sum.dim_IntList": 1,
    "aten.mean.dim": 1,
    "aten.amax.default": 1,
    "aten.amin.default": 1,
    "aten.argmax.default": 1,
    "aten.linalg_vector_norm.default": 2,
    "aten.split.Tensor": 2,
    "aten.split_with_sizes.default": 2,
    "aten.chunk.default": 2,
}


# Calls that only move numbers, whatever these are.
_MOVES = {
    *SHAPED,
    *CREATED,
    "aten.cat.default",
    "aten.permute.default",
    "aten.select.int",
    "aten.slice.Tensor",
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.transpose.int",
    "aten.unbind.int",
}


class NotRowsError(Exception):
    """Rows that a mask keeps are used as more than rows, each by itself."""


@dataclass(frozen=True)
class _Rows:
    """The dim of a value that has rows, and the vector that tells which of them are dropped.

    dropped: None where all rows are the same number, so that it does not matter.
    """

    dim: int
    dropped: str | None


class Followed:
    """The values with rows that a mask keeps.

    unknown: the symbols that stand for numbers of rows. joined: returns the vector of dropped rows
    of tensors that a call lays end to end, given the vector or the number of rows of each.
    computed: is told of each call that computes something of rows, and which are dropped.
    """

    def __init__(
        self,
        graph: Graph,
        unknown: set[sympy.Basic],
        joined: Callable[[Node, tuple[str | Dim, ...]], str],
        computed: Callable[[Node, str], None],
    ) -> None:
        self.graph, self.unknown, self.joined = graph, unknown, joined
        self.computed = computed
        self.rows: dict[str, _Rows] = {}
        self.by_size: dict[sympy.Basic, set[str]] = {}

    def begin(self, name: str, dim: int, dropped: str) -> None:
        """Follow a value from here on."""
        self.rows[name] = _Rows(dim, dropped)
        size = size_expression(self.graph.values[name].shape[dim])
        self.by_size.setdefault(size, set()).add(dropped)

    def concerns(self, node: Node) -> bool:
        """Return whether a call reads or makes rows, or is told their number."""
        return any(name in self.rows for name in node.operands()) or any(
            self.place(value) is not None for value in node.results
        )

    def place(self, value: Value) -> int | None:
        """Return the dim whose size depends on values, None where a value has none.

        Raises NotRowsError where it has several.
        """
        dims = [
            dim
            for dim, size in enumerate(value.shape)
            if isinstance(size, Sym) and size.expr.free_symbols & self.unknown
        ]
        if len(dims) > 1:
            raise NotRowsError
        return dims[0] if dims else None

    def dim_of(self, name: str) -> int | None:
        """Return the dim in which a value has rows, None where it has none."""
        return self.rows[name].dim if name in self.rows else None

    def dropped(self, *names: str) -> str:
        """Return the vector that tells which rows of these values are dropped."""
        vector = self.common(names)
        if vector is None:
            name = next(name for name in names if name in self.rows)
            size = self.graph.values[name].shape[self.rows[name].dim]
            vectors = self.by_size.get(size_expression(size), set())
            if len(vectors) != 1:
                raise NotRowsError
            (vector,) = vectors
        return vector

    def common(self, names: tuple[str, ...]) -> str | None:
        """Return the vector that all of these values have, None where none has one."""
        vectors = {self.rows[name].dropped for name in names if name in self.rows} - {None}
        if len(vectors) > 1:
            raise NotRowsError
        return next(iter(vectors), None)

    def ended(self, base: str, index: str, source: str, dim: int) -> str:
        """Return the vector of dropped rows of an index and what is scattered by it along a dim.

        base: what it is scattered to, which has no rows itself.
        """
        value = self.graph.values[index]
        along = 0 if len(value.shape) == 1 else dim
        if base in self.rows or self.dim_of(index) != along:
            raise NotRowsError
        if self.dim_of(source) not in (None, dim):
            raise NotRowsError
        return self.dropped(index, source)

    def follow(self, node: Node) -> None:
        """Note where the results of a call have rows.

        Raises NotRowsError where the call does more than the same for each row.
        """
        dropped = self.common(node.operands())
        if node.target == "aten.cat.default":
            dropped = self.laid_together(node)
        elif not self.is_by_row(node):
            raise NotRowsError
        if dropped is not None and node.target not in _MOVES:
            self.computed(node, dropped)
        for value in node.results:
            dim = self.place(value)
            if dim is None:
                raise NotRowsError
            self.rows[value.name] = _Rows(dim, dropped)
            if dropped is not None:
                self.by_size.setdefault(size_expression(value.shape[dim]), set()).add(dropped)

    def laid_together(self, node: Node) -> str | None:
        """Return the vector of the rows of what a call lays together."""
        names = tuple(part.name for part in node.args[0])
        values = [self.graph.values[name] for name in names]
        dim = node.argument(1, "dim", 0) % len(node.result.shape)
        if dim != self.place(node.result):
            if any(self.dim_of(name) != self.place(node.result) for name in names):
                raise NotRowsError
            return self.common(names)
        parts: list[str | Dim] = []
        for name, value in zip(names, values, strict=True):
            if self.dim_of(name) not in (None, dim):
                raise NotRowsError
            parts.append(self.dropped(name) if name in self.rows else value.shape[dim])
        return self.joined(node, tuple(parts))

    def is_by_row(self, node: Node) -> bool:
        """Return whether a call does the same for each row, whatever the others are."""
        if node.target in CREATED:
            return True
        read = [name for name in node.operands() if name in self.rows]
        if not read or draws(node.target):
            return False
        results = [(value, self.place(value)) for value in node.results]
        if is_pointwise(node.target) or node.target == "aten.expand.default":
            # Dims of operands are those of the result, counted from the last.
            return all(
                dim is not None
                and self.rows[name].dim - len(self.graph.values[name].shape)
                == dim - len(value.shape)
                for name in read
                for value, dim in results
            )
        value, (result, dim) = self.graph.values[node.operands()[0]], results[0]
        if dim is None:
            return False
        if node.target in ("aten.index.Tensor", "aten.index_select.default"):
            return self.is_look_up(node, dim)
        if node.target == "aten.embedding.default":
            return read == [node.args[1].name] and self.rows[read[0]].dim == dim
        if node.target == "aten.gather.default":
            alike = {self.dim_of(name) for name in node.operands()[:2]}
            return alike == {dim} and node.args[1] % len(value.shape) != dim
        if read != [value.name]:
            return False
        at = self.rows[value.name].dim
        if node.target in SHAPED:
            alike = size_expression(value.shape[at]) == size_expression(result.shape[dim])
            return alike and _before(value, at) == _before(result, dim)
        if node.target in ("aten.linear.default", "aten.mm.default", "aten.matmul.default"):
            other = self.graph.values[node.operands()[1]]
            return at == dim < len(value.shape) - 1 and len(other.shape) == 2
        if node.target in ("aten.layer_norm.default", "aten.rms_norm.default"):
            return at < len(value.shape) - len(node.args[1])
        if node.target in ("aten.transpose.int", "aten.permute.default"):
            return True  # each dim is in one place of the result
        return node.target in _ALONG and at not in _named(node, len(value.shape))

    def is_look_up(self, node: Node, dim: int) -> bool:
        """Return whether a call looks up a row of a table, which has none itself, for each row."""
        if node.args[0].name in self.rows:
            return False
        if node.target == "aten.index_select.default":
            return True
        indices = node.args[1]
        given = [index for index in indices if index is not None]
        # Several indices, or one amid dims, would move dims about.
        return len(given) == 1 and dim == indices.index(given[0]) + self.rows[given[0].name].dim


def _before(value: Value, dim: int) -> sympy.Expr:
    """Return the number of elements of the dims before one."""
    product = sympy.Integer(1)
    for size in value.shape[:dim]:
        product *= size_expression(size)
    return product


def _named(node: Node, rank: int) -> set[int]:
    """Return the dims of its operand that a call names."""
    dims: Any = node.argument(_ALONG[node.target], "dim")
    if dims is None or dims == ():  # of all, or the first
        return set(range(rank))
    return {dim % rank for dim in (dims if isinstance(dims, tuple) else (dims,))}


def first_of_alike(graph: Graph) -> dict[str, str]:
    """Return for each value the first that is computed of the same values in the same way."""
    first: dict[str, str] = {}
    calls: dict[Any, tuple[Value, ...]] = {}

    def leaf(item: Any) -> Any:
        """Return an argument, with the first of the values that are alike."""
        return Ref(first[item.name]) if isinstance(item, Ref) else item

    for node in graph.nodes:
        values = node.results
        if node.kind == "call" and not draws(node.target):
            content = (node.target, map_leaves(leaf, node.args), map_leaves(leaf, node.kwargs))
            values = calls.setdefault(repr(content), node.results)
        first.update((own.name, one.name) for own, one in zip(node.results, values, strict=True))
    return first
