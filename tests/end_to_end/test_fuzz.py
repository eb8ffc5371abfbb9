"""Random programs, split by random costs, give what they give unsplit: results and gradients.

A failure of `make fuzz` prints the smallest program that fails and the way to split it, as a test
that is ready for fuzz_corpus.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest
from broad_cases import share_of
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


def judge(program: Program, ways: Sequence[Split], coverage: Coverage) -> None:
    coverage.programs += 1
    coverage.tried = (program, ways[0])
    try:
        subject = Subject(program)
        for way in ways:
            coverage.tried = (program, way)
            subject.check(way, coverage)
    except UnfitError:
        coverage.refused += 1


def some(ways: st.SearchStrategy[Split]) -> st.SearchStrategy[list[Split]]:
    return st.lists(ways, min_size=WAYS_EACH, max_size=WAYS_EACH)


@quiet
@settings(CALM, max_examples=8, derandomize=True)
@given(programs(), some(splits()))
def test_random_programs(coverage: Coverage, program: Program, ways: list[Split]) -> None:
    judge(program, ways, coverage)


@quiet
@settings(CALM, max_examples=4, derandomize=True)
@given(containing(), some(splits()))
def test_equal_blocks(coverage: Coverage, program: Program, ways: list[Split]) -> None:
    judge(program, ways, coverage)


THREE = (2, 2, 2)
# What `make fuzz` tries MANY of: programs, and the ways to split each. A program is traced once.
KINDS = {
    "programs": (programs(), st.tuples(splits(), splits(sparing=True), splits(on=THREE))),
    "equal blocks": (containing(), st.tuples(splits(), splits(on=THREE, sparing=True))),
}


@quiet
@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_many(coverage: Coverage, kind: str) -> None:
    drawn, ways = KINDS[kind]

    @settings(CALM, max_examples=MANY, report_multiple_bugs=False)
    @given(drawn, ways)
    def tried(program: Program, ways: tuple[Split, ...]) -> None:
        judge(program, ways, coverage)

    try:
        tried()
    except BaseException:
        # The last one that ran is the smallest that fails.
        print("\n".join(ready(*coverage.tried)))
        raise
    print(f"\n{kind}: {coverage.programs} programs so far")


def ready(program: Program, way: Split) -> list[str]:
    """Return the lines of a regression, as the corpus has them."""
    rows = [f"        {row}" for row in program.rows]
    head = "\nA test for ON_SEVERAL_AXES in tests/support/fuzz_corpus.py:"
    end = ['        """),', f"        {way},", "    ),"]
    return [head, '    "...": (', '        Program("""', *rows, *end]


@quiet
@pytest.mark.parametrize("name", share_of(REGRESSIONS, 2))
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
