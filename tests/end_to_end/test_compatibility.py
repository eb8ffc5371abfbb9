"""docs/compatibility.md is true: the habits that it lists do what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from habits.launch import outcomes
from habits.registry import Habit, all_habits
from habits.table import WORLD_SIZES, cell, cells, reason

TABLE = Path(__file__).parents[2] / "docs" / "compatibility.md"
# One row of so many is run by `make test`, on one number of ranks or the other; `make broad` runs
# all of them on both.
SHARE = 24
world_sizes = pytest.mark.parametrize("world_size", WORLD_SIZES)


def compare(habits: list[Habit], world_size: int) -> None:
    """Run rows, and compare what comes of them with the table.

    It was written for one release of torch. On others, which have other messages and may do more,
    no row may fail that does not fail in the table.
    """
    text = TABLE.read_text()
    words = " ".join(text.split())
    table = cells(text)
    release = torch.__version__.partition("+")[0]
    for name, outcome in outcomes(habits, world_size).items():
        expected = table[name][WORLD_SIZES.index(world_size)]
        told = f"{name}, {world_size} ranks: {outcome}"
        if outcome.kind == "not run":
            continue
        if f" torch {release}," not in words:
            assert not outcome.failed or expected.startswith("**"), told
            continue
        assert cell(outcome) == expected, told
        # Which of two hanging ranks tells why it failed is a matter of chance.
        if not outcome.failed:
            assert " ".join(reason(outcome).split()) in words, told


def test_the_table_has_every_habit() -> None:
    assert list(cells(TABLE.read_text())) == [habit.words for habit in all_habits()]


@world_sizes
def test_a_share_of_the_habits(world_size: int) -> None:
    first = WORLD_SIZES.index(world_size) * SHARE
    compare(list(all_habits()[first :: len(WORLD_SIZES) * SHARE]), world_size)


@pytest.mark.broad
@world_sizes
@pytest.mark.parametrize("group", dict.fromkeys(habit.group for habit in all_habits()))
def test_every_habit(group: str, world_size: int) -> None:
    compare([habit for habit in all_habits() if habit.group == group], world_size)
