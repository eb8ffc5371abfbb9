"""docs/operators.md is true: the operators that it lists are split, or not, as it says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from operator_sweep.table import kinds_in, row_of

if TYPE_CHECKING:
    from operator_sweep.subjects import Subject

TABLE = Path(__file__).parents[2] / "docs" / "operators.md"
# One op of so many is run by `make test`, and all of them by `make opinfo`.
SHARE = 10
# An op is run in more ways until it is what the table says.


@cache
def subjects() -> dict[str, Subject]:
    """Return the database, which takes a second to import, by name."""
    from operator_sweep.subjects import all_subjects

    return {subject.name: subject for subject in all_subjects()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(kinds_in(TABLE.read_text()))[::SHARE])
def test_a_share_of_the_operators(name: str) -> None:
    from operator_sweep.trial import runs_of

    text = TABLE.read_text()
    expected = kinds_in(text)[name]
    same = f"Torch {torch.__version__.partition('+')[0]};" in text
    if not same and name not in subjects():
        return  # another release of torch has other ops
    runs = []
    for run in runs_of(subjects()[name], seed=1):
        runs.append(run)
        row = row_of(name, runs)
        assert not row.failed, f"{run}\n{run.trace}"
        if row.kind == expected or not same:
            return
    assert row_of(name, runs).kind == expected, runs


def test_the_table_has_no_failures() -> None:
    assert not {"wrong", "crash", "dead", "slow"} & set(kinds_in(TABLE.read_text()).values())
