"""Small sizes to run an op at: all different, and in the order of the call's own."""

from __future__ import annotations

from typing import Any

import sympy

from autoparallel.discovery.shape_pattern import Pattern
from autoparallel.graph.graph import Dim, Sym, hint, size_expression
from autoparallel.rules.rule import OpCall

__all__ = ["CHOICES", "assignment", "ratio", "sorted_atoms"]

# Irregular, so that sums and differences of sizes in one row are not those in another.
_POOLS = (
    (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16),
    (6, 7, 9, 11, 13, 14, 15, 17, 18, 19, 21, 22),
    (5, 7, 8, 11, 12, 13, 16, 17, 19, 20, 21, 23),
)
# Smaller ones for calls of many sizes, whose products would be large.
_LOW_POOLS = (
    (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13),
    (3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 16),
    (2, 4, 5, 6, 8, 9, 11, 12, 13, 14, 15, 16),
)
# With more independent sizes than this, the lower pools are used.
_MANY = 5
CHOICES = len(_POOLS)


def assignment(order: tuple[int, ...], which: int) -> dict[int, int]:
    """Return small values for the independent sizes: all different,
    and in the order of the call's own sizes.

    order: indices of the independent sizes, from the smallest to the largest of the call. which: 0,
    1 or 2, for different values.

    >>> assignment((2, 0), 0)
    {2: 5, 0: 6}
    """
    pool = _POOLS[which] if len(order) <= _MANY else _LOW_POOLS[which]
    return {
        atom: pool[i] if i < len(pool) else pool[-1] + i - len(pool) + 1
        for i, atom in enumerate(order)
    }


def sorted_atoms(pattern: Pattern, call: OpCall) -> tuple[int, ...]:
    """Return the pattern's independent sizes from the smallest to the largest of the call."""
    atoms = pattern.solve(call) or {}
    return tuple(sorted(pattern.atoms, key=lambda atom: (hint(atoms.get(atom, 0)), atom)))


def ratio(size: Dim, *parts: Dim) -> int | None:
    """Return the quotient of `size` and the product of `parts`, if that is a whole number whatever
    the symbols are; else None.

    >>> ratio(24, 2, 3), ratio(24, 5)
    (4, None)
    """
    product: Any = 1
    number = 1
    symbolic = isinstance(size, Sym)
    for part in parts:
        number *= hint(part)
        product = product * size_expression(part)
        symbolic = symbolic or isinstance(part, Sym)
    # A cheap test before sympy.
    if hint(size) % number:
        return None
    if not symbolic:
        return hint(size) // number
    quotient = sympy.cancel(size_expression(size) / product)
    return int(quotient) if quotient.is_Integer else None
