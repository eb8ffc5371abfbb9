"""Where stages may start, and which of them fit in a rank's memory together."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from autoparallel.planning import stage_work
from autoparallel.planning.stage_work import StageBytes, cut_within, fewer_places


def even(stays: list[float], kept: list[float]) -> StageBytes:
    """Bytes of ops between which nothing is sent."""
    buffers = np.zeros(len(stays) + 1)
    return StageBytes(np.array(stays), np.array(kept), buffers, (), 0.0)


def test_dear_places_stay_where_there_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part that sends much everywhere, some places are kept: a stage spans no such part."""
    monkeypatch.setattr(stage_work, "_FEWEST_PLACES", 4)
    monkeypatch.setattr(stage_work, "_PLACES_EACH", 4)
    sends = [0.0] + [9.0] * 31 + [1.0] * 32
    kept = fewer_places(sends, 4, [1.0] * 64)
    able = [place for place, cost in enumerate(kept) if math.isfinite(cost)]
    assert len(able) <= 17
    assert max(np.diff([*able, 64])) <= 8
    assert cut_within([1.0] * 64, kept, [1] * 4, [0, 1, 2, 3], None, math.inf) == (0, 16, 32, 48)


def test_cheapest_place_nearby_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of places close together, the one that sends least is kept."""
    monkeypatch.setattr(stage_work, "_FEWEST_PLACES", 4)
    monkeypatch.setattr(stage_work, "_PLACES_EACH", 2)
    sends = [0.0] + [3.0, 2.0, 3.0, 1.0] * 8
    kept = fewer_places(sends, 2, [1.0] * 33)
    finite = [cost for cost in kept[1:] if math.isfinite(cost)]
    assert set(finite) == {1.0}


def test_stages_of_a_rank_share_its_limit() -> None:
    """The first stages hold more micro-batches than the last ones of the same rank: equal stages
    fit, though some take more than their number's share of the limit.
    """
    sizes = even([0.0] * 8, [1.0] * 8)
    # Of 4 stages on 2 ranks, the first of each holds three times what the other does.
    held, ranks = (6, 6, 2, 2), (0, 1, 0, 1)
    seconds, allowed = [1.0] * 8, [0.0] * 8
    assert cut_within(seconds, allowed, held, ranks, sizes, 16.0) == (0, 2, 4, 6)
    assert sizes.needs(held, ranks, (0, 2, 4, 6)) == 16.0
    assert list(sizes.limits(held, ranks, 16.0)) == [12.0, 12.0, 4.0, 4.0]
    # What does not fit as equal stages fits as unequal ones.
    cut = cut_within(seconds, allowed, (6, 1), (0, 1), sizes, 18.0)
    assert cut == (0, 3)
    # Where none fits, stages are equal.
    assert cut_within(seconds, allowed, (6, 6), (0, 1), sizes, 18.0) == (0, 4)


@pytest.mark.parametrize("sends", [False, True])
def test_what_cannot_fit_is_known_without_a_search(sends: bool) -> None:
    """Where a cut fits, it may fit; where none does, that is mostly known."""
    numbers = np.random.default_rng(5)
    refused = unknown = 0
    for _ in range(200):
        places = [0, *sorted(map(int, numbers.choice(range(1, 8), 5, replace=False)))]
        sizes = even(list(numbers.uniform(0, 4, 8)), list(numbers.uniform(0, 3, 8)))
        if sends:
            buffers, tied = numbers.uniform(0.1, 1, 9), float(sizes.stays[[1, 6]].min())
            sizes = replace(sizes, buffers=buffers, twice=((1, 6, tied),), besides=1.0)
            sizes.buffers[[0, 8]] = 0.0
        held, ranks = (3, 2, 1), (0, 1, 2)
        limit = float(numbers.uniform(8, 24))
        size_of, limits = sizes.sizes(held), sizes.limits(held, ranks, limit)
        fitting = [
            cut
            for cut in itertools.combinations(places[1:], 2)
            if all(
                size_of(run, np.array(start), np.array(end)) <= limits[run]
                for run, (start, end) in enumerate(itertools.pairwise((0, *cut, 8)))
            )
        ]
        may = sizes.may_fit(held, ranks, limit, places)
        assert may or not fitting
        refused += not may
        unknown += may and not fitting
    assert 40 < refused < 160
    assert unknown <= (0.2 if sends else 0.05) * refused
