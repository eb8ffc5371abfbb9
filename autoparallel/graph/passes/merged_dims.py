"""A pass that sees through dims that are merged, moved and divided again."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import sympy

from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, Value, hint, size_expression
from autoparallel.graph.passes.editing import first_operand, rebuilt

__all__ = ["see_through_merges"]

Shape = tuple[Dim, ...]


def see_through_merges(graph: Graph) -> Graph:
    """reshape(transpose(reshape(%x, (s, 8*b, 4)), 0, 1), (b, 8, s, 4)), with %x of (s, b, 32),
    becomes permute(reshape(%x, (s, b, 8, 4)), (1, 2, 0, 3)).

    Why: where batch and heads are flattened into one dim, no part of that dim is a part of the
    heads. After: where dims are merged, moved and divided again, the result is computed from dims
    that were never merged. All values keep name and shape; those that nobody reads any more are
    left to `drop_unused`.
    """
    return _Remerger(graph).run()


@dataclass(frozen=True, slots=True)
class _Apart:
    """A merged value, seen apart: it is `value` with neighbouring dims merged.

    groups: its dim i is groups[i] neighbouring dims of `value`, in order.
    """

    value: Value
    groups: tuple[int, ...]


class _Remerger:
    """One run of the pass. nodes: of the new graph. apart: merged values seen apart, by name.
    known: common refinements by their two shapes, because sympy is slow.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.apart: dict[str, _Apart] = {}
        self.known: dict[tuple[Shape, Shape], Shape | None] = {}

    def run(self) -> Graph:
        """Return the new graph: every reshape and every move of merged dims is rewritten, the rest
        is as it was.
        """
        for node in self.graph.nodes:
            if node.target == "aten.reshape.default":
                self.reshape(node)
            elif node.kind == "call" and _moved(node) in self.apart:
                self.move(node)
            else:
                self.nodes.append(node)
        return rebuilt(self.graph, self.nodes, {})

    def reshape(self, node: Node) -> None:
        """Append a reshape from the unmerged value to the finest dims,
        and from there to the result.
        """
        source, result = self.graph.values[first_operand(node)], node.result
        known = self.apart.get(source.name) or _Apart(source, (1,) * len(source.shape))
        shapes = (known.value.shape, result.shape)
        if shapes not in self.known:
            self.known[shapes] = _refined(*shapes)
        refined = self.known[shapes]
        # Loops see through merges of fixed sizes by themselves.
        symbolic = any(isinstance(size, Sym) for size in refined or ())
        if refined is None or not symbolic or (refined == result.shape and known.value is source):
            self.nodes.append(node)
            return
        if refined == result.shape:
            # The result is the finest dims themselves: it is reshaped past the merge.
            self.nodes.append(replace(node, args=(Ref(known.value.name), result.shape)))
            return
        value = known.value
        if refined != value.shape:
            value = replace(result, name=f"{node.name}_parts", shape=refined)
            args = (Ref(known.value.name), refined)
            self.nodes.append(replace(node, name=value.name, results=(value,), args=args))
        groups = _groups(refined, result.shape)
        self.apart[result.name] = _Apart(value, groups)
        rows = _fixed_merged(refined, groups)
        # Fixed sizes are merged first and by themselves: loops see through that reshape, and only
        # the one that merges symbolic sizes stays opaque to them.
        if rows not in (refined, result.shape):
            middle = replace(result, name=f"{node.name}_rows", shape=rows)
            args = (Ref(value.name), rows)
            self.nodes.append(replace(node, name=middle.name, results=(middle,), args=args))
            value = middle
        self.nodes.append(replace(node, args=(Ref(value.name), result.shape)))

    def move(self, node: Node) -> None:
        """A transpose or a permutation of merged dims: whole groups change places."""
        merged = self.apart[first_operand(node)]
        rank = len(merged.groups)
        order = list(range(rank))
        if node.target == "aten.permute.default":
            order = [dim % rank for dim in node.args[1]]
        else:
            one, two = (dim % rank for dim in node.args[1:3])
            order[one], order[two] = order[two], order[one]
        starts = [sum(merged.groups[:index]) for index in range(rank)]
        inner_order = [starts[i] + k for i in order for k in range(merged.groups[i])]
        shape = tuple(merged.value.shape[dim] for dim in inner_order)
        value = replace(node.result, name=f"{node.name}_parts", shape=shape)
        permuted: dict[str, Any] = {
            "args": (Ref(merged.value.name), tuple(inner_order)),
            "kwargs": (),
        }
        target = "aten.permute.default"
        self.nodes.append(
            replace(node, name=value.name, target=target, results=(value,), **permuted)
        )
        args = (Ref(value.name), node.result.shape)
        self.nodes.append(replace(node, target="aten.reshape.default", args=args, kwargs=()))
        self.apart[node.name] = _Apart(value, tuple(merged.groups[i] for i in order))


def _moved(node: Node) -> str:
    """Return the name of what a transpose or a permutation moves; "" for any other node."""
    moves = ("aten.transpose.int", "aten.permute.default")
    return first_operand(node) if node.target in moves else ""


def _ends(shape: Shape) -> list[Any]:
    """Return the products of the sizes from the right, without those of size 1:
    where dims end in memory.
    """
    products: list[Any] = [sympy.Integer(1)]
    for size in reversed(shape):
        if size != 1:
            products.append(products[-1] * size_expression(size))
    return products


def _refined(before: Shape, after: Shape) -> Shape | None:
    """Return the finest sizes of which both shapes are made by merging neighbours;
    None where there are none.
    """
    # A dim of size 1 may stand anywhere, so that groups would not be unique; the dims of a tensor
    # without elements may have any factors.
    if any(size in (0, 1) for size in (*before, *after)):
        return None
    # An empty tensor's dims all end in one place.
    if 0 in map(hint, (*before, *after)):
        return None
    sizes_known = {size.expr: size.hint for size in (*before, *after) if isinstance(size, Sym)}
    ends = dict.fromkeys((*_ends(before), *_ends(after)))
    symbols = {symbol: sizes_known.get(symbol) for end in ends for symbol in end.free_symbols}
    if None in symbols.values():
        return None
    # Ordered by the example inputs' sizes; below it is checked that each end divides the next.
    ordered = sorted(ends, key=lambda end: int(end.subs(symbols)))
    sizes: list[Dim] = []
    for low, high in pairwise(ordered):
        ratio = sympy.cancel(high / low)
        # It must divide for all sizes of the inputs, not just for the example's.
        if not ratio.is_polynomial() or sympy.fraction(ratio)[1] != 1:
            return None
        number = int(ratio.subs(symbols))
        sizes.append(number if ratio.is_number else Sym(ratio, number))
    return tuple(reversed(sizes))


def _fixed_merged(parts: Shape, groups: tuple[int, ...]) -> Shape:
    """Return the parts with those groups merged whose sizes are all fixed."""
    sizes: list[Dim] = []
    start = 0
    for count in groups:
        group = parts[start : start + count]
        fixed = [size for size in group if isinstance(size, int)]
        sizes += [math.prod(fixed)] if len(fixed) == count else group
        start += count
    return tuple(sizes)


def _groups(parts: Shape, merged: Shape) -> tuple[int, ...]:
    """Return how many neighbouring `parts` make each size of `merged`."""
    counts = []
    index = 0
    for size in merged:
        product: Any = sympy.Integer(1)
        count = 0
        while sympy.expand(product - size_expression(size)) != 0:
            product = product * size_expression(parts[index])
            index += 1
            count += 1
        counts.append(count)
    return tuple(counts)
