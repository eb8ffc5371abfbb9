"""Which solver a network gets: exact where it is narrow enough, else one that proves a bound."""

from __future__ import annotations

from collections.abc import Mapping

from autoparallel.network import Network
from planners import Problem, Solution, TooWideError, coarse, conditioning, exact
from planners.limited import Narrow

__all__ = ["Solving"]


class Solving(Narrow):
    """A solver of a network's problems that remembers what was too wide.

    Networks of several mesh axes have many states per variable: those that differ on one axis only
    are grouped. Networks of one axis are wide because of their form: some variables are given.
    start: an assignment to begin with, where the solver needs one.
    """

    def __init__(self, network: Network, start: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.network, self.start = network, start
        self.is_wide = False
        self.several = sum(size > 1 for _, size in network.mesh.axes) > 1

    def __call__(self, problem: Problem) -> Solution:
        if not self.is_wide:
            try:
                return exact.solve(problem, memo=self.memo)
            except TooWideError:
                self.is_wide = True
        if self.several:
            return coarse.solve(problem, self.network.groupings(), start=self.start)
        if self.given is None:
            self.given = conditioning.cutset(problem)
        return conditioning.solve(problem, given=self.given, memo=self.memo)
