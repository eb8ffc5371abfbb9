"""Small sizes to run an op at: all different, and in the order of the call's own."""

from __future__ import annotations

from typing import Any

import sympy

from autoparallel.discovery.shape_pattern import Pattern
from autoparallel.graph.graph import Dim, Sym, hint
from autoparallel.rules.rule import OpCall

__all__ = ["CHOICES", "assignment", "ratio", "sorted_atoms"]

# Irregular, so that sums and differences of sizes in one row are not those in another.
_POOLS = (
    (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16),
    (6, 7, 9, 11, 13, 14, 15, 17, 18, 19, 21, 22),
    (5, 7, 8, 11, 12, 13, 16, 17, 19, 20, 21, 23),
)
_LOW_POOLS = (
    (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13),
    (3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 16),
    (2, 4, 5, 6, 8, 9, 11, 12, 13, 14, 15, 16),
)
_MANY = 5
CHOICES = len(_POOLS)


def assignment(order: tuple[int, ...], which: int) -> dict[int, int]:
    """Small sizes, all different, in the order of the call's. which: 0, 1, 2: different ones."""
    pool = _POOLS[which] if len(order) <= _MANY else _LOW_POOLS[which]
    return {
        atom: pool[i] if i < len(pool) else pool[-1] + i - len(pool) + 1
        for i, atom in enumerate(order)
    }


def sorted_atoms(pattern: Pattern, call: OpCall) -> tuple[int, ...]:
    """The pattern's independent sizes from the smallest to the largest of the call."""
    atoms = pattern.solve(call) or {}
    return tuple(sorted(pattern.atoms, key=lambda atom: (hint(atoms.get(atom, 0)), atom)))


def ratio(size: Dim, *parts: Dim) -> int | None:
    """size / product of parts, if that is a whole number whatever the symbols are."""
    product: Any = 1
    number = 1
    symbolic = isinstance(size, Sym)
    for part in parts:
        number *= hint(part)
        product = product * (part.expr if isinstance(part, Sym) else part)
        symbolic = symbolic or isinstance(part, Sym)
    if hint(size) % number:
        return None
    if not symbolic:
        return hint(size) // number
    expression = size.expr if isinstance(size, Sym) else sympy.Integer(size)
    quotient = sympy.cancel(expression / product)
    return int(quotient) if quotient.is_Integer else None
