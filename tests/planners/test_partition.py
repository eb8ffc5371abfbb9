"""Chains of work, cut into runs: against all cuts that there are."""

import itertools
import math
import random

import numpy as np
import pytest

from planners import InfeasibleError, partition, quickest_cut


def lengths(seconds: list[float], sends: list[float], starts: tuple[int, ...]) -> list[float]:
    ends = (*starts[1:], len(seconds))
    cost = [0.0, *sends[1:], 0.0]
    return [sum(seconds[i:j]) + cost[i] + cost[j] for i, j in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_has_a_shorter_longest_run(seed: int) -> None:
    """And of those as short, to 5 %, none sends less; pieces stay with the runs they belong to."""
    draw = random.Random(seed)
    count, runs = draw.randint(2, 8), draw.randint(1, 4)
    seconds = [draw.choice([0.5, 1.0, 1.01, 3.0]) for _ in range(count)]
    sends = [draw.choice([0.0, 0.25, 1.0, math.inf]) for _ in range(count)]
    owners = [
        None if draw.random() < 0.7 else set(draw.sample(range(runs), draw.randint(1, runs)))
        for _ in range(count)
    ]
    cuts = []
    for inner in itertools.combinations(range(1, count), runs - 1):
        starts = (0, *inner)
        place = [sum(start <= piece for start in inner) for piece in range(count)]
        mine = all(own is None or run in own for own, run in zip(owners, place, strict=True))
        longest = max(lengths(seconds, sends, starts))
        if mine and math.isfinite(longest):
            cuts.append((longest, sum(sends[start] for start in inner), starts))
    if not cuts:
        with pytest.raises(InfeasibleError, match="no cut"):
            partition(seconds, sends, runs, owners)
        return
    least = min(longest for longest, _, _ in cuts)
    sent = min(sent for longest, sent, _ in cuts if longest <= least * 1.05)
    chosen = partition(seconds, sends, runs, owners)
    assert chosen in [starts for _, _, starts in cuts]
    assert max(lengths(seconds, sends, chosen)) <= least * 1.05
    assert sum(sends[start] for start in chosen[1:]) == pytest.approx(sent)


def test_work_that_takes_no_time_is_cut() -> None:
    """Nothing is divided by a length of zero."""
    assert len(partition([0.0] * 4, [0.0] * 4, 2)) == 2


@pytest.mark.parametrize("seed", range(40))
def test_a_whole_takes_no_less_than_the_bound(seed: int) -> None:
    """Of all cuts whose runs are no longer than those of the first one, and that send no more."""
    draw = np.random.default_rng(seed)
    count, runs = int(draw.integers(5, 10)), int(draw.integers(2, 5))
    kinds = draw.choice([0.5, 1.0], (2, count))
    seconds, sends = kinds.sum(axis=0).tolist(), draw.choice([0.1, 0.4], count).tolist()
    # A whole is the longest of these paths: how often each run's work of each kind is on them.
    paths = draw.integers(0, 4, (3, 3, runs)).astype(float)

    def told(starts: tuple[int, ...]) -> tuple[float, np.ndarray]:
        rows = [np.add.reduceat(kind, starts) for kind in kinds]
        rows.append(np.array([0.0, *(sends[start] for start in starts[1:])]))
        wholes = (paths * np.array(rows)).sum(axis=(1, 2))
        return float(wholes.max()), paths[wholes.argmax()]

    first = partition(seconds, sends, runs)
    chosen, bound = quickest_cut(seconds, sends, first, told, kinds)
    longest = max(lengths(seconds, sends, first))
    most = max(sends[start] for start in first[1:])
    every = [
        told((0, *inner))[0]
        for inner in itertools.combinations(range(1, count), runs - 1)
        if max(lengths(seconds, sends, (0, *inner))) <= longest + 1e-9
        and max(sends[start] for start in inner) <= most
    ]
    assert bound <= min(every) + 1e-9
    assert min(every) - 1e-9 <= told(chosen)[0] <= told(first)[0]
    assert told(chosen)[0] <= min(every) * 1.001
    assert max(lengths(seconds, sends, chosen)) <= longest + 1e-9
