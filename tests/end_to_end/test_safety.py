"""Files from elsewhere that were changed at random are refused, or harm nothing."""

from __future__ import annotations

import random

from safety_rows import file_rows


def test_files_from_elsewhere_harm_nothing() -> None:
    """A few of each; `make safety` tries thousands, and edits of plans."""
    rows = list(file_rows(12, random.Random(5)))
    assert len(rows) == 6
    assert [row for row in rows if not row.is_good] == []
    assert all(row.counts for row in rows)
