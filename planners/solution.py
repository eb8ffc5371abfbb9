"""What a solver returns, and the errors when there is nothing to return."""

from collections.abc import Mapping
from dataclasses import dataclass

from planners.problem import Problem


class InfeasibleError(ValueError):
    """No assignment has a finite cost.

    variables: a few variables that cannot agree even when all others are left out; empty when the
    solver has no cheap way to tell which.
    """

    def __init__(self, variables: tuple[str, ...] = (), what: str = "") -> None:
        self.variables = variables
        what = what or "no assignment has a finite cost"
        if variables:
            shown = ", ".join(variables[:12]) + (", ..." if len(variables) > 12 else "")
            what += f": {len(variables)} variables cannot agree: {shown}"
        super().__init__(what)


class OverLimitError(InfeasibleError):
    """There are assignments of finite cost, but none within the limit.

    usage: of the assignment of least usage that was found. least: no assignment uses less.
    """

    def __init__(self, usage: float, least: float, limit: float) -> None:
        self.usage, self.least, self.limit = usage, least, limit
        super().__init__(
            (),
            f"no assignment is within the limit of {limit:.9g}: the least usage found is"
            f" {usage:.9g}, and none is below {least:.9g}",
        )


@dataclass(frozen=True, slots=True)
class Solution:
    """A complete assignment and what is proven about it.

    cost: of the assignment, from `Problem.spent`. lower_bound: no assignment within the limit
    costs less, up to rounding. method: the solver's name in words. usage: of what the problem
    limits. variable_alternatives, factor_alternatives: which way of paying every table takes, 0
    for the table itself. multiplier: what a unit of usage was charged where that was chosen.
    """

    assignment: Mapping[str, int]
    cost: float
    lower_bound: float
    method: str
    usage: float = 0.0
    variable_alternatives: tuple[int, ...] = ()
    factor_alternatives: tuple[int, ...] = ()
    multiplier: float = 0.0

    @property
    def gap(self) -> float:
        """How much an optimal assignment could cost less, at most; 0 when proven optimal."""
        return max(0.0, self.cost - self.lower_bound)

    def text(self) -> str:
        """One line: cost, bound, gap, usage if there is any, and method."""
        usage = f", usage {self.usage:.9g}" if self.usage else ""
        return (
            f"cost {self.cost:.9g}, bound {self.lower_bound:.9g}, gap {self.gap:.3g}{usage}"
            f" ({self.method}, {len(self.assignment)} variables)"
        )

    @staticmethod
    def of(
        problem: Problem,
        assignment: Mapping[str, int],
        method: str,
        lower_bound: float | None = None,
        multiplier: float = 0.0,
    ) -> "Solution":
        """The solution of an assignment, every table paid in its best way at the multiplier.

        lower_bound: None where the assignment is an optimum.
        """
        spent = problem.spent(assignment, multiplier)
        return Solution(
            assignment,
            spent.cost,
            spent.cost if lower_bound is None else min(lower_bound, spent.cost),
            method,
            spent.usage,
            spent.variable_alternatives,
            spent.factor_alternatives,
            multiplier,
        )
