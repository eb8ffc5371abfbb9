"""The answer of a solver with its proven bound, and the errors for problems that have none."""

from collections.abc import Mapping
from dataclasses import dataclass

from planners.problem import Problem


class InfeasibleError(ValueError):
    """No assignment has a finite cost.

    variables: names of a few variables that cannot agree even when all others are left out; empty
    where the solver has no cheap way to tell which. what: the first words of the message, if others
    than "no assignment has a finite cost".

    >>> str(InfeasibleError(("a", "b")))
    'no assignment has a finite cost: 2 variables cannot agree: a, b'
    """

    def __init__(self, variables: tuple[str, ...] = (), what: str = "") -> None:
        self.variables = variables
        what = what or "no assignment has a finite cost"
        if variables:
            shown = ", ".join(variables[:12]) + (", ..." if len(variables) > 12 else "")
            what += f": {len(variables)} variables cannot agree: {shown}"
        super().__init__(what)


class OverLimitError(InfeasibleError):
    """Some assignments have a finite cost, but none of them is within the limit.

    usage: the least usage of an assignment that was found. least: a proven lower bound on the usage
    of every assignment. limit: the limit that was asked for. All three are in the unit of usage.
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

    assignment: a state for every variable, by name. cost: of the assignment, as `Problem.spent`
    adds it up. lower_bound: no assignment within the limit costs less, up to rounding. method: the
    name of the algorithm, for people. usage: the sum of what the problem limits.
    variable_alternatives, factor_alternatives: the way by which every table is paid, parallel to
    the problem's variables and factors; 0 is the table itself, i + 1 is alternatives[i].
    multiplier: the cost of a unit of usage at which the ways were chosen, where there was one.

    >>> Solution({"a": 1}, cost=3.0, lower_bound=2.5, method="by hand").text()
    'cost 3, bound 2.5, gap 0.5 (by hand, 1 variables)'
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
        """The most by which an optimal assignment could be cheaper; 0 if this one is proven."""
        return max(0.0, self.cost - self.lower_bound)

    def text(self) -> str:
        """Return one line with cost, bound, gap, usage if there is any, and method."""
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
        """Return the solution of an assignment, with every table paid in its best way.

        method: the name of the algorithm. lower_bound: a proven bound, or None where the assignment
        is an optimum. multiplier: the cost of a unit of usage that decides which way is best.
        Raises ValueError for an assignment that does not fit the problem.
        """
        spent = problem.spent(assignment, multiplier)
        return Solution(
            assignment,
            spent.cost,
            # A bound from another summation may exceed the cost by rounding, which would show as a
            # negative gap.
            spent.cost if lower_bound is None else min(lower_bound, spent.cost),
            method,
            spent.usage,
            spent.variable_alternatives,
            spent.factor_alternatives,
            multiplier,
        )
