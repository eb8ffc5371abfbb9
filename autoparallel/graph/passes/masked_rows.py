"""A pass that keeps the rows that a mask drops, and leaves them out where rows are added up.

`x[mask]` has as many rows as fit, which no two ranks need agree on. Where each row is treated by
itself until rows are summed, scattered or scored, all rows may go that way, and those that the mask
drops count for nothing at its end. They look like the first row that is kept, so that nothing is
computed of numbers that the forward never sees, such as the logarithm of a zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import sympy
import torch

from autoparallel.graph.graph import (
    Dim,
    Graph,
    Node,
    Ref,
    Sym,
    Value,
    hint,
    leaves,
    map_leaves,
    size_expression,
)
from autoparallel.graph.operators import BRANCH_TAKEN
from autoparallel.graph.passes.editing import rebuilt
from autoparallel.graph.passes.rows_followed import (
    CREATED,
    SHAPED,
    Followed,
    NotRowsError,
    first_of_alike,
)

__all__ = ["keep_masked_rows", "next_check", "unknown_symbols"]

_DEVICE = torch.device("cpu")  # a program has that of its rank in its place


def unknown_symbols(graph: Graph) -> set[sympy.Basic]:
    """Return the symbols in the sizes of a graph's values, and in its arguments, that none of its
    inputs has: they stand for sizes that depend on the values of tensors.
    """
    known: set[sympy.Basic] = set()
    sizes: set[Sym] = set()
    for node in graph.nodes:
        here = {size for value in node.results for size in value.shape if isinstance(size, Sym)}
        if node.kind == "input":
            known.update(*(size.expr.free_symbols for size in here))
        sizes |= here
        sizes.update(
            leaf
            for leaf in leaves((node.args, tuple(value for _, value in node.kwargs)))
            if type(leaf) is Sym
        )
    return set().union(*(size.expr.free_symbols for size in sizes)) - known


def next_check(graph: Graph) -> int:
    """Return a number of a branch that no other one has, for all checks that a pass adds: equal
    blocks stay equal.
    """
    checks = (node.args[2] for node in graph.calls if node.target == BRANCH_TAKEN)
    return max(checks, default=-1) + 1


def keep_masked_rows(graph: Graph) -> Graph:
    """scatter_add(%y, 0, %i[%mask], %x[%mask]) becomes scatter_add(%y, 0, %i, where(%mask, %x, 0)).

    And so do sums, means and losses over such rows, with whatever is done row by row before.

    Why: the number of rows depends on values, so that no rank could know a size. After: no size
    depends on values, or the graph is as it was; a second run is a no-op. Where a mask keeps no row
    and something is computed of these, a check ends the program.
    """
    unknown = unknown_symbols(graph)
    if not unknown:
        return graph
    try:
        return _Kept(graph, unknown).run()
    except NotRowsError:
        return graph


@dataclass(frozen=True)
class _Mask:
    """One mask: its rows, the size of all of them, and the places that stand in for each.

    dropped: a vector that is true where a row is dropped. places: of the rows that are read.
    """

    size: Dim
    dropped: str
    places: str


class _Kept:
    """One run of the pass.

    sizes: of all rows, by the symbol that stands for the number of those that a mask keeps.
    masks: by the name of the mask. followed: the values with such rows. dropped: for each name of
    a vector of rows that are dropped, its size. joined: vectors that were laid end to end. parts:
    those of which a joined one consists. unchecked: by a vector its mask, where nothing asks yet
    whether it keeps a row.
    """

    def __init__(self, graph: Graph, unknown: set[sympy.Basic]) -> None:
        self.graph, self.unknown = graph, unknown
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.taken = {*graph.values, *(node.name for node in graph.nodes)}
        self.hints = {
            size.expr: size.hint
            for node in graph.nodes
            if node.kind == "input"
            for size in node.result.shape
            if isinstance(size, Sym) and size.expr.is_Symbol
        }
        self.sizes: dict[sympy.Basic, sympy.Expr] = {}
        self.masks: dict[str, _Mask] = {}
        self.owners: dict[sympy.Basic, str] = {}
        self.followed = Followed(graph, unknown, self.joined, self.check)
        self.ends: dict[tuple[Any, ...], str] = {}
        self.first: dict[str, str] = first_of_alike(graph)
        self.unchecked: dict[str, str] = {}
        self.parts: dict[str, tuple[str, ...]] = {}
        self.number = next_check(graph)

    def run(self) -> Graph:
        """Return the new graph. Raises NotRowsError where rows are more than rows."""
        for node in self.graph.nodes:
            if node.kind != "call" or not self.followed.concerns(node):
                self.append(node)
            elif not self.pick(node):
                end = _ENDS.get(node.target)
                if end is None or not end(self, node):
                    self.followed.follow(node)
                    self.append(self.resized(node))
        returned = {*self.graph.outputs, *(name for _, name in self.graph.mutations)}
        if returned & self.followed.rows.keys():
            raise NotRowsError
        return rebuilt(self.graph, self.nodes, {})

    def append(self, node: Node) -> str:
        """Append a node to the new graph; return the name of its first result."""
        self.nodes.append(node)
        self.values.update((value.name, value) for value in node.results)
        return node.results[0].name

    def make(
        self, like: Node, target: str, shape: tuple[Dim, ...], dtype: Any, *args: Any, **kwargs: Any
    ) -> str:
        """Append a call that stands where another one does; return the name of its result.

        It has a gradient where one of its operands has, and its type can have one.
        """
        base = f"{like.name}_rows"
        name = next(new for number in count() if (new := f"{base}_{number}") not in self.taken)
        self.taken.add(name)
        call = Node(name, "call", target, (), args, tuple(kwargs.items()), like.scope, like.line)
        flows = any(self.values[operand].requires_grad for operand in call.operands())
        value = Value(name, shape, dtype, flows and dtype.is_floating_point)
        return self.append(replace(call, results=(value,)))

    def dim(self, size: Any) -> Any:
        """Return a size with all rows in place of those that are kept."""
        if not isinstance(size, Sym) or not size.expr.free_symbols & self.unknown:
            return size
        if not size.expr.free_symbols & self.unknown <= self.sizes.keys():
            raise NotRowsError
        expression = sympy.expand(size.expr.xreplace(self.sizes))
        if expression.is_number:
            return int(expression)
        return Sym(expression, int(expression.subs(self.hints)))

    def resized(self, node: Node) -> Node:
        """Return a call with all rows. Raises NotRowsError where it computes with their number."""
        numbers = any(
            isinstance(leaf, Sym) and leaf.expr.free_symbols & self.unknown
            for leaf in leaves((node.args, tuple(value for _, value in node.kwargs)))
        )
        if numbers and node.target not in SHAPED | CREATED:
            raise NotRowsError
        results = tuple(
            replace(value, shape=tuple(map(self.dim, value.shape))) for value in node.results
        )
        return replace(node, results=results, args=map_leaves(self.dim, node.args))

    def pick(self, node: Node) -> bool:
        """Take `x[mask]` or the places where a mask is true, if a call is one of these."""
        if node.target == "aten.nonzero.default":
            mask = self.graph.values[node.operands()[0]]
            if len(mask.shape) != 1:
                raise NotRowsError
            rows = self.mask(node, mask, node.result.shape[0])
            places = Ref(rows.places)
            self.append(replace(self.column(node), args=(places, 1)))
            self.followed.begin(node.result.name, 0, rows.dropped)
            return True
        if node.target != "aten.index.Tensor":
            return False
        source, indices = self.graph.values[node.args[0].name], node.args[1]
        given = [index for index in indices if index is not None]
        mask = self.graph.values[given[0].name]
        if len(given) != 1 or mask.dtype != torch.bool or indices[-1] is None:
            return False
        before = len(indices) - 1
        if source.name in self.followed.rows or mask.name in self.followed.rows:
            raise NotRowsError
        rows = self.mask(node, mask, node.result.shape[before])
        name = source.name
        if len(mask.shape) > 1:
            after = source.shape[before + len(mask.shape) :]
            flat = (*source.shape[:before], rows.size, *after)
            name = self.make(node, "aten.reshape.default", flat, source.dtype, Ref(name), flat)
        picked = self.resized_results(node)
        self.append(replace(picked, args=(Ref(name), (*indices[:-1], Ref(rows.places)))))
        self.followed.begin(node.result.name, before, rows.dropped)
        return True

    def resized_results(self, node: Node) -> Node:
        """Return a call with the shape of all rows."""
        shape = tuple(map(self.dim, node.result.shape))
        return replace(node, results=(replace(node.result, shape=shape),))

    def column(self, node: Node) -> Node:
        """Return a call that makes a column of a vector of all rows."""
        return replace(self.resized_results(node), target="aten.unsqueeze.default", kwargs=())

    def mask(self, node: Node, mask: Value, kept: Dim) -> _Mask:
        """Return a mask of which a call reads the rows. kept: the number of those."""
        if not isinstance(kept, Sym) or kept.expr not in self.unknown:
            raise NotRowsError
        first = self.first[mask.name]
        if self.owners.setdefault(kept.expr, first) != first:
            raise NotRowsError
        if first not in self.masks:
            name, number = first, sympy.Integer(1)
            for size in mask.shape:
                number *= size_expression(size)
            self.sizes[kept.expr] = number
            size = self.dim(kept)
            if len(mask.shape) > 1:
                name = self.make(
                    node, "aten.reshape.default", (size,), mask.dtype, Ref(name), (size,)
                )
            integer, flat = torch.int64, Ref(name)
            every = self.make(node, "aten.arange.default", (size,), integer, size, device=_DEVICE)
            ones = self.make(node, "aten.to.dtype", (size,), integer, flat, integer)
            kept_row = self.make(node, "aten.argmax.default", (), integer, Ref(ones))
            places = self.make(
                node, "aten.where.self", (size,), integer, flat, Ref(every), Ref(kept_row)
            )
            dropped = self.make(node, "aten.logical_not.default", (size,), torch.bool, flat)
            self.unchecked[dropped] = name
            self.masks[first] = _Mask(size, dropped, places)
        self.sizes[kept.expr] = size_expression(self.masks[first].size)
        return self.masks[first]

    def joined(self, node: Node, parts: tuple[str | Dim, ...]) -> str:
        """Return the vector of dropped rows of tensors that are laid end to end.

        parts: for each of them the vector, or the number of its rows, of which none is dropped.
        """
        if parts not in self.ends:
            vectors = []
            for part in parts:
                if not isinstance(part, str):
                    part = self.make(
                        *(node, "aten.full.default", (part,), torch.bool, (part,), False),
                        device=_DEVICE,
                    )
                vectors.append(part)
            sizes = [self.values[name].shape[0] for name in vectors]
            total = sympy.expand(sum(map(size_expression, sizes)))
            size = int(total) if total.is_number else Sym(total, sum(map(hint, sizes)))
            cat = tuple(map(Ref, vectors))
            joined = self.make(node, "aten.cat.default", (size,), torch.bool, cat, 0)
            self.ends[parts], self.parts[joined] = joined, tuple(vectors)
        return self.ends[parts]

    def check(self, node: Node, dropped: str) -> None:
        """Check that masks keep a row, before a call that may have no answer for other rows.

        Of no row that is kept, nothing is known that the others may look like.
        """
        for part in self.parts.pop(dropped, ()):
            self.check(node, part)
        if dropped in self.unchecked:
            mask = Ref(self.unchecked.pop(dropped))
            some = Ref(self.make(node, "aten.any.default", (), torch.bool, mask))
            self.make(node, BRANCH_TAKEN, (), torch.bool, some, True, self.number)

    def filled(self, node: Node, name: str, dropped: str, number: Any) -> str:
        """Return a value with a number in all places of the rows that are dropped."""
        value, dim = self.values[name], self.followed.rows[name].dim
        shape = tuple(size if at == dim else 1 for at, size in enumerate(value.shape))
        where = dropped
        if len(shape) > 1:
            where = self.make(node, "aten.reshape.default", shape, torch.bool, Ref(dropped), shape)
        return self.make(
            *(node, "aten.masked_fill.Scalar", value.shape, value.dtype),
            *(Ref(name), Ref(where), number),
        )

    def summed(self, node: Node) -> bool:
        """Take a sum over all rows, or a mean; return whether a call is one."""
        name = node.operands()[0]
        rows, value = self.followed.rows[name], self.values[name]
        dims = node.args[1] if len(node.args) > 1 and node.target != "aten.sum.default" else None
        over = range(len(value.shape)) if not dims else [d % len(value.shape) for d in dims]
        if rows.dim not in over:
            return False
        dropped = self.followed.dropped(name)
        source = self.filled(node, name, dropped, 0)
        if not node.target.startswith("aten.mean"):
            self.append(replace(self.resized(node), args=(Ref(source), *node.args[1:])))
            return True
        if node.kwargs or len(node.args) > 1:
            raise NotRowsError
        result = node.result
        total = self.make(node, "aten.sum.default", (), result.dtype, Ref(source))
        size = value.shape[rows.dim]
        kept = self.make(node, "aten.logical_not.default", (size,), torch.bool, Ref(dropped))
        number = Ref(self.make(node, "aten.sum.default", (), torch.int64, Ref(kept)))
        for dim in over:
            if dim != rows.dim:
                product = (number, value.shape[dim])
                number = Ref(self.make(node, "aten.mul.Tensor", (), torch.int64, *product))
        self.append(replace(node, target="aten.div.Tensor", args=(Ref(total), number)))
        return True

    def scattered(self, node: Node) -> bool:
        """Take rows that are added to others, each to the one that an index names."""
        base, dim, index, source = node.args[:4]
        rank = len(self.values[base.name].shape)
        dropped = self.followed.ended(base.name, index.name, source.name, dim % rank)
        if source.name not in self.followed.rows:
            raise NotRowsError
        self.check(node, dropped)
        masked = Ref(self.filled(node, source.name, dropped, 0))
        self.append(replace(node, args=(base, dim, index, masked, *node.args[4:])))
        return True

    def written(self, node: Node) -> bool:
        """Take rows that are written to others, or compared with them: those that are dropped go
        to a row of their own before all others.
        """
        if node.target == "aten.index_put.default":
            base, (index, *more), source = node.args[:3]
            if more or index is None:
                raise NotRowsError
            dim, accumulates = 0, bool(node.argument(3, "accumulate", False))
        else:
            base, dim, index, source = node.args[:4]
            accumulates = False
        value = self.values[base.name]
        dim %= len(value.shape)
        dropped = self.followed.ended(base.name, index.name, source.name, dim)
        if accumulates:
            raise NotRowsError
        one = (*value.shape[:dim], 1, *value.shape[dim + 1 :])
        size = value.shape[dim]
        more_rows = size + 1 if isinstance(size, int) else Sym(size.expr + 1, size.hint + 1)
        longer = (*value.shape[:dim], more_rows, *value.shape[dim + 1 :])
        first = self.make(node, "aten.slice.Tensor", one, value.dtype, base, dim, 0, 1)
        wide = self.make(node, "aten.cat.default", longer, value.dtype, (Ref(first), base), dim)
        places = self.values[index.name]
        # Places that are counted from the end, from -1 on, are where they were.
        first_on = self.make(node, "aten.ge.Scalar", places.shape, torch.bool, index, 0)
        moved = self.make(node, "aten.add.Tensor", places.shape, places.dtype, index, Ref(first_on))
        self.followed.rows[moved] = self.followed.rows[index.name]
        moved = self.filled(node, moved, dropped, 0)
        if node.target == "aten.index_put.default":
            args: tuple[Any, ...] = (Ref(wide), (Ref(moved),), source)
        else:
            args = (Ref(wide), dim, Ref(moved), source, *node.args[4:])
        made = self.make(node, node.target, longer, value.dtype, *args, **dict(node.kwargs))
        self.append(replace(node, target="aten.slice.Tensor", args=(Ref(made), dim, 1), kwargs=()))
        return True

    def scored(self, node: Node) -> bool:
        """Take a loss over rows: those that are dropped have a class that it ignores."""
        scores, target, *rest = node.args
        labels = self.graph.values[target.name]
        reduction = node.argument(3, "reduction", 1)
        if {self.followed.dim_of(scores.name), self.followed.dim_of(target.name)} != {0}:
            raise NotRowsError
        if len(labels.shape) != 1 or labels.dtype.is_floating_point or not reduction:
            raise NotRowsError
        dropped = self.followed.dropped(scores.name, target.name)
        ignored = node.argument(4, "ignore_index", -100)
        masked = Ref(self.filled(node, target.name, dropped, ignored))
        self.append(replace(node, args=(scores, masked, *rest)))
        return True


# How a call ends the way of rows; each returns False where the rows go on.
_ENDS: dict[str, Callable[[_Kept, Node], bool]] = {
    "aten.sum.default": _Kept.summed,
    "aten.sum.dim_IntList": _Kept.summed,
    "aten.mean.default": _Kept.summed,
    "aten.mean.dim": _Kept.summed,
    "aten.scatter_add.default": _Kept.scattered,
    "aten.index_add.default": _Kept.scattered,
    "aten.scatter_reduce.two": _Kept.written,
    "aten.index_put.default": _Kept.written,
    "aten.cross_entropy_loss.default": _Kept.scored,
}
