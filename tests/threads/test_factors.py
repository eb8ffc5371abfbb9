"""Factors of dims: what is the same is one, what is a product is divided."""

from __future__ import annotations

import pytest
import sympy

from autoparallel.graph.graph import Dim, Sym
from autoparallel.threads.factors import Factors

BATCH, SEQUENCE = (
    Sym(sympy.Symbol("s0", positive=True), 3),
    Sym(sympy.Symbol("s1", positive=True), 5),
)
BOTH = Sym(BATCH.expr * SEQUENCE.expr, 15)


@pytest.mark.parametrize(
    ("one", "other", "sizes"),
    [
        ([12], [12], [12]),
        ([12], [3, 4], [3, 4]),
        ([6, 4], [3, 8], [3, 2, 4]),
        ([24], [2, 3, 4], [2, 3, 4]),
        ([BOTH], [BATCH, SEQUENCE], [BATCH, SEQUENCE]),
        ([BOTH, 4], [BATCH, SEQUENCE, 2, 2], [BATCH, SEQUENCE, 2, 2]),
    ],
    ids=str,
)
def test_products_become_the_same(one: list[Dim], other: list[Dim], sizes: list[Dim]) -> None:
    """Both have the same undivided factors after that, of these sizes."""
    factors = Factors()
    left, right = [factors.new(size) for size in one], [factors.new(size) for size in other]
    assert factors.unify(left, right)
    assert factors.leaves(left) == factors.leaves(right)
    assert [factors.sizes[leaf] for leaf in factors.leaves(left)] == sizes


@pytest.mark.parametrize(
    ("one", "other"), [([2, 3], [3, 2]), ([6], [4]), ([BATCH], [SEQUENCE]), ([12], [3])], ids=str
)
def test_what_cuts_across_stays_apart(one: list[Dim], other: list[Dim]) -> None:
    """And each side still has its size."""
    factors = Factors()
    left, right = [factors.new(size) for size in one], [factors.new(size) for size in other]
    assert not factors.unify(left, right)
    for side, sizes in ((left, one), (right, other)):
        product = sympy.Integer(1)
        for leaf in factors.leaves(side):
            size = factors.sizes[leaf]
            product *= size.expr if isinstance(size, Sym) else size
        assert product == sympy.prod([s.expr if isinstance(s, Sym) else s for s in sizes])


def test_what_is_divided_later_is_divided_everywhere() -> None:
    """A dim that was joined before its heads were known has them afterwards."""
    factors = Factors()
    weight, hidden, heads, width = (factors.new(size) for size in (64, 64, 8, 8))
    assert factors.unify([weight], [hidden])
    assert factors.unify([hidden], [heads, width])
    assert factors.leaves([weight]) == [heads, width]
