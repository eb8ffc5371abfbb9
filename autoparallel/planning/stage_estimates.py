"""Estimates of a step of a pipeline: the seconds and bytes that it would take, in few figures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoparallel.planning.eased_plans import Eased

__all__ = ["Estimate", "is_better"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """An Estimate tells what a step of a pipeline would take.

    seconds: of the step. nbytes: of the rank that needs most; without activations where memory is
    not limited. recompute: as of Options. activations: those of nbytes that blocks save, of one
    stage. price: as of `Eased`. mixes: ways in which some blocks are recomputed less, the
    quickest first, and of those that are estimated alike, those that keep most; the first one has
    these seconds and bytes. schedule, stages_per_rank: as of Options.
    """

    seconds: float
    nbytes: float
    recompute: str
    activations: float = 0.0
    price: float = 0.0
    mixes: tuple[Eased, ...] = ()
    schedule: str = "1f1b"
    stages_per_rank: int = 1

    @property
    def keeps_all(self) -> bool:
        """True where nothing is made again in the backward pass."""
        return self.recompute == "none" and not self.mixes

    @property
    def eased(self) -> tuple[Eased, ...]:
        """The ways in which a plan of the whole model keeps as little as this one."""
        return (*self.mixes, Eased(self.recompute, self.price, seconds=self.seconds))


def is_better(one: Estimate, other: Estimate, limit: int | None) -> bool:
    """Return whether an estimate is better than another: fits, where that does not, or is shorter;
    of two that do not fit, needs less.

    >>> is_better(Estimate(2.0, 10.0, "full"), Estimate(1.0, 30.0, "none"), limit=20)
    True
    """
    bound = math.inf if limit is None else limit
    fits = (one.nbytes <= bound, other.nbytes <= bound)
    if fits == (False, False):
        return one.nbytes < other.nbytes
    return one.seconds < other.seconds if all(fits) else fits[0]
