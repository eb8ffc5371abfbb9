"""Tables known by content: equal ones have one number, however large they are."""

from __future__ import annotations

import numpy as np
import pytest

from planners.table_memo import Memo


@pytest.mark.parametrize("size", [3, 40_000])
def test_equal_tables_have_one_number_and_others_another(size: int) -> None:
    """Also where the entry that differs is not among those that are looked at first."""
    table = np.linspace(0.0, 1.0, size)
    other = table.copy()
    other[1] += 0.5
    memo = Memo()
    assert memo.table(table) == memo.table(table.copy())
    assert memo.table(other) != memo.table(table)
    assert memo.table(other.copy()) == memo.table(other)
    assert memo.table(table.reshape(1, -1)) != memo.table(table)


def test_a_contraction_leaves_its_operands_as_they_are() -> None:
    """And its result has the least entry 0, in whatever order its axes are."""
    generator = np.random.default_rng(0)
    one, two = generator.uniform(1, 2, (4, 600)), generator.uniform(1, 2, (4, 600))
    memo = Memo()
    numbers = memo.table(one), memo.table(two)
    number, offset = memo.contract(
        ((numbers[0], (0, 1)), (numbers[1], (0, 2))), (4, 600, 600), (2, 1)
    )
    expected = (one[:, :, None] + two[:, None, :]).min(axis=0).T
    np.testing.assert_allclose(memo.tables[number] + offset, expected, rtol=1e-14)
    assert memo.tables[number].min() == 0.0
    assert np.array_equal(memo.tables[numbers[0]], one)
    assert np.array_equal(memo.tables[numbers[1]], two)
