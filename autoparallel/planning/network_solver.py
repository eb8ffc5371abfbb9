"""The solver of a network: exact where it is narrow enough, else one that proves a bound."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from autoparallel.strategy.cost_network import CostNetwork
from planners import Problem, Solution, TooWideError, conditioning, exact
from planners import coarsening as coarse
from planners import lagrangian as limited
from planners.charged_solutions import ChargedSolutions
from planners.exact_or_conditioned import ExactOrConditioned
from planners.table_memo import Memo

__all__ = ["NetworkSolver"]

# A gap of this share of the cost is far below the error of any cost model.
_PROVEN = 1e-4


class NetworkSolver(ExactOrConditioned):
    """A solver of a network's problems that remembers what was too wide.

    Networks of several mesh axes have many states per variable: those that differ on one axis only
    are grouped, which finds a good plan and a rough bound. Wherever a network is wide because of
    its form, some variables are fixed: that proves how good the plan is, or finds a better one.
    start: an assignment to begin with, where the solver needs one. memo: of another network with
    some of the same tables.
    """

    def __init__(
        self,
        network: CostNetwork,
        start: Mapping[str, int] | None = None,
        memo: Memo | None = None,
    ) -> None:
        super().__init__(memo)
        self.network, self.start = network, start
        # is_wide: some problem was; is_searching: many will follow, and rough solutions do.
        self.is_wide = self.is_searching = False
        axes = sum(size > 1 for _, size in network.mesh.axes)
        self.several, self.many = axes > 1, axes > 2
        # By mesh axis, the groups of states that differ on it alone; the same for all problems.
        self.groupings: tuple[dict[str, NDArray[np.intp]], ...] | None = None
        # Solutions within limits, each of use within another one.
        self.known: list[Solution] = []
        self.charged = ChargedSolutions()

    def __call__(self, problem: Problem) -> Solution:
        """Return the best solution, or a good one with a proven lower bound on the best."""
        if not self.is_wide:
            try:
                return exact.solve(problem, memo=self.memo)
            except TooWideError:
                self.is_wide = True
        if not self.several:
            solution = self.conditioned(problem, self.start)
            # The next problem differs in its prices alone: what is good here is a beginning there.
            self.start = solution.assignment
            return solution
        rough = self.coarse(problem)
        if self.is_searching or rough.gap <= _PROVEN * abs(rough.cost):
            return rough
        try:
            fine = self.conditioned(problem, rough.assignment)
        except TooWideError:
            return rough
        bound = max(rough.lower_bound, fine.lower_bound)
        return Solution(fine.assignment, fine.cost, bound, fine.method)

    def conditioned(self, problem: Problem, start: Mapping[str, int] | None = None) -> Solution:
        """Solve by fixing some variables. start: a good assignment, if one is known."""
        if self.cutset is None:
            self.cutset = conditioning.cutset(problem)
        return conditioning.solve(problem, fixed_variables=self.cutset, start=start, memo=self.memo)

    def coarse(self, problem: Problem) -> Solution:
        """Solve by groups of states that differ on one mesh axis only."""
        if self.groupings is None:
            self.groupings = self.network.groupings()
        return coarse.solve(problem, self.groupings, start=self.start)

    @property
    def is_rough(self) -> bool:
        """True if solutions are found by groups of states alone."""
        return self.is_wide and self.several

    def proven(self, problem: Problem) -> Solution:
        """Return a solution of a wide problem with the best bound that can be had."""
        try:
            return self.conditioned(problem)
        except TooWideError:
            return self.coarse(problem)

    def within(self, problem: Problem, charge_alone: bool = False) -> Solution:
        """Return the best solution within the problem's limit of bytes.

        On three axes and more the search for it is by groups, because every charge per byte that is
        tried is a problem of its own; one exact solution proves how near it is to the best. It ends
        at the gap that the options ask for.
        Problems differ in their limits and in the states that they allow, in nothing else.
        charge_alone: a solution near the best charge per byte will do, whatever the gap.
        Raises InfeasibleError where the problem has no solution, OverLimitError where none is
        within the limit.
        """
        within = partial(
            limited.solve,
            problem,
            enough=self.network.options.gap,
            known=self.known,
            charged=self.charged,
            charge_alone=charge_alone,
        )
        if not self.many:
            self.is_searching = True
            try:
                return within(solver=self, prover=self.proven)
            finally:
                self.is_searching = False
        try:
            return within(solver=self.coarse, prover=exact.solve)
        except TooWideError:
            return within(solver=self.coarse)
