"""The default solver of plain problems: exact, or conditioning where that is too wide."""

from __future__ import annotations

from planners import conditioning, exact
from planners.greedy_orders import TooWideError
from planners.problem import Problem
from planners.solution import Solution
from planners.table_memo import Memo

__all__ = ["ExactOrConditioned"]


class ExactOrConditioned:
    """A solver of plain problems: exact elimination, or conditioning where that is too wide.

    cutset: names of the variables that conditioning fixes, once a problem was too wide, else None;
    it serves all later problems, which must have the same factors. memo: shared by all problems
    that share tables, until `forget`.
    """

    def __init__(self, memo: Memo | None = None) -> None:
        self.cutset: tuple[str, ...] | None = None
        self.memo = Memo() if memo is None else memo

    @property
    def is_rough(self) -> bool:
        """True if its bounds are rougher than those that another solver has."""
        return False

    @property
    def is_quick(self) -> bool:
        """True while every problem was eliminated with little work."""
        return self.cutset is None and not self.memo.heavy

    def forget(self) -> None:
        """Drop the memo's tables: no table with usage is the same at another multiplier."""
        self.memo = self.memo.emptied()

    def __call__(self, problem: Problem) -> Solution:
        """Return an optimum of a plain problem, or a good assignment with a bound."""
        if self.cutset is None:
            try:
                return exact.solve(problem, memo=self.memo)
            except TooWideError:
                self.cutset = conditioning.cutset(problem)
        return conditioning.solve(problem, fixed_variables=self.cutset, memo=self.memo)
