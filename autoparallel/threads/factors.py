"""Dims as products of factors, which are unified where dims are the same and divided where one of
them turns out to be a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy

from autoparallel.graph.graph import Dim, Sym, hint, size_expression

__all__ = ["Factors"]


class Factors:
    """A forest of factors: a factor is one with another one, or a product of smaller ones.

    Factors are numbers. What is left undivided in the end is a thread.

    >>> factors = Factors()
    >>> merged, heads, width = factors.new(512), factors.new(8), factors.new(64)
    >>> factors.unify([merged], [heads, width])
    True
    >>> factors.leaves([merged]) == [heads, width]
    True
    """

    def __init__(self) -> None:
        self.sizes: list[Dim] = []
        self._same: list[int] = []
        self._inner: list[tuple[int, ...]] = []
        self._quotients: dict[tuple[Dim, Dim], Dim | None] = {}

    def new(self, size: Dim) -> int:
        """Return a new factor of that size."""
        self.sizes.append(size)
        self._same.append(len(self._same))
        self._inner.append(())
        return len(self._same) - 1

    def root(self, factor: int) -> int:
        """Return the factor that stands for all that are one with this one."""
        while self._same[factor] != factor:
            self._same[factor] = self._same[self._same[factor]]
            factor = self._same[factor]
        return factor

    def leaves(self, factors: Iterable[int]) -> list[int]:
        """Return the undivided factors of a product, outermost first."""
        undivided: list[int] = []
        for factor in factors:
            root = self.root(factor)
            inner = self._inner[root]
            undivided += self.leaves(inner) if inner else [root]
        return undivided

    def unify(self, one: Sequence[int], other: Sequence[int]) -> bool:
        """Make two products the same, factor by factor from the outside; divide what must be.

        Return False where they cut across each other (2 of 6 against 3 of 6), or end apart: the
        factors up to there are unified, the others stay as they are.
        """
        left, right = self.leaves(one)[::-1], self.leaves(other)[::-1]
        while left and right:
            first, second = self.root(left.pop()), self.root(right.pop())
            # A factor that was divided meanwhile, as it is in both products.
            if self._inner[first] or self._inner[second]:
                left += self.leaves([first])[::-1]
                right += self.leaves([second])[::-1]
                continue
            if first == second:
                continue
            if self.sizes[first] == self.sizes[second]:
                self._join(first, second)
            elif (rest := self._quotient(self.sizes[first], self.sizes[second])) is not None:
                left.append(self._divide(first, second, rest))
            elif (rest := self._quotient(self.sizes[second], self.sizes[first])) is not None:
                right.append(self._divide(second, first, rest))
            else:
                return False
        return not left and not right

    def _join(self, first: int, second: int) -> None:
        """Make two undivided factors one; the older one stands for both."""
        older, younger = min(first, second), max(first, second)
        self._same[younger] = older

    def _divide(self, whole: int, outer: int, rest: Dim) -> int:
        """Make a factor the product of another one and a new one of size `rest`; return that."""
        inner = self.new(rest)
        self._inner[whole] = (outer, inner)
        return inner

    def _quotient(self, whole: Dim, part: Dim) -> Dim | None:
        """Return whole / part where that is a size greater than 1, else None."""
        key = (whole, part)
        if key not in self._quotients:
            self._quotients[key] = _quotient(whole, part)
        return self._quotients[key]


def _quotient(whole: Dim, part: Dim) -> Dim | None:
    """Return the quotient of two sizes, None where it is no size greater than 1."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part > 1 and whole % part == 0 and whole != part else None
    if hint(part) <= 1 or hint(whole) % hint(part):
        return None
    expression: Any = sympy.cancel(size_expression(whole) / size_expression(part))
    if sympy.fraction(expression)[1] != 1 or expression == 1:
        return None
    number = hint(whole) // hint(part)
    if expression.is_Integer:
        return int(expression) if expression > 1 else None
    return Sym(expression, number) if number > 1 else None
