"""Sizes as algebra: what a rank holds and runs, in the sizes of inputs and of mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import sympy

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Dim, Graph, Sym, hint, map_leaves
from autoparallel.mesh import Mesh
from autoparallel.placement import Layout, Shard, divides_in_runs, local_size
from autoparallel.rules.loop_splits import tile_of
from autoparallel.rules.rule import OpCall, ShardingRule

__all__ = ["Algebra"]

# The letters for the sizes of an input, outermost first, where the caller does not say.
_LETTERS = ("b", "s")
# Up to so many times a named size is written as its multiple.
_MULTIPLES = 16


class Algebra:
    """The symbols of one graph on one mesh.

    names: letters for numbers among the sizes, {12288: "h"}. letters: for the sizes that the inputs
    decide, in the order in which the inputs show them; where two inputs have equal sizes in the
    same place (tokens and labels), these are one symbol. Mesh axes' sizes are called as the axes.
    inputs: symbols of the inputs' sizes. axes: of the mesh axes. values: the size that each symbol
    stands for in the plan, in the order in which they are written.

    >>> from autoparallel.graph.graph import Graph
    >>> algebra = Algebra(Graph((), ()), Mesh(tp=2), {12: "h"})
    >>> algebra.size(48), algebra.elements((48, 12), (Shard(0),))
    (4*h, 4*h**2/tp)
    """

    def __init__(
        self,
        graph: Graph,
        mesh: Mesh,
        names: Mapping[int, str],
        letters: Sequence[str] = _LETTERS,
    ) -> None:
        self.sizes = tuple(size for _, size in mesh.axes)
        sizes_of_symbols: dict[sympy.Symbol, int] = {}
        self.axes = tuple(_symbol(name, size, sizes_of_symbols) for name, size in mesh.axes)
        named = [(size, _symbol(name, size, sizes_of_symbols)) for size, name in names.items()]
        self.names = tuple(sorted(named, key=lambda row: -row[0]))
        self.renamed: dict[sympy.Expr, sympy.Symbol] = {}
        waiting = list(letters)
        alike: dict[tuple[int, int], sympy.Symbol] = {}
        for node in graph.nodes:
            for place, dim in enumerate(node.result.shape if node.kind == "input" else ()):
                if isinstance(dim, Sym) and dim.expr.is_Symbol and dim.expr not in self.renamed:
                    if (place, dim.hint) not in alike:
                        name = waiting.pop(0) if waiting else f"d{len(alike)}"
                        alike[place, dim.hint] = _symbol(name, dim.hint, sizes_of_symbols)
                    self.renamed[dim.expr] = alike[place, dim.hint]
        self.inputs = tuple(alike.values())
        order = (*self.inputs, *(symbol for _, symbol in named), *self.axes)
        self.values = {symbol: sizes_of_symbols[symbol] for symbol in order}

    def at(self, expression: sympy.Expr, changed: Mapping[str, int] = {}) -> float:
        """Return the value of an expression where the plan was made, but for the sizes that are
        changed.

        changed: by the symbols' names. Raises PlanError for a name that is no symbol's.
        """
        known = {symbol.name: symbol for symbol in self.values}
        for name in changed:
            if name not in known:
                raise PlanError(
                    f"no size of the closed forms is called {name!r}",
                    why=f"their symbols are {', '.join(known)}",
                    fix="name one of these, or plan with `names` and `letters` that have it",
                )
        values = {**self.values, **{known[name]: size for name, size in changed.items()}}
        value = sympy.sympify(sympy.sympify(expression).xreplace(values))
        return int(value) if value.is_integer else float(value)

    def size(self, dim: Dim) -> sympy.Expr:
        """Return the whole size of a dim as an expression: a symbol, a ratio or multiple of one, or
        a number.
        """
        if isinstance(dim, Sym):
            return dim.expr.xreplace(self.renamed)
        for size, symbol in self.names:
            if dim == size:
                return symbol
        # Such as a head's width, h / a.
        for over, above in self.names:
            for under, below in self.names:
                if under > 1 and over > under and over == dim * under:
                    return above / below
        for size, symbol in self.names:
            if dim and dim % size == 0 and dim // size <= _MULTIPLES and size > 1:
                return dim // size * symbol
        return sympy.Integer(dim)

    def share(self, dim: Dim, shards: Iterable[tuple[int, Shard]]) -> sympy.Expr:
        """Return the part of a dim that the busiest rank holds. shards: (axis, split), outermost
        first.
        """
        share, left = sympy.Integer(1), hint(dim)
        for axis, shard in shards:
            count = self.sizes[axis]
            blocks, unit = shard.blocks, shard.unit
            if not (isinstance(blocks, int) and isinstance(unit, int) and shard.repeat == 1):
                # Blocks of several sizes are no multiple of one of them: a number says the share.
                held = local_size(left, shard, count)
                even = shard.repeat == 1 and divides_in_runs(left, blocks, unit, count)
                share *= 1 / self.axes[axis] if even else sympy.Rational(held, left)
                left = held
                continue
            run = blocks * unit
            # Where the ranks divide the runs the form is clean; else the busiest rank has the
            # ceiling.
            if left // run % count == 0:
                share /= self.axes[axis]
            else:
                part = self.size(dim) * share
                share *= run * sympy.ceiling(part / (run * self.axes[axis])) / part
            left = local_size(left, shard, count)
        return share

    def elements(self, shape: Sequence[Dim], layout: Layout) -> sympy.Expr:
        """Return the elements of a tensor that the busiest rank holds."""
        count = sympy.Integer(1)
        for index, dim in enumerate(shape):
            shards = [
                (axis, placement)
                for axis, placement in enumerate(layout)
                if isinstance(placement, Shard) and placement.dim == index
            ]
            count *= self.size(dim) * self.share(dim, shards)
        return count

    def shares(
        self, rule: ShardingRule, operands: Sequence[Layout], results: Sequence[Layout]
    ) -> dict[str, sympy.Expr]:
        """Return the part of each split loop that the busiest rank runs.

        rule: of the op. operands, results: the tensors' layouts.
        """
        split: dict[str, dict[int, Shard]] = {}
        # A loop of which groups of ranks share an element, each with its part of a loop inside.
        grouped: dict[str, sympy.Expr] = {}
        sides = ((rule.operands, operands), (rule.results, results))
        for tensors, layouts in sides:
            for dims, layout in zip(tensors, layouts, strict=True):
                for axis, placement in enumerate(layout):
                    if not isinstance(placement, Shard):
                        continue
                    tile = tile_of(rule, dims, placement, self.sizes[axis])
                    if tile is not None and tile.into:
                        grouped[tile.loop] = 1 / self.axes[axis]
                    elif tile is not None:
                        split.setdefault(tile.loop, {}).setdefault(axis, tile.shard(0))
        # Loops that are split together on one axis share the work once.
        for loop, exchange in rule.exchanges.items():
            for axis in split.get(loop, ()):
                for other in exchange.loops:
                    split.get(other, {}).pop(axis, None)
        return grouped | {
            loop: self.share(rule.sizes[loop], sorted(axes.items(), key=lambda item: item[0]))
            for loop, axes in split.items()
            if loop not in grouped and axes
        }

    def flops(self, rule: ShardingRule, shares: Mapping[str, sympy.Expr]) -> sympy.Expr:
        """Return the FLOPs of a product in the forward pass, on the busiest rank. shares: from
        `shares`.
        """
        count = self._coefficient(rule)
        for loop in rule.loops:
            count *= self.size(rule.sizes[loop]) * shares.get(loop, 1)
        return count

    def _coefficient(self, rule: ShardingRule) -> sympy.Expr:
        """Return the FLOPs per point of a rule's loops. A fused chain has a fraction: a number over
        a summed size.
        """
        flops = Fraction(rule.flops).limit_denominator(10**9)
        result_loops = {name for dims in rule.results for names in dims for name in names}
        # Each product of a fused chain, as attention is one, sums over another loop. Per point of
        # all loops its FLOPs are a number over a summed size, which is found by trying.
        for loop in rule.loops if flops.denominator > 1 else ():
            if loop not in result_loops and not isinstance(rule.sizes[loop], Sym):
                terms = flops * hint(rule.sizes[loop])
                if terms.denominator == 1:
                    return int(terms) / self.size(rule.sizes[loop])
        return sympy.Rational(flops.numerator, flops.denominator)

    def reads(self, dim: Dim) -> frozenset[sympy.Symbol]:
        """Return the symbols of inputs' sizes that a dim is made of."""
        return (
            self.size(dim).free_symbols & set(self.inputs) if isinstance(dim, Sym) else frozenset()
        )

    def grown(self, graph: Graph, symbol: sympy.Symbol, factor: int) -> Graph:
        """Return the graph for inputs with one size `factor` times as large."""
        return graph.map_leaves(self._growth(symbol, factor))

    def scaled(self, call: OpCall, symbol: sympy.Symbol, factor: int) -> OpCall:
        """Return the call for inputs with one size `factor` times as large."""
        grow = self._growth(symbol, factor)

        def grown(values: Iterable[Any]) -> tuple[Any, ...]:
            """Return the values with grown shapes."""
            return tuple(replace(value, shape=map_leaves(grow, value.shape)) for value in values)

        node = replace(
            call.node, results=grown(call.results), args=map_leaves(grow, call.node.args)
        )
        return OpCall(node, grown(call.operands))

    def _growth(self, symbol: sympy.Symbol, factor: int) -> Callable[[Any], Any]:
        """Return a function that gives every size of a graph the hint that it has for larger
        inputs.
        """
        hints = {old: self.values[new] for old, new in self.renamed.items()}
        hints |= {old: hint * factor for old, hint in hints.items() if self.renamed[old] == symbol}
        known: dict[sympy.Expr, Sym] = {}

        def grow(leaf: Any) -> Any:
            if not isinstance(leaf, Sym):
                return leaf
            if leaf.expr not in known:
                known[leaf.expr] = Sym(leaf.expr, int(leaf.expr.subs(hints)))
            return known[leaf.expr]

        return grow

    def power(self, size: int, doubled: int) -> int | None:
        """Return p where doubling one symbol made a size 2^p times as large; None where p is no
        whole number.
        """
        ratio = Fraction(doubled, size) if size else Fraction(1)
        power = ratio.numerator.bit_length() - ratio.denominator.bit_length()
        return power if ratio == Fraction(2) ** power else None

    def named(self, number: int) -> sympy.Expr:
        """Return a number as a small multiple of a named size, where it is one."""
        for size, symbol in self.names:
            if size > 1 and number % size == 0 and number // size <= _MULTIPLES:
                return number // size * symbol
        return sympy.Integer(number)


def _symbol(name: str, size: int, sizes_of_symbols: dict[sympy.Symbol, int]) -> sympy.Symbol:
    """Return a new symbol, with an underline where the name is taken, and note its size."""
    while any(symbol.name == name for symbol in sizes_of_symbols):
        name += "_"
    symbol = sympy.Symbol(name, integer=True, positive=True)
    sizes_of_symbols[symbol] = size
    return symbol
