"""A chain of work is cut into runs, of which the longest takes as little as can be."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from planners.solution import InfeasibleError

__all__ = ["partition"]

# A cut that sends less is taken where the longest run takes no more than this much longer.
_NEAR = 1.05
# The weight of squares of lengths, beside the least that a cut sends.
_EVEN = 1e-3


def partition(
    seconds: Sequence[float],
    sends: Sequence[float],
    runs: int,
    owners: Sequence[Collection[int] | None] | None = None,
) -> tuple[int, ...]:
    """Return the places at which the runs start; the first is 0.

    seconds: of each piece of work, in order. sends: by place, the seconds that a cut before that
    piece adds to the run that ends there and to the one that starts; infinite where none may be.
    runs: their number; none is empty. owners: for each piece, the runs that it may belong to; None
    for all.
    The longest run is the shortest that there is, to 5 %, among those the cuts send least, and
    among these the runs are as equal as can be.
    Dynamic programming over the places: exact, and quadratic in their number.
    Raises InfeasibleError where there is no such cut.

    >>> partition([1.0, 1.0, 1.0, 3.0], [0.0] * 4, 2)
    (0, 3)
    >>> partition([1.0, 1.0, 1.0, 1.0], [0.0, 5.0, math.inf, 5.0], 2)
    (0, 1)
    >>> partition([1.0] * 21, [0.1] * 21, 5)
    (0, 5, 9, 13, 17)
    """
    count = len(seconds)
    ends = np.concatenate([[0.0], np.cumsum(np.asarray(seconds, dtype=float))])
    cost = np.concatenate([[0.0], np.asarray(sends, dtype=float)[1:], [0.0]])
    places = np.flatnonzero(np.isfinite(cost))
    # length[i, j] of the run from place i up to place j, both among those where a cut may be.
    length = ends[places][None, :] - ends[places][:, None]
    length = length + cost[places][None, :] + cost[places][:, None]
    length[places[None, :] <= places[:, None]] = math.inf
    lengths = []
    for run in range(runs):
        # Every piece of the run must be one that it may have.
        wrong = [own is not None and run not in own for own in owners or (None,) * count]
        before = np.concatenate([[0], np.cumsum(wrong)])[places]
        lengths.append(np.where(before[None, :] == before[:, None], length, math.inf))
    longest = np.full(len(places), math.inf)
    longest[0] = 0.0
    for each in lengths:
        longest = np.maximum(longest[:, None], each).min(axis=0)
    if not math.isfinite(longest[-1]):
        raise InfeasibleError(what=f"{count} pieces of work have no cut into {runs} runs")
    return _least_sent(lengths, cost[places], longest[-1] * _NEAR, places)


def _least_sent(
    lengths: Sequence[NDArray[np.float64]],
    cost: NDArray[np.float64],
    limit: float,
    places: NDArray[np.intp],
) -> tuple[int, ...]:
    """Return the starts of runs of which none is longer than `limit`, and that send least.

    Of cuts that send as much, the runs are as equal as can be.
    """
    sent = cost[np.isfinite(cost) & (cost > 0)]
    weight = _EVEN * (sent.min() if len(sent) else 1.0) / max(limit, 1e-300) ** 2
    total = np.full(len(places), math.inf)
    total[0] = 0.0
    came: list[NDArray[np.intp]] = []
    for each in lengths:
        able = each <= limit
        uneven = weight * np.where(able, each, 0.0) ** 2
        table = np.where(able, total[:, None] + cost[:, None] + uneven, math.inf)
        came.append(table.argmin(axis=0))
        total = table.min(axis=0)
    place = len(places) - 1
    starts: list[int] = []
    for chosen in reversed(came):
        place = int(chosen[place])
        starts.append(int(places[place]))
    return tuple(reversed(starts))
