"""docs/faults.md is true: every fault is in its table, and comes to what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from run_faults import FAULTS, try_all

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_has_every_fault(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    sys.modules.pop("make_faults", None)
    import make_faults

    lines = make_faults.rows_of((DOCS / "faults.md").read_text())
    assert list(lines) == [row.what for row in FAULTS]
    assert len(lines) >= 15


@pytest.mark.broad
def test_every_fault():
    """It raises where anything else comes of one than its row says."""
    assert len(list(try_all())) == len(FAULTS)
