"""Solutions with usage charged, in which a limit plays no part: other limits ask for the same."""

from __future__ import annotations

from planners.problem import Problem
from planners.solution import Solution

__all__ = ["Charge", "ChargedSolutions"]

# One multiplier for all tables, or one up to a place in the order of the variables, another one
# behind it, and that place; and whether a prover was asked.
Charge = tuple[float | tuple[float, float, int], bool]


class ChargedSolutions:
    """Solutions of the problems of a search, by the charge, which `of` finds by a problem's tables.

    >>> import numpy as np
    >>> from planners.variables import Variable
    >>> problem, known = Problem((Variable("a", np.zeros(2)),), limit=1.0), ChargedSolutions()
    >>> known.of(problem)[0.5, False] = Solution({"a": 1}, 0.0, 0.0, "")
    >>> known.of(problem.within(2.0))[0.5, False].assignment
    {'a': 1}
    """

    def __init__(self) -> None:
        self._of: list[tuple[Problem, dict[Charge, Solution]]] = []

    def of(self, problem: Problem) -> dict[Charge, Solution]:
        """Return the solutions of what differs from the problem in its limit alone, to add to."""
        for other, solutions in self._of:
            # Problems keep their tables alive.
            if other.variables is problem.variables and other.factors is problem.factors:
                return solutions
        self._of.append((problem, {}))
        return self._of[-1][1]
