"""The solver of a network: exact where it is narrow enough, else one that proves a bound."""

from __future__ import annotations

from collections.abc import Mapping

from autoparallel.strategy.cost_network import CostNetwork
from planners import Problem, Solution, TooWideError, conditioning, exact
from planners import coarsening as coarse
from planners import lagrangian as limited
from planners.exact_or_conditioned import ExactOrConditioned

__all__ = ["NetworkSolver"]


class NetworkSolver(ExactOrConditioned):
    """A solver of a network's problems that remembers what was too wide.

    Networks of several mesh axes have many states per variable: those that differ on one axis only
    are grouped. Networks of one axis are wide because of their form: some variables are fixed.
    start: an assignment to begin with, where the solver needs one.
    """

    def __init__(self, network: CostNetwork, start: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.network, self.start = network, start
        self.is_wide = False
        axes = sum(size > 1 for _, size in network.mesh.axes)
        self.several, self.many = axes > 1, axes > 2

    def __call__(self, problem: Problem) -> Solution:
        """Return the best solution, or a good one with a proven lower bound on the best."""
        if not self.is_wide:
            try:
                return exact.solve(problem, memo=self.memo)
            except TooWideError:
                self.is_wide = True
        if self.several:
            return self.coarse(problem)
        if self.cutset is None:
            self.cutset = conditioning.cutset(problem)
        return conditioning.solve(problem, fixed_variables=self.cutset, memo=self.memo)

    def coarse(self, problem: Problem) -> Solution:
        """Solve by groups of states that differ on one mesh axis only."""
        return coarse.solve(problem, self.network.groupings(), start=self.start)

    def within(self, problem: Problem) -> Solution:
        """Return the best solution within the problem's limit of bytes.

        On three axes and more the search for it is by groups, because every charge per byte that is
        tried is a problem of its own; one exact solution proves how near it is to the best. It ends
        at the gap that the options ask for.
        Raises InfeasibleError where the problem has no solution, OverLimitError where none is
        within the limit.
        """
        gap = self.network.options.gap
        if not self.many:
            return limited.solve(problem, solver=self, enough=gap)
        try:
            return limited.solve(problem, solver=self.coarse, prover=exact.solve, enough=gap)
        except TooWideError:
            return limited.solve(problem, solver=self.coarse, enough=gap)
