"""A chain of work is cut into runs, of which the longest takes as little as can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from planners.solution import InfeasibleError

__all__ = ["partition", "quickest_cut"]

_Floats = NDArray[np.float64]
_Places = NDArray[np.intp]

# The weight of squares of lengths, beside the least that a cut sends.
_EVEN = 1e-3
# Cuts are as good as each other within this share, and sums differ by no more than that.
_CLOSE, _ROUNDING = 1e-4, 1e-9
# Runs count as no shorter than this: its square is a number that can be divided by.
_LEAST = 1e-150


def partition(
    seconds: Sequence[float],
    sends: Sequence[float],
    runs: int,
    owners: Sequence[Collection[int] | None] | None = None,
    fits: Callable[[int, _Places, _Places], NDArray[np.bool_]] | None = None,
    near: float = 1.05,
) -> tuple[int, ...]:
    """Return the places at which the runs start; the first is 0.

    seconds: of each piece of work, in order. sends: by place, the seconds that a cut before that
    piece adds to the run that ends there and to the one that starts; infinite where none may be.
    runs: their number; none is empty. owners: for each piece, the runs that it may belong to; None
    for all. fits: says of a run, by its number, and of places where it could start and end, which
    of them go together. near: a cut that sends less is taken where the longest run takes no more
    than so many times the least.
    The longest run is the shortest that there is, but for `near`, among those the cuts send least,
    and among these the runs are as equal as can be.
    Dynamic programming over the places, exact: no run is looked at that is more than twice as long
    as the mean, unless there must be one.
    Raises InfeasibleError where there is no such cut.

    >>> partition([1.0, 1.0, 1.0, 3.0], [0.0] * 4, 2)
    (0, 3)
    >>> partition([1.0, 1.0, 1.0, 1.0], [0.0, 5.0, math.inf, 5.0], 2)
    (0, 1)
    >>> partition([1.0] * 21, [0.1] * 21, 5)
    (0, 5, 9, 13, 17)
    """
    chain = _Chain(seconds, sends, runs, owners, fits)
    # Runs of twice the mean, and the unevenness of places, are enough in almost all cases.
    for enough in (2 * chain.ends[-1] / runs + 2 * chain.widest, math.inf):
        widths = chain.widths(enough)
        longest = chain.longest(widths)
        if longest <= enough and math.isfinite(longest):
            limit = longest * near
            return chain.least_sent(chain.widths(limit), limit)
    raise InfeasibleError(what=f"{len(seconds)} pieces of work have no cut into {runs} runs")


def quickest_cut(
    seconds: Sequence[float],
    sends: Sequence[float],
    first: tuple[int, ...],
    told: Callable[[tuple[int, ...]], tuple[float, _Floats]],
    kinds: Sequence[_Floats] = (),
    owners: Sequence[Collection[int] | None] | None = None,
    rounds: int = 8,
) -> tuple[tuple[int, ...], float]:
    """Return the cut by which a whole takes least, of those that are tried, and a bound.

    seconds, sends, owners: as of `partition`. first: a cut to begin with: no run is longer than the
    longest of it, and none sends more. told: says of a cut how many seconds the whole takes, and
    how often each run is on the path that takes so long: a row for each kind of its work, and one
    for what is sent where it starts. kinds: the seconds of each piece by kind; those of all its
    work if there is but one.
    The whole takes as long as the longest of its paths, so no less than a mean of paths. The cut
    that is best by the mean of all paths so far is tried next (fictitious play, Brown 1951): what
    it takes by that mean is a bound on all cuts.

    >>> def told(starts):  # two runs, of which the second counts twice
    ...     return starts[1] + 2.0 * (4 - starts[1]), np.array([[1.0, 2.0], [0.0, 0.0]])
    >>> quickest_cut([1.0] * 4, [0.0] * 4, (0, 1), told)
    ((0, 3), 5.0)
    """
    most = max((sends[start] for start in first[1:]), default=0.0)
    sends = [each if each <= most else math.inf for each in sends]
    chain = _Chain(seconds, sends, len(first), owners, None)
    work = np.array(kinds if len(kinds) else [seconds], dtype=float)
    before = np.concatenate([np.zeros((len(work), 1)), np.cumsum(work, axis=1)], axis=1)
    before = before[:, chain.places]
    at = np.searchsorted(chain.places, [*first, len(sends)])
    limit = max(
        float(chain.lengths(run, end - start)[start])
        for run, (start, end) in enumerate(pairwise(at.tolist()))
    ) * (1 + _ROUNDING)
    widths = chain.widths(limit)
    known: dict[tuple[int, ...], tuple[float, _Floats]] = {}
    bound, cut, paths = 0.0, first, np.zeros((len(work) + 1, len(first)))
    for number in range(1, rounds + 1):
        if cut not in known:
            known[cut] = told(cut)
        paths += (known[cut][1] - paths) / number
        # What each run would take if it had all work before each place.
        taken = paths[:-1].T @ before
        begins = np.concatenate([-taken[:1], taken[:-1] - taken[1:]])
        begins += paths[-1][:, None] * chain.cost
        cut = chain.least_sent(widths, limit, begins)
        at = np.searchsorted(chain.places, cut)
        bound = max(bound, float(begins[np.arange(len(cut)), at].sum() + taken[-1, -1]))
        # What is no better is not worth runs that are less equal.
        best = min(known, key=lambda each: known[each][0] * (1 + _CLOSE * (each != first)))
        if known[best][0] <= bound * (1 + _CLOSE):
            break
    return best, min(bound, known[best][0])


class _Chain:
    """The places of a chain at which it may be cut.

    places: of these, the pieces before which they are; the first and the end are among them. ends:
    the seconds before each. cost: of a cut there. widest: the most seconds by which two neighbours
    and what they cost can make a run longer than asked for.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        sends: Sequence[float],
        runs: int,
        owners: Sequence[Collection[int] | None] | None,
        fits: Callable[[int, _Places, _Places], NDArray[np.bool_]] | None,
    ) -> None:
        ends = np.concatenate([[0.0], np.cumsum(np.asarray(seconds, dtype=float))])
        cost = np.concatenate([[0.0], np.asarray(sends, dtype=float)[1:], [0.0]])
        self.places = np.flatnonzero(np.isfinite(cost))
        self.ends, self.cost = ends[self.places], cost[self.places]
        self.runs, self.fits = runs, fits
        self.wrong: list[NDArray[np.intp] | None] = [None] * runs
        if owners is not None:
            for run in range(runs):
                # Every piece of the run must be one that it may have.
                wrong = [own is not None and run not in own for own in owners]
                self.wrong[run] = np.concatenate([[0], np.cumsum(wrong)])[self.places]
        gaps = np.diff(self.ends)
        self.widest = float(gaps.max(initial=0.0) + self.cost.max(initial=0.0))

    def widths(self, enough: float) -> int:
        """Return how many places a run of so many seconds spans at most."""
        if not math.isfinite(enough):
            return len(self.places) - 1
        last = np.searchsorted(self.ends, self.ends + enough, side="right")
        return int((last - np.arange(len(self.ends))).max(initial=1))

    def lengths(self, run: int, width: int) -> _Floats:
        """Return the seconds of a run that spans so many places, by the place where it starts;
        infinite where it may not.
        """
        before, after = slice(None, -width), slice(width, None)
        length: _Floats = self.ends[after] - self.ends[before]
        length = length + self.cost[after] + self.cost[before]
        wrong = self.wrong[run]
        if wrong is not None:
            length = np.where(wrong[before] == wrong[after], length, math.inf)
        if self.fits is not None:
            able = self.fits(run, self.places[before], self.places[after])
            length = np.where(able, length, math.inf)
        return length

    def longest(self, widths: int) -> float:
        """Return the least seconds of the longest run; infinite where there is no cut."""
        least = np.full(len(self.places), math.inf)
        least[0] = 0.0
        for run in range(self.runs):
            following = np.full(len(self.places), math.inf)
            for width in range(1, widths + 1):
                able = np.maximum(least[:-width], self.lengths(run, width))
                np.minimum(following[width:], able, out=following[width:])
            least = following
        return float(least[-1])

    def least_sent(
        self, widths: int, limit: float, begins: _Floats | None = None
    ) -> tuple[int, ...]:
        """Return the starts of runs of which none is longer than `limit`, and that send least.

        Of cuts that send as much, the runs are as equal as can be.
        begins: what counts in place of what is sent: for each run, a row of seconds by the place
        where it starts.
        """
        if begins is None:
            sent = self.cost[self.cost > 0]
            most = _EVEN * (sent.min() if len(sent) else 1.0)
            begins = np.broadcast_to(self.cost, (self.runs, len(self.cost)))
        else:
            most = _ROUNDING * limit
        weight = most / max(limit, _LEAST) ** 2
        total = np.full(len(self.places), math.inf)
        total[0] = 0.0
        came: list[_Places] = []
        for run, begin in enumerate(begins):
            following = np.full(len(self.places), math.inf)
            chosen = np.zeros(len(self.places), dtype=np.intp)
            # The first start of equal ones is taken.
            for width in range(widths, 0, -1):
                length = self.lengths(run, width)
                able = length <= limit
                uneven = weight * np.where(able, length, 0.0) ** 2
                table = total[:-width] + begin[:-width] + uneven
                table = np.where(able, table, math.inf)
                better = table < following[width:]
                following[width:][better] = table[better]
                chosen[width:][better] = np.flatnonzero(better)
            came.append(chosen)
            total = following
        place = len(self.places) - 1
        starts: list[int] = []
        for chosen in reversed(came):
            place = int(chosen[place])
            starts.append(int(self.places[place]))
        return tuple(reversed(starts))
