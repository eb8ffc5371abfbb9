"""Solutions with usage charged, in which a limit plays no part: other limits ask for the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planners.alike_tables import Multiplier, Numbers
from planners.problem import Problem
from planners.solution import Solution

__all__ = ["Charge", "ChargedSolutions", "Told", "charged_solution", "last_places"]

# One multiplier for all tables, or one up to a place in the order of the variables, another one
# behind it, and that place.
Charge = float | tuple[float, float, int]
# A charge, and whether a prover was asked.
Told = tuple[Charge, bool]


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
        self._of: list[tuple[Problem, dict[Told, Solution]]] = []

    def of(self, problem: Problem) -> dict[Told, Solution]:
        """Return the solutions of what differs from the problem in its limit alone, to add to."""
        for other, solutions in self._of:
            # Problems keep their tables alive.
            if other.variables is problem.variables and other.factors is problem.factors:
                return solutions
        self._of.append((problem, {}))
        return self._of[-1][1]


def charged_solution(
    problem: Problem, charge: Charge, solver: Callable[[Problem], Solution]
) -> Solution:
    """Return the solution of a problem with usage charged; its bound is of cost and charge
    together.

    >>> from planners import exact
    >>> from planners.variables import Variable
    >>> problem = Problem((Variable("a", np.array([0.0, 1.0]), np.array([4.0, 0.0])),))
    >>> charged_solution(problem, 0.5, exact.solve).text()
    'cost 1, bound 1, gap 0 (variable elimination, 1 variables)'
    """
    charged: Multiplier
    if isinstance(charge, tuple):
        first, second, place = charge
        charged = np.where(last_places(problem) < place, first, second)
    else:
        charged = charge
    plain = solver(problem.weighed(charged))
    spent = problem.spent(plain.assignment, charged)
    return Solution(
        plain.assignment,
        spent.cost,
        plain.lower_bound,
        plain.method,
        spent.usage,
        spent.variable_alternatives,
        spent.factor_alternatives,
    )


def last_places(problem: Problem) -> Numbers:
    """Return, per table (variables' first), the place of the last of its variables.

    >>> from planners.variables import Factor, Variable
    >>> a, b = Variable("a", np.zeros(2)), Variable("b", np.zeros(2))
    >>> last_places(Problem((a, b), (Factor(("b", "a"), np.zeros((2, 2))),)))
    array([0, 1, 1])
    """
    places = np.zeros(len(problem.variables) + len(problem.factors), dtype=np.intp)
    for group in problem.alike():
        places[group.numbers] = group.scopes.max(axis=0)
    return places
