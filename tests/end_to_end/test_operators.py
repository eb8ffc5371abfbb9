"""docs/operators.md is true: the operators that it lists are split, or not, as it says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from operator_sweep.outcomes import FAILURES, Run, differences
from operator_sweep.table import Row, document, kinds_in, row_of

if TYPE_CHECKING:
    from operator_sweep.subjects import Subject

TABLE = Path(__file__).parents[2] / "docs" / "operators.md"
# One op of so many is run by `make test`, and all of them by `make opinfo`.
SHARE = 40
# Those whose process dies would take this one with it.
NAMES = [name for name, kind in kinds_in(TABLE.read_text()).items() if kind != "dead"]


@cache
def subjects() -> dict[str, Subject]:
    """Return the database, which takes a second to import, by name."""
    from operator_sweep.subjects import all_subjects

    return {subject.name: subject for subject in all_subjects()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES[::SHARE])
def test_a_share_of_the_operators(name: str) -> None:
    """An op is run in one way after the other until it is what the table says."""
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


def test_nothing_is_wrong() -> None:
    assert not {"wrong", "crash", "refused"} & set(kinds_in(TABLE.read_text()).values())


def test_what_runs_come_to() -> None:
    """One failure is enough, and one plan that splits the op."""
    right, whole = Run("", "2", "right", split=1), Run("", "3", "right", whole=1, alone="why")
    assert row_of("an op", [whole]) == Row("an op", "whole", "why")
    assert row_of("an op", [whole, right]) == Row("an op", "split", "why")
    for status in FAILURES:
        assert row_of("an op", [right, Run("", "2", status, "so")]) == Row("an op", status, "so")
    python = Run("", "2", "right", python="a branch")
    assert row_of("an op", [python]) == Row("an op", "Python", "a branch")
    text = document({"an op": [right], "torch.nn.Other": [python]})
    assert kinds_in(text) == {"an op": "split", "torch.nn.Other": "Python"}
    assert "- torch.nn.Other: `a branch`" in text


def test_what_differs_is_wrong() -> None:
    """Of a model whose outputs are right: a gradient by little, one that is missing, one more."""
    one = {"output 0": torch.ones(2).double(), "gradient of a": torch.ones(2).double()}
    assert not list(differences(one, one))
    off = one | {"gradient of a": one["gradient of a"] + 1e-7}
    assert list(differences(off, one)) == ["gradient of a is off by 1e-07"]
    missing = {"output 0": one["output 0"]}
    assert list(differences(missing, one)) == ["gradient of a is missing"]
    assert list(differences(one, missing)) == ["gradient of a is not expected"]
