"""The Lagrangian dual of a problem with a limit, as seen from the assignments known so far.

At a multiplier m, an assignment costs cost + m * (usage - limit): a line over m, falling if the
assignment is within the limit and rising if it is over it. The dual function at m is the least of
all assignments' lines. It is concave, and each of its values is a lower bound on the cost of every
assignment within the limit.
"""

from __future__ import annotations

from collections.abc import Sequence

from planners.problem import Problem
from planners.solution import Solution

__all__ = ["RELATIVE_ROUNDING", "charged_cost", "highest_meeting"]

# Two heights are the same if they differ by less than this share of them.
RELATIVE_ROUNDING = 1e-9


def charged_cost(solution: Solution, multiplier: float, limit: float) -> float:
    """Return the height of a solution's line: cost + multiplier * (usage - limit).

    limit: in the unit of usage; +inf for none, which is possible at multiplier 0 only.

    >>> charged_cost(Solution({}, cost=5.0, lower_bound=0.0, method="", usage=3.0), 2.0, limit=4.0)
    3.0
    """
    # 0 * inf is NaN: without a charge, the limit does not matter.
    if not multiplier:
        return solution.cost
    return solution.cost + multiplier * (solution.usage - limit)


def highest_meeting(
    problem: Problem, over: Sequence[Solution], within: Sequence[Solution], limit: float
) -> tuple[float, float, tuple[Solution, Solution]]:
    """Return where the least of all known lines is highest.

    over, within: solutions over and within the limit, at least one of each. Returns the multiplier,
    the height there, and the rising and the falling line that meet. The height is an upper bound on
    the dual function's maximum; a solve at that multiplier either confirms it or finds a lower line
    (the cutting-plane method of Kelley 1960, in one dimension).
    """
    low = min(over, key=lambda solution: solution.cost)
    multiplier = 0.0
    # From line to line: each falling one that is lower than the rising one cuts it off, and so
    # on; the height only falls, so this ends.
    high = min(within, key=lambda solution: solution.cost)
    for _ in range(len(over) + len(within)):
        if high.cost <= low.cost:
            return 0.0, high.cost, (low, high)
        multiplier = (high.cost - low.cost) / (low.usage - high.usage)
        level = charged_cost(high, multiplier, limit)
        lowest = min(
            (*over, *within), key=lambda solution: charged_cost(solution, multiplier, limit)
        )
        if charged_cost(lowest, multiplier, limit) >= level - RELATIVE_ROUNDING * abs(level):
            break
        if problem.fits(lowest.usage):
            high = lowest
        else:
            low = lowest
    return multiplier, charged_cost(high, multiplier, limit), (low, high)
