"""Exact planning by variable elimination (min-sum bucket elimination).

Eliminating a variable replaces the tables around it by one table over its neighbours: the least
that it can cost for each of their states (Dechter, "Bucket elimination", Artificial Intelligence
113, 1999). The time grows with the number of states to the power of the induced width. Model graphs
are narrow, so these tables stay small; layers repeat, so most of them are looked up.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from planners.dominance import Asked, without_dominated
from planners.effort import current
from planners.greedy_orders import SCORES, TooWideError
from planners.ordering import schedule
from planners.problem import Problem
from planners.reduction import ContradictionError, Network, closure, reduce
from planners.schedules import Schedule
from planners.solution import InfeasibleError, Solution
from planners.table_memo import Memo, Operand
from planners.tables import Table

MAX_TABLE_ENTRIES = 2**26  # 512 MiB of float64
_METHOD = "variable elimination"
# An error names a small set of variables in conflict; finding one takes a solve for each check.
_MAX_CONFLICT_CANDIDATES = 1000
_MAX_CONFLICT_CHECKS = 200
# With less work, in table entries read, elimination is quicker than to look for dominated states.
_LITTLE_WORK = 2**26
# Messages are rounded down to this share of the optimum's magnitude, see `_Elimination._down`.
_GRAIN = 2.0**-40
# What elimination takes, by its work in table entries and by the tables of the problem.
_SECONDS_PER_ENTRY, _SECONDS_PER_TABLE = 2e-9, 1e-5


def solve(
    problem: Problem, *, max_table_entries: int = MAX_TABLE_ENTRIES, memo: Memo | None = None
) -> Solution:
    """Return an assignment of least cost, whatever it uses; its lower bound is its cost.

    Ties (up to rounding) go to the lowest state, variable by variable in the reverse of the
    elimination order; the same problem always gives the same assignment. A limit is ignored: see
    `lagrangian.solve`.
    max_table_entries: the largest table to hold, in float64 entries. memo: share it between solves
    to look up what an earlier one computed, or read its counters.
    Raises InfeasibleError if no assignment has a finite cost (it names variables that cannot
    agree), TooWideError if the problem is not narrow enough.

    >>> from planners import Factor, Variable
    >>> cheap_apart = Variable("a", np.array([0.0, 0.5])), Variable("b", np.array([1.0, 0.0]))
    >>> moving = Factor(("a", "b"), np.array([[0.0, 9.0], [9.0, 0.0]]))
    >>> solve(Problem(cheap_apart, (moving,))).assignment
    {'a': 1, 'b': 1}
    """
    memo = Memo() if memo is None else memo
    plain = problem.weighed(0.0)
    try:
        elimination = _Elimination(plain, max_table_entries, memo, optimum_alone=True)
    except ContradictionError as contradiction:
        raise _infeasible(plain, contradiction.candidates, memo) from None
    assignment = elimination.assignment()
    terms = plain.terms(assignment)
    cost = math.fsum(terms)
    # Terms can cancel: the rounding error is measured against what was added up, not the sum.
    magnitude = math.fsum(map(abs, terms)) + elimination.magnitude
    assert abs(cost - elimination.optimum) <= 1e-9 * magnitude, (cost, elimination.optimum)
    if plain.variables is problem.variables and plain.factors is problem.factors:
        # There is one way to pay for each table, and nothing is used.
        ways = (0,) * len(plain.variables), (0,) * len(plain.factors)
        return Solution(assignment, cost, cost, _METHOD, 0.0, *ways)
    return Solution.of(problem, assignment, _METHOD)


def min_marginals(
    problem: Problem,
    names: Iterable[str],
    *,
    max_table_entries: int = MAX_TABLE_ENTRIES,
    memo: Memo | None = None,
    most_work: float = math.inf,
) -> dict[str, Table]:
    """Return, per named variable, the least cost with it fixed to each of its states.

    The other variables are re-optimized, so that entry minus optimum is what a state really costs;
    +inf where the state allows no finite cost. An entry is never above that, and below it by
    rounding only (a share of 2**-40 of all that is added up, for each step between variables). All
    names together take about twice the time of one solve that drops no dominated states. most_work:
    TooWideError is raised, too, where elimination alone would read more table entries. Other
    options and errors as in `solve`; also ValueError for an unknown name.

    >>> from planners import Factor, Variable
    >>> variables = Variable("a", np.array([0.0, 0.5])), Variable("b", np.array([1.0, 0.0]))
    >>> moving = Factor(("a", "b"), np.array([[0.0, 9.0], [9.0, 0.0]]))
    >>> min_marginals(Problem(variables, (moving,)), ["a"])
    {'a': array([1. , 0.5])}
    """
    memo = Memo() if memo is None else memo
    wanted = {name: problem.index(name) for name in names}
    problem = problem.weighed(0.0)
    try:
        elimination = _Elimination(problem, max_table_entries, memo, most_work=most_work)
    except ContradictionError as contradiction:
        raise _infeasible(problem, contradiction.candidates, memo) from None
    marginals = elimination.marginals(list(wanted.values()))
    result = {}
    for name, variable in wanted.items():
        table = np.full(problem.variables[variable].size, np.inf)
        table[elimination.network.states[variable]] = elimination.optimum + marginals[variable]
        result[name] = table
    return result


def least_among(
    problem: Problem,
    states: Mapping[str, Sequence[int]],
    *,
    max_table_entries: int = MAX_TABLE_ENTRIES,
    memo: Memo | None = None,
) -> dict[str, float]:
    """Return, per named variable, the least cost with it in one of its given states.

    That is less than `min_marginals` tell, and quicker where there is much work: states that others
    dominate are dropped, those that are asked for only where another of them does it. +inf where no
    cost is finite. Other options and errors as in `min_marginals`.

    >>> from planners import Factor, Variable
    >>> variables = Variable("a", np.array([0.0, 0.5])), Variable("b", np.array([1.0, 0.0]))
    >>> moving = Factor(("a", "b"), np.array([[0.0, 9.0], [9.0, 0.0]]))
    >>> least_among(Problem(variables, (moving,)), {"a": [0]})
    {'a': 1.0}
    """
    memo = Memo() if memo is None else memo
    wanted = {name: problem.index(name) for name in states}
    problem = problem.weighed(0.0)
    asked = {}
    for name, variable in wanted.items():
        asked[variable] = np.zeros(problem.variables[variable].size, np.bool_)
        asked[variable][list(states[name])] = True
    try:
        elimination = _Elimination(problem, max_table_entries, memo, asked=asked)
    except ContradictionError as contradiction:
        raise _infeasible(problem, contradiction.candidates, memo) from None
    marginals = elimination.marginals(list(wanted.values()))
    result = {}
    for name, variable in wanted.items():
        among = asked[variable][elimination.network.states[variable]]
        least = np.min(marginals[variable][among], initial=np.inf)
        result[name] = float(elimination.optimum + least)
    return result


class _Elimination:
    """One problem, reduced, scheduled and eliminated.

    optimum: the least cost. tables[r]: the memo's number of the resulting table of recipe r, whose
    smallest entry is 0. magnitude: the sum of the absolute values that make up the optimum. Raises
    ContradictionError where no assignment is finite, TooWideError from the schedule.
    optimum_alone: dominated states may be dropped, as only an optimum is asked for. most_work: more
    is too wide. asked: states of which the least cost is asked for, see `without_dominated`.
    """

    network: Network
    schedule: Schedule
    optimum: float
    magnitude: float

    def __init__(
        self,
        problem: Problem,
        max_table_entries: int,
        memo: Memo,
        optimum_alone: bool = False,
        most_work: float = math.inf,
        asked: Asked | None = None,
    ) -> None:
        self.problem = problem
        self.memo = memo
        self.network = reduce(problem, memo)
        if optimum_alone:
            asked = {}
        self.schedule = self._scheduled(max_table_entries, asked)
        if self.schedule.work > most_work:
            raise TooWideError(self.schedule.largest, max_table_entries)
        current().spend(
            self.schedule.work * _SECONDS_PER_ENTRY
            + (len(problem.variables) + len(problem.factors)) * _SECONDS_PER_TABLE
        )
        self.tables: list[int] = []
        offsets: list[float] = []
        for number, recipe in enumerate(self.schedule.recipes):
            table, offset = memo.contract(
                self._operands(number), recipe.shape, tuple(range(1, len(recipe.shape)))
            )
            if offset == math.inf:
                raise ContradictionError(self._subtree(number))
            self.tables.append(table)
            offsets.append(offset)
        memo.reused += len(self.schedule.steps) - len(self.schedule.recipes)
        # Each result's smallest entry was moved to an offset, so that equal layers give equal
        # tables; the optimum is the sum of the offsets, one per step (a recipe may serve many).
        summands = [offsets[step.recipe] for step in self.schedule.steps]
        summands.extend(self.network.offset_terms)
        self.optimum = math.fsum(summands)
        self.magnitude = math.fsum(map(abs, summands))

    def _scheduled(self, max_table_entries: int, asked: Asked | None) -> Schedule:
        """Return the schedule, after dropping dominated states where it would be much work.

        asked: see `without_dominated`; None where all states are asked for.
        """
        orders, heavy = self.memo.orders, self.memo.heavy
        if asked is not None:
            form = self.network.form
            if form not in heavy:
                try:
                    quick = schedule(self.network, max_table_entries, orders, SCORES[:1])
                    if quick.work <= _LITTLE_WORK:
                        return quick
                except TooWideError:
                    pass
                heavy[form] = None
            self.network = without_dominated(self.problem, self.network, self.memo, asked)
        return schedule(self.network, max_table_entries, orders)

    def assignment(self) -> dict[str, int]:
        """Return an optimal state for every variable, by name.

        Walks back through the steps: each variable takes its best state given its scope's.
        """
        states = [0] * len(self.network.states)
        aligned: dict[int, list[Table]] = {}
        chosen: dict[tuple[int, tuple[int, ...]], int] = {}
        for step in reversed(self.schedule.steps):
            around = tuple([states[other] for other in step.scope])
            key = (step.recipe, around)
            if key not in chosen:
                if step.recipe not in aligned:
                    shape = self.schedule.recipes[step.recipe].shape
                    operands = self._operands(step.recipe)
                    aligned[step.recipe] = self.memo.aligned(operands, len(shape))
                total = np.zeros(len(self.network.states[step.variable]))
                for table in aligned[step.recipe]:
                    sizes = table.shape[1:]
                    at = [s if n > 1 else 0 for s, n in zip(around, sizes, strict=True)]
                    row: tuple[slice | int, ...] = (slice(None), *at)
                    total = total + table[row]
                chosen[key] = int(np.argmin(total))
            states[step.variable] = chosen[key]
        return {
            variable.name: int(states_left[state])
            for variable, states_left, state in zip(
                self.problem.variables, self.network.states, states, strict=True
            )
        }

    def marginals(self, wanted: list[int]) -> dict[int, Table]:
        """Return, per wanted variable, the least cost above the optimum of each state left.

        This is the downward pass of message passing on the clique tree. The message down to a step
        says, over the step's scope, the least cost of all that is not below it: it comes from its
        parent, the step that took in its result.
        """
        steps = self.schedule.steps
        place = {step.variable: number for number, step in enumerate(steps)}
        parents = [
            min([place[other] for other in step.scope]) if step.scope else None for step in steps
        ]
        # Only ancestors of wanted variables need a message.
        needed = [False] * len(steps)
        for variable in wanted:
            number = place.get(variable)
            while number is not None and not needed[number]:
                needed[number] = True
                number = parents[number]
        down: dict[int, Operand] = {}
        for number in reversed(range(len(steps))):
            parent = parents[number]
            if needed[number] and parent is not None:
                table = self._down(number, parent, down.get(parent))
                down[number] = (table, tuple(range(1, len(steps[number].scope) + 1)))
        result = {variable: np.zeros(len(self.network.states[variable])) for variable in wanted}
        for variable in wanted:
            if variable in place:
                number = place[variable]
                recipe = steps[number].recipe
                operands = self._operands(recipe) + ((down[number],) if number in down else ())
                shape = self.schedule.recipes[recipe].shape
                table, _ = self.memo.contract(operands, shape, (0,))
                result[variable] = self.memo.tables[table]
        return result

    def _down(self, child: int, parent: int, above: Operand | None) -> int:
        """Return the number of the message from parent to child, over the child's scope.

        above: the message from the grandparent, None at a root.
        """
        step, upper = self.schedule.steps[child], self.schedule.steps[parent]
        clique = (upper.variable, *upper.scope)
        child_axes = tuple(clique.index(other) for other in step.scope)
        operands = list(self._operands(upper.recipe))
        # All that the parent joined but what came up from this child, which the child counts
        # itself.
        operands.remove((self.tables[step.recipe], child_axes))
        if above is not None:
            operands.append(above)
        shape = self.schedule.recipes[upper.recipe].shape
        number, _ = self.memo.contract(tuple(operands), shape, child_axes)
        # Down a chain of equal layers messages come to differ in rounding alone. Rounded down to
        # a grain, they are the same table, which is looked up; rounding down keeps every marginal
        # a lower bound.
        grain = self.magnitude * _GRAIN
        if grain == 0.0:
            return number
        return self.memo.table(np.floor(self.memo.tables[number] / grain) * grain)

    def _operands(self, recipe: int) -> tuple[Operand, ...]:
        """Return the recipe's operands, results of earlier recipes by their table numbers."""
        return tuple(
            (self.tables[-1 - number] if number < 0 else number, axes)
            for number, axes in self.schedule.recipes[recipe].operands
        )

    def _subtree(self, recipe: int) -> list[int]:
        """Return all variables that contribute to the result of a recipe, where first used."""
        steps = self.schedule.steps
        place = {step.variable: number for number, step in enumerate(steps)}
        last = next(number for number, step in enumerate(steps) if step.recipe == recipe)
        below = {last}
        contributors = {steps[last].variable: None} | dict.fromkeys(steps[last].scope)
        for number in reversed(range(last)):
            step = steps[number]
            if step.scope and min([place[other] for other in step.scope]) in below:
                below.add(number)
                contributors[step.variable] = None
        # The states that the reduction dropped count as well.
        return closure(list(contributors), self.network.blamed)


