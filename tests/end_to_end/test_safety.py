"""docs/safety.md is true: what it lists is tried, and nothing happens that must not."""

from __future__ import annotations

from pathlib import Path

import pytest
from safety.registry import GOOD, Row, all_rows
from safety.table import lines_of

TABLE = Path(__file__).parents[2] / "docs" / "safety.md"
# One row of so many is tried by `make test`, and all of them by `make broad`.
SHARE = 20
quiet = pytest.mark.filterwarnings("ignore")


def compare(rows: tuple[Row, ...], count: int) -> None:
    for row in rows:
        happened = row.tried(count, seed=5)
        assert set(happened) <= GOOD, (row.what, happened)
        assert happened.total()


def test_the_table_has_every_row() -> None:
    lines = lines_of(TABLE.read_text())
    assert list(lines) == [row.what for row in all_rows()]
    assert len(lines) >= 40
    assert not [line for line in lines.values() if "**" in line]


@quiet
def test_a_share_of_the_rows() -> None:
    """A few of each; `make safety` tries thousands."""
    compare(all_rows()[::SHARE], 12)


@pytest.mark.broad
@quiet
def test_every_row() -> None:
    compare(all_rows(), 100)
