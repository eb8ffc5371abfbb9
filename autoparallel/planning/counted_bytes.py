"""Bytes counted at several moments: how much each of them counts beside the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.placement import Layout
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.strategy.build_network import rebuilt
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.stage_shares import WHOLE_MODEL
from planners import Problem, Solution
from planners.effort import current
from planners.two_usages import mean_usage, require_same_ways, usage_of

__all__ = ["Moments"]

# The price of a byte where the plan that keeps least is looked for: so high that bytes decide, and
# so low that seconds, which break ties, are not lost in rounding.
_SECONDS_PER_BYTE = 1e-3
# So many shares of a moment in what is counted are tried, and so many moments beside the first.
_MOST_TURNS, _MOST_MOMENTS = 3, 3


@dataclass
class Share:
    """A Share is how much the bytes at one more moment count, beside those that counted before.

    network: with bytes counted at that moment. share: of it, between `low`, with which a solution
    was over the limit there, and `high`, with which one was before. turns: how often it may change.
    """

    network: CostNetwork
    share: float = 1.0
    low: float = 0.0
    high: float = 1.0
    turns: int = _MOST_TURNS


class Moments:
    """The problems of a network within limits, by what is counted at one moment or at several.

    What is within the limit at each of some moments is so in each mean of them, so that all bounds
    hold. The right mean, whose best solution is within the limit at each of them, is looked for by
    halving. A moment is one at which some plan takes too much.
    pins: as of `closest`. given: the limit as it was given. shares: of moments, the latest last.
    """

    def __init__(self, network: CostNetwork, pins: Mapping[str, Layout], given: float) -> None:
        self.network, self.pins, self.given = network, pins, given
        self.shares: list[Share] = []
        # By the call at whose backward bytes are counted, and by the shares of such moments.
        self._alone: dict[str, Problem] = {}
        self._means: dict[tuple[float, ...], Problem] = {}
        # Of solutions, what they take at each moment.
        self._usages: dict[Any, list[float]] = {}

    def problem(self, limit: float) -> Problem:
        """Return the problem within a limit, by bytes as they are counted now."""
        return self._mean(self.shares).within(limit)

    def least(self, limit: float, solve: NetworkSolver) -> list[Solution]:
        """Return the solutions that keep least: by bytes as they are counted now, and at each of
        the moments alone. Which of their plans takes least in all is not known here.
        """
        problem = self.problem(limit)
        alone = [self.network, *(one.network for one in self.shares)] if self.shares else []
        problems = [problem, *(self._at(one).within(limit) for one in alone)]
        found = [_least(one, solve) for one in problems]
        return [replace(one, usage=usage_of(problem, one)) for one in found]

    def _at(self, network: CostNetwork) -> Problem:
        """Return the problem of one moment alone, within the limit as it was given."""
        call = network.moment.call
        if call not in self._alone:
            self._alone[call] = network.problem(1.0, self.pins, self.given)
        return self._alone[call]

    def _mean(self, shares: Sequence[Share]) -> Problem:
        """Return the problem with these shares of moments beside the first one."""
        if not shares:
            return self._at(self.network)
        key = tuple(one.share for one in shares)
        if key not in self._means:
            *before, latest = shares
            mean = mean_usage(self._mean(before), self._at(latest.network), latest.share)
            self._means[key] = mean
        return self._means[key]

    def turn(self, solution: Solution, worst: str, known: list[Solution]) -> bool:
        """Count more of the moment at which a solution is over the limit; return whether there is
        another mean to try.

        worst: the call at whose backward its plan takes most, "" for another moment. known:
        solutions, which are told anew what they use.
        """
        # Stages have several micro-batches under way, each at another moment.
        if current().is_over or self.network.shares != WHOLE_MODEL:
            return False
        if not self._halved(solution) and not self._another(solution, worst):
            return False
        shares = self._shares_of_all()
        known[:] = [replace(one, usage=float(self._used(one) @ shares)) for one in known]
        return True

    def _shares_of_all(self) -> NDArray[np.float64]:
        """Return how much the bytes of each moment count, of the first one first."""
        shares = np.ones(1)
        for one in self.shares:
            shares = np.append(shares * (1 - one.share), one.share)
        return shares

    def _used(self, solution: Solution) -> NDArray[np.float64]:
        """Return what a solution takes at each of the moments, which is told once."""
        key = (
            tuple(solution.assignment.values()),
            solution.variable_alternatives,
            solution.factor_alternatives,
        )
        used = self._usages.setdefault(key, [])
        networks = [self.network, *(one.network for one in self.shares)]
        for network in networks[len(used) :]:
            used.append(usage_of(self._at(network), solution))
        return np.array(used)

    def _halved(self, solution: Solution) -> bool:
        """Change the share of the latest moment, if the solution is over the limit there or before
        it; return whether it was changed.
        """
        if not self.shares or not self.shares[-1].turns:
            return False
        *before, latest = self.shares
        alone = self._at(latest.network)
        if not alone.fits(usage_of(alone, solution)):
            latest.low = latest.share
        elif not alone.fits(usage_of(self._mean(before), solution)):
            latest.high = latest.share
        else:
            return False
        latest.turns -= 1
        share, latest.share = latest.share, (latest.low + latest.high) / 2
        return share != latest.share

    def _another(self, solution: Solution, worst: str) -> bool:
        """Count the moment at which a plan takes most, too; return whether that is a new one at
        which it is over the limit.
        """
        seen = [self.network, *(one.network for one in self.shares)]
        if not worst or len(seen) > _MOST_MOMENTS:
            return False
        if any(network.moment.call == worst for network in seen):
            return False
        network = rebuilt(self.network, counted_at=worst)
        network.allowed = self.network.allowed
        problem = self._at(network)
        require_same_ways(self.problem(self.given), problem)
        if problem.fits(usage_of(problem, solution)):
            return False
        self.shares.append(Share(network))
        return True


def _least(problem: Problem, solve: NetworkSolver) -> Solution:
    """Return the solution that keeps least and, of those that do, costs least.

    It proves no lower bound on the cost.
    """
    smallest = solve(problem.weighed(_SECONDS_PER_BYTE))
    return Solution.of(problem, smallest.assignment, smallest.method, -math.inf, _SECONDS_PER_BYTE)
