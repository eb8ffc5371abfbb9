"""Planning within a limit: a price on usage, found so that what is bought just fits.

With usage charged at some multiplier the problem is a plain one, and its optimum less
multiplier * limit is a lower bound on every assignment within the limit; the best multiplier gives
the best bound (Lagrangian relaxation). Layers repeat, so at that multiplier all of them change
their mind at once, and what is found is either far over the limit or far below it. So usage is
charged a little more up to some place in the order of the variables, and a little less behind it:
the place is moved until the limit is just kept. What is left over then buys single changes. Where
one variable decides for all layers together, there is a search for each of its states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from planners import conditioning, exact
from planners import local_improvement as filling
from planners.integer_refinement import refine_by_integer_program
from planners.ordering import TooWideError
from planners.problem import Multiplier, Problem
from planners.solution import InfeasibleError, OverLimitError, Solution
from planners.table_memo import Memo

__all__ = ["solve"]

Solver = Callable[[Problem], Solution]

MOST_SOLVES = 80
ENOUGH = 1e-3
_MOST_WIDE_SOLVES = 15
_MOST_PLACES = 8
# How far both charges are below and above the best multiplier, as shares of it. What lies between
# them is decided a little wrong; but where the change from one to the other costs something by
# itself, they must be far enough apart to pay for it.
_SPREADS = ((0.01, 0.01), (0.1, 0.1), (0.5, 0.5), (0.5, 4.0), (1.0, 1.0))
_MOST_JUMPS = 3
_MOST_BRANCHES = 8
# Of solutions found, those near the bound: that are brought within the limit, and that others may
# take changes from.
_MOST_MENDED = 3
_MOST_OTHERS = 8
_EXACT = 1e-9


def solve(
    problem: Problem,
    *,
    solver: Solver | None = None,
    prover: Solver | None = None,
    most_solves: int = MOST_SOLVES,
    enough: float = ENOUGH,
) -> Solution:
    """The best assignment found within the limit, and a proven lower bound.

    Variables should come in the order of the computation, so that what is near in the model is
    near in the order. solver: of plain problems; by default the exact one, or conditioning where
    that is too wide. prover: where the solver's bounds are rough, a slower one that proves better
    ones; asked once for a multiplier. most_solves: of plain problems, about; a fifth of them to
    find a multiplier.
    enough: the search ends at this gap, as a share of the cost. Deterministic.
    Raises InfeasibleError if no assignment has a finite cost, OverLimitError if none was found
    within the limit.
    """
    return _Search(problem, solver or ExactOrConditioned(), prover, enough, most_solves).run()


class ExactOrConditioned:
    """Exact where it can be. One memo for all problems that share tables, until `forget`."""

    def __init__(self) -> None:
        self.given: tuple[str, ...] | None = None
        self.memo = Memo()

    def forget(self) -> None:
        """Drop the memo: no table with usage is the same at another multiplier."""
        self.memo = Memo(self.memo.orders)

    def __call__(self, problem: Problem) -> Solution:
        if self.given is None:
            try:
                return exact.solve(problem, memo=self.memo)
            except TooWideError:
                self.given = conditioning.cutset(problem)
        return conditioning.solve(problem, given=self.given, memo=self.memo)


@dataclass
class _Node:
    """The problem with some variables given. bound: no assignment of it costs less."""

    problem: Problem
    pins: dict[str, int]
    bound: float
    multiplier: float = 0.0
    ends: tuple[Solution, ...] = field(default=())


class _Search:
    """best: the cheapest found within the limit. found: all solutions, whatever they use."""

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        prover: Solver | None,
        enough: float,
        most_solves: int,
    ) -> None:
        self.problem = problem
        self.solver = solver
        self.prover = prover
        self.enough = enough
        self.most_solves = most_solves
        self.best: Solution | None = None
        self.method = ""
        self.solves = 0
        self.limit = math.inf if problem.limit is None else problem.limit
        self.found: list[Solution] = []
        self.known: dict[tuple[tuple[int, ...], ...], None] = {}

    def run(self) -> Solution:
        root = _Node(self.problem, {}, -math.inf)
        nodes, leaves = [root], []
        for _ in range(_MOST_BRANCHES):
            node = min(nodes, key=lambda node: node.bound)
            nodes.remove(node)
            leaves.append(node)
            self.explore(node)
            if not self.is_enough(node):
                children = self.branches(node)
                if children:
                    leaves.pop()
                    nodes += children
            leaves += [child for child in nodes if self.is_enough(child)]
            nodes = [child for child in nodes if not self.is_enough(child)]
            if not nodes or self.solves >= self.most_solves:
                break
        best = self.best
        assert best is not None
        bound = min(best.cost, *(node.bound for node in leaves + nodes))
        method = f"{self.method}, usage charged" if root.multiplier else self.method
        solution = Solution(
            best.assignment,
            best.cost,
            bound,
            method,
            best.usage,
            best.variable_alternatives,
            best.factor_alternatives,
            root.multiplier,
        )
        if solution.gap > self.enough * abs(solution.cost) and isinstance(
            self.solver, ExactOrConditioned
        ):
            return refine_by_integer_program(self.problem, solution, self.enough)
        return solution

    def explore(self, node: _Node) -> None:
        """Find the node's multiplier, bound, and the best assignment that it leads to."""
        try:
            self.search(node)
        except InfeasibleError:
            if not node.pins:
                raise
            node.bound = math.inf
            return
        if self.prover is not None and not self.is_enough(node):
            self.at(node, node.multiplier, self.prover)
        self.fill(node)
        if not self.is_enough(node):
            self.split(node)

    def is_enough(self, node: _Node) -> bool:
        best = self.best
        return best is not None and best.cost - node.bound <= self.enough * abs(best.cost)

    def solved(self, node: _Node, charged: Multiplier, solver: Solver | None = None) -> Solution:
        """Solve with usage charged; lower_bound is of cost and charge together."""
        self.solves += 1
        plain = (solver or self.solver)(node.problem.weighed(charged))
        if isinstance(self.solver, ExactOrConditioned) and self.solver.given is not None:
            self.most_solves = min(self.most_solves, _MOST_WIDE_SOLVES)
        self.method = plain.method
        spent = node.problem.spent(plain.assignment, charged)
        return self.consider(
            Solution(
                plain.assignment,
                spent.cost,
                plain.lower_bound,
                plain.method,
                spent.usage,
                spent.variable_alternatives,
                spent.factor_alternatives,
            )
        )

    def consider(self, solution: Solution) -> Solution:
        """Remember the solution, and whether it is the best."""
        fits = self.problem.fits(solution.usage)
        if fits and (self.best is None or solution.cost < self.best.cost):
            self.best = solution
        key = (
            tuple(solution.assignment.values()),
            solution.variable_alternatives,
            solution.factor_alternatives,
        )
        if key not in self.known:
            self.known[key] = None
            self.found.append(solution)
        return solution

    def at(self, node: _Node, multiplier: float, solver: Solver | None = None) -> Solution:
        """Solve at one multiplier. Raises the bound."""
        if isinstance(self.solver, ExactOrConditioned):
            self.solver.forget()
        solution = self.solved(node, multiplier, solver)
        charge = multiplier * self.limit if multiplier else 0.0
        node.bound = max(node.bound, solution.lower_bound - charge)
        return solution

    def least(self, node: _Node) -> Solution:
        """The least usage; raises OverLimitError if that is too much."""
        plain = self.solver(node.problem.usage_alone())
        if self.prover is not None and not self.problem.fits(plain.cost):
            plain = self.prover(node.problem.usage_alone())
        # As if usage were so dear that nothing else counts.
        solution = Solution.of(node.problem, plain.assignment, plain.method, None, math.inf)
        if not self.problem.fits(solution.usage):
            raise OverLimitError(plain.cost, plain.lower_bound, self.limit)
        return self.consider(solution)

    def search(self, node: _Node) -> None:
        """The multiplier at which the node's bound is best.

        Every assignment is a line above the dual function, falling if it is within the limit: where
        the least rising and falling lines meet, a solve either shows that there are no lower ones,
        or gives one.
        """
        known = [s for s in self.found if all(s.assignment[n] == p for n, p in node.pins.items())]
        over = [s for s in known if not self.problem.fits(s.usage)]
        within = [s for s in known if self.problem.fits(s.usage)]
        if not over:
            solution = self.at(node, 0.0)
            if self.problem.fits(solution.usage):
                return
            over.append(solution)
        if not within:
            within.append(self.least(node))
        low, high, same = 0.0, math.inf, 0
        for _ in range(max(4, self.most_solves // 5)):
            meet, promised, node.ends = self.meeting(over, within)
            node.multiplier = meet
            if promised - node.bound <= _EXACT * abs(promised) or self.is_enough(node):
                break
            multiplier = meet
            if abs(same) >= 2 and low and math.isfinite(high):
                multiplier = math.sqrt(low * high)
            solution = self.at(node, multiplier)
            height = solution.cost + multiplier * (solution.usage - self.limit)
            if multiplier == meet and promised - height <= _EXACT * abs(promised):
                break
            if self.problem.fits(solution.usage):
                within.append(solution)
                high, same = min(high, multiplier), max(same, 0) + 1
            else:
                over.append(solution)
                low, same = max(low, multiplier), min(same, 0) - 1

    def meeting(
        self, over: list[Solution], within: list[Solution]
    ) -> tuple[float, float, tuple[Solution, ...]]:
        """Where the least of all lines is highest: multiplier, height, and the lines there."""

        def height(solution: Solution, multiplier: float) -> float:
            if not multiplier:
                return solution.cost
            return solution.cost + multiplier * (solution.usage - self.limit)

        low = min(over, key=lambda s: s.cost)
        multiplier = 0.0
        # From line to line: each falling one that is lower than the rising one cuts it off, and so
        # on; the height only falls, so this ends.
        high = min(within, key=lambda s: s.cost)
        for _ in range(len(over) + len(within)):
            if high.cost <= low.cost:
                return 0.0, high.cost, (low, high)
            multiplier = (high.cost - low.cost) / (low.usage - high.usage)
            level = height(high, multiplier)
            lowest = min(over + within, key=lambda s: height(s, multiplier))
            if height(lowest, multiplier) >= level - _EXACT * abs(level):
                break
            if self.problem.fits(lowest.usage):
                high = lowest
            else:
                low = lowest
        return multiplier, height(high, multiplier), (low, high)

    def split(self, node: _Node) -> None:
        """Charge more up to some place and less behind it, and the other way round."""
        for below, above in _SPREADS:
            if self.solves >= self.most_solves:
                return
            less, more = node.multiplier * (1 - below), node.multiplier * (1 + above)
            if isinstance(self.solver, ExactOrConditioned):
                self.solver.forget()
            before = self.best
            for first, second in ((less, more), (more, less)):
                moved = self.move(node, first, second)
                if self.best is not before:
                    self.fill(node)
                if self.is_enough(node):
                    return
                if not moved:
                    break
            else:
                if self.best is before:
                    return  # the place was found, and no other charges find a better one

    def move(self, node: _Node, first: float, second: float) -> bool:
        """Charge `first` up to a place and `second` behind it; find the place.

        Gives up, and returns False, where one end's solution just takes the place of the other's.
        """
        places = _places(self.problem)
        end = max(places, default=0) + 1

        def usage_at(place: int) -> float:
            charged = [first if own < place else second for own in places]
            return self.solved(node, charged).usage

        usages = {0: usage_at(0), end: usage_at(end)}
        over = 0 if first > second else end
        within = end - over
        if self.problem.fits(usages[over]) or not self.problem.fits(usages[within]):
            return False
        nothing_new = 0
        for _ in range(_MOST_PLACES):
            if abs(over - within) <= 1 or nothing_new >= _MOST_JUMPS or self.is_enough(node):
                break
            share = (usages[over] - self.limit) / (usages[over] - usages[within])
            share = 0.5 if nothing_new else min(max(share, 0.1), 0.9)
            place = over + round(share * (within - over))
            place = min(max(place, min(over, within) + 1), max(over, within) - 1)
            usage = usage_at(place)
            nothing_new = nothing_new + 1 if usage in usages.values() else 0
            usages[place] = usage
            if self.problem.fits(usage):
                within = place
            else:
                over = place
        return len(dict.fromkeys(usages.values())) > 2

    def fill(self, node: _Node) -> None:
        """Take over what other solutions do differently: to keep the limit, then to use it up."""

        def height(solution: Solution) -> float:
            return solution.cost + node.multiplier * (solution.usage - self.limit)

        near = sorted(self.found, key=lambda s: (height(s), s.usage))
        within = [s for s in near if self.problem.fits(s.usage)][:_MOST_OTHERS]
        over = [s for s in near if not self.problem.fits(s.usage)][:_MOST_OTHERS]
        for solution in over[:_MOST_MENDED]:
            if self.best is not None and solution.cost >= self.best.cost:
                continue
            repair_to_limit = filling.repair_to_limit(
                self.problem, solution, within, node.multiplier
            )
            if repair_to_limit is not None:
                self.consider(repair_to_limit)
        if self.best is not None:
            others = within + over
            self.consider(
                filling.improve_within_limit(self.problem, self.best, others, node.multiplier)
            )

    def branches(self, node: _Node) -> list[_Node]:
        """A node for each state of a variable that reaches through much of the model."""
        if len(node.ends) < 2:
            return []
        one, two = (solution.assignment for solution in node.ends)
        names = self.problem.names
        tables, reach = [0] * len(names), [0] * len(names)
        for scope in self.problem.scopes():
            for place in scope:
                tables[place] += 1
                reach[place] = max(reach[place], *(abs(place - other) for other in scope))
        hubs = [
            place
            for place, name in enumerate(names)
            if 2 * reach[place] >= len(names) and one[name] != two[name] and name not in node.pins
        ]
        if not hubs:
            return []
        hub = names[max(hubs, key=lambda place: tables[place])]
        children = []
        for state in range(self.problem.variable(hub).size):
            pins = {**node.pins, hub: state}
            children.append(_Node(self.problem.pinned(pins), pins, node.bound))
        return children


def _places(problem: Problem) -> list[int]:
    """Of every table, variables' first: the place of the last of its variables."""
    count = len(problem.variables)
    return [*range(count), *(max(scope) for scope in problem.scopes())]
