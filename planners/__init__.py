"""Solvers for cost networks: numbers only, no torch.

    problem = Problem((Variable("a", [0, 1]), Variable("b", [2, 0])), (Factor(("a", "b"), table),))
    exact.solve(problem).text()

`exact` eliminates variables and is the one to use; `conditioning` is for problems that are too wide
for it, and proves a bound, and so does `coarse`, for very many states per variable; `limited`
charges usage until a limit is kept; `ilp` is the cross-check; `exhaustive` is the oracle for small
ones.
"""

from planners import coarsening as coarse
from planners import conditioning, exact, exhaustive, ilp
from planners import lagrangian as limited
from planners.exact import min_marginals
from planners.ordering import TooWideError
from planners.problem import Problem, Spent
from planners.solution import InfeasibleError, OverLimitError, Solution
from planners.table_memo import Memo
from planners.tables import Alternative, Table
from planners.variables import Factor, Variable

__all__ = [
    "Alternative",
    "Factor",
    "InfeasibleError",
    "Memo",
    "OverLimitError",
    "Problem",
    "Solution",
    "Spent",
    "Table",
    "TooWideError",
    "Variable",
    "coarse",
    "conditioning",
    "exact",
    "exhaustive",
    "ilp",
    "limited",
    "min_marginals",
]
