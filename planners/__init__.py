"""Solvers for cost networks: numbers only.

Here belong the problem (`Variable`, `Factor`, `Problem`, `Solution`) and algorithms that
solve it. What does not: torch, models, meshes, seconds and bytes. The meaning of states and the
numbers in the tables come from `autoparallel.strategy`; the choice of a solver is made in
`autoparallel.planning`.

`exact` eliminates variables and is the solver to use. `conditioning` is for problems that are too
wide for it, `coarsening` for very many states per variable: both find a good assignment and prove a
bound. `lagrangian` keeps a limit on usage. `ilp` is the cross-check, an integer program solved by
HiGHS; `exhaustive` is the oracle for small problems. `partition` cuts a chain of work into runs.

>>> import numpy as np
>>> a, b = Variable("a", np.array([0.0, 1.0])), Variable("b", np.array([2.0, 0.0]))
>>> disagree = Factor(("a", "b"), np.array([[0.0, 5.0], [5.0, 0.0]]))
>>> exact.solve(Problem((a, b), (disagree,))).text()
'cost 1, bound 1, gap 0 (variable elimination, 2 variables)'
"""

from planners import coarsening, conditioning, exact, exhaustive, ilp, lagrangian
from planners.exact import least_among, min_marginals
from planners.greedy_orders import TooWideError
from planners.partition import partition, quickest_cut
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
    "coarsening",
    "conditioning",
    "exact",
    "exhaustive",
    "ilp",
    "lagrangian",
    "least_among",
    "min_marginals",
    "partition",
    "quickest_cut",
]