def _infeasible(problem: Problem, candidates: list[int], memo: Memo) -> InfeasibleError:
    """Return the error, naming a small set of variables that already contradict each other.

    Chunks of halving size are left out while the rest still contradicts (delta debugging, Zeller &
    Hildebrandt 2002), within a limited number of tries.
    """
    if len(candidates) > _MAX_CONFLICT_CANDIDATES:
        return InfeasibleError()
    size = len(candidates)
    checks = 0
    while size > 1:
        size = (size + 1) // 2
        start = 0
        while start < len(candidates) and checks < _MAX_CONFLICT_CHECKS:
            checks += 1
            fewer = candidates[:start] + candidates[start + size :]
            if fewer and _contradicts(problem, fewer, memo):
                candidates = fewer
            else:
                start += size
    return InfeasibleError(tuple(problem.variables[place].name for place in candidates))


def _contradicts(problem: Problem, places: list[int], memo: Memo) -> bool:
    """Say whether these variables by themselves have no assignment of finite cost."""
    variables = tuple(problem.variables[place] for place in places)
    names = {variable.name for variable in variables}
    factors = tuple(f for f in problem.factors if names.issuperset(f.scope))
    try:
        _Elimination(Problem(variables, factors), MAX_TABLE_ENTRIES, memo)
    except ContradictionError:
        return True
    except TooWideError:
        return False
    return False
