"""Random programs, split by random costs, give what they give unsplit: results and gradients.

A failure prints a program and a way to split it; put both into fuzz_corpus.py as a regression.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from fuzz_corpus import ON_SEVERAL_AXES, REGRESSIONS, WAYS
from fuzz_draw import containing, programs, splits
from fuzz_programs import Program
from fuzz_split import Coverage, Split, Subject, UnfitError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from releases import lstm_states

WAYS_EACH = 2
# How many programs `make fuzz` tries of each kind.
MANY = int(os.environ.get("FUZZ_PROGRAMS", "2000"))
CALM = settings(
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
quiet = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides", "ignore:Using padding='same' with even kernel"
)


@pytest.fixture(scope="module")
def coverage() -> Iterator[Coverage]:
    """What all programs of this file covered: shown with -s."""
    found = Coverage()
    yield found
    print(f"\n{found}")


def judge(program: Program, ways: list[Split], coverage: Coverage) -> None:
    coverage.programs += 1
    try:
        subject = Subject(program)
        for way in ways:
            subject.check(way, coverage)
    except UnfitError:
        coverage.refused += 1


some_ways = st.lists(splits(), min_size=WAYS_EACH, max_size=WAYS_EACH)


@quiet
@settings(CALM, max_examples=100, derandomize=True)
@given(programs(), some_ways)
def test_random_programs(coverage: Coverage, program: Program, ways: list[Split]) -> None:
    judge(program, ways, coverage)


@quiet
@settings(CALM, max_examples=25, derandomize=True)
@given(containing(), some_ways)
def test_equal_blocks(coverage: Coverage, program: Program, ways: list[Split]) -> None:
    judge(program, ways, coverage)


@quiet
@pytest.mark.fuzz
@settings(CALM, max_examples=MANY // 4)
@given(containing(), some_ways)
def test_many_equal_blocks(coverage: Coverage, program: Program, ways: list[Split]) -> None:
    judge(program, ways, coverage)


@quiet
@pytest.mark.fuzz
@settings(CALM, max_examples=MANY)
@given(programs(), some_ways)
def test_many_random_programs(coverage: Coverage, program: Program, ways: list[Split]) -> None:
    judge(program, ways, coverage)


@quiet
@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_failed_once(coverage: Coverage, name: str) -> None:
    subject = Subject(REGRESSIONS[name])
    for way in WAYS:
        subject.check(way, coverage)


@quiet
@pytest.mark.parametrize(
    "name",
    [
        # Some have an LSTM in them.
        pytest.param(name, marks=lstm_states if "torch.lstm" in program.text else ())
        for name, (program, _) in ON_SEVERAL_AXES.items()
    ],
)
def test_what_failed_once_on_several_axes(coverage: Coverage, name: str) -> None:
    program, way = ON_SEVERAL_AXES[name]
    Subject(program).check(way, coverage)
