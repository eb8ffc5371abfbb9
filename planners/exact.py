"""Exact planning by variable elimination.

Eliminating a variable replaces the tables around it by one table over its neighbours: the least
it can cost for each of their states. Model graphs are narrow, so these tables stay small; layers
repeat, so most of them are looked up.
"""

import math
from collections.abc import Iterable

import numpy as np

from planners.ordering import Schedule, TooWideError, schedule
from planners.problem import Problem
from planners.reduction import ContradictionError, Network, closure, reduce
from planners.solution import InfeasibleError, Solution
from planners.table_memo import Memo, Operand
from planners.tables import Table

MAX_TABLE_ENTRIES = 2**26
_METHOD = "variable elimination"
_MAX_CONFLICT_CANDIDATES = 1000
_MAX_CONFLICT_CHECKS = 200
_GRAIN = 2.0**-40  # of what makes up the optimum: how finely marginals tell states apart


def solve(
    problem: Problem, *, max_table_entries: int = MAX_TABLE_ENTRIES, memo: Memo | None = None
) -> Solution:
    """An assignment of least cost, whatever it uses; its lower bound is its cost.

    Ties (up to rounding) go to the lowest state, variable by variable in the reverse of the
    elimination order; the same problem always gives the same assignment.
    max_table_entries: the largest table to hold, in float64 entries. memo: share it between solves
    to look up what an earlier one computed, or read its counters.
    Raises InfeasibleError if no assignment has a finite cost (it names variables that cannot
    agree), TooWideError if the problem is not narrow enough.
    """
    memo = Memo() if memo is None else memo
    plain = problem.weighed(0.0)
    try:
        elimination = _Elimination(plain, max_table_entries, memo)
    except ContradictionError as contradiction:
        raise _infeasible(plain, contradiction.candidates, memo) from None
    assignment = elimination.assignment()
    terms = plain.terms(assignment)
    cost = math.fsum(terms)
    # What was added up on the way is larger than the cost where terms cancel.
    magnitude = math.fsum(map(abs, terms)) + elimination.magnitude
    assert abs(cost - elimination.optimum) <= 1e-9 * magnitude, (cost, elimination.optimum)
    return Solution.of(problem, assignment, _METHOD)


def min_marginals(
    problem: Problem,
    names: Iterable[str],
    *,
    max_table_entries: int = MAX_TABLE_ENTRIES,
    memo: Memo | None = None,
) -> dict[str, Table]:
    """For each named variable the least cost with it fixed to each of its states.

    The other variables are re-optimized, so that entry minus optimum is what a state really
    costs; +inf where it allows no finite cost. Never above that, and below it by rounding only (a
    share of 2**-40 of all that is added up, for each step between variables). All names together
    take about twice the time of one solve. Options and errors as in `solve`; also ValueError for an
    unknown name.
    """
    memo = Memo() if memo is None else memo
    wanted = {name: problem.index(name) for name in names}
    problem = problem.weighed(0.0)
    try:
        elimination = _Elimination(problem, max_table_entries, memo)
    except ContradictionError as contradiction:
        raise _infeasible(problem, contradiction.candidates, memo) from None
    marginals = elimination.marginals(list(wanted.values()))
    result = {}
    for name, variable in wanted.items():
        table = np.full(problem.variables[variable].size, np.inf)
        table[elimination.network.states[variable]] = elimination.optimum + marginals[variable]
        result[name] = table
    return result


class _Elimination:
    """One problem, reduced, scheduled and eliminated.

    tables[r]: the number of the resulting table of recipe r, smallest entry 0. magnitude: the sum
    of the absolute values that make up the optimum.
    """

    network: Network
    schedule: Schedule
    optimum: float
    magnitude: float

    def __init__(self, problem: Problem, max_table_entries: int, memo: Memo) -> None:
        self.problem = problem
        self.memo = memo
        self.network = reduce(problem, memo)
        self.schedule = schedule(self.network, max_table_entries, memo.orders)
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
        spent = [offsets[step.recipe] for step in self.schedule.steps]
        spent.extend(self.network.offset_terms)
        self.optimum = math.fsum(spent)
        self.magnitude = math.fsum(map(abs, spent))

    def assignment(self) -> dict[str, int]:
        """Go back through the steps: each variable takes its best state given its scope's."""
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
            variable.name: int(kept[state])
            for variable, kept, state in zip(
                self.problem.variables, self.network.states, states, strict=True
            )
        }

    def marginals(self, wanted: list[int]) -> dict[int, Table]:
        """For each wanted variable, over its kept states: the least cost above the optimum.

        The message down to a step says, over the step's scope, what all that is not below it costs
        at least: it comes from its parent, the step that took in its result.
        """
        steps = self.schedule.steps
        place = {step.variable: number for number, step in enumerate(steps)}
        parents = [
            min([place[other] for other in step.scope]) if step.scope else None for step in steps
        ]
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
        """The number of the message from parent to child, over the child's scope."""
        step, upper = self.schedule.steps[child], self.schedule.steps[parent]
        clique = (upper.variable, *upper.scope)
        kept = tuple(clique.index(other) for other in step.scope)
        operands = list(self._operands(upper.recipe))
        operands.remove((self.tables[step.recipe], kept))
        if above is not None:
            operands.append(above)
        shape = self.schedule.recipes[upper.recipe].shape
        number, _ = self.memo.contract(tuple(operands), shape, kept)
        # Down a chain of equal layers messages come to differ in rounding alone. Cut to a grain,
        # they are the same table, which is looked up; and no marginal becomes larger by that.
        grain = self.magnitude * _GRAIN
        if grain == 0.0:
            return number
        return self.memo.table(np.floor(self.memo.tables[number] / grain) * grain)

    def _operands(self, recipe: int) -> tuple[Operand, ...]:
        """The recipe's operands with the results of earlier recipes filled in."""
        return tuple(
            (self.tables[-1 - number] if number < 0 else number, axes)
            for number, axes in self.schedule.recipes[recipe].operands
        )

    def _subtree(self, recipe: int) -> list[int]:
        """All variables with a say in the result of the recipe where it is used first."""
        steps = self.schedule.steps
        place = {step.variable: number for number, step in enumerate(steps)}
        last = next(number for number, step in enumerate(steps) if step.recipe == recipe)
        below = {last}
        found = {steps[last].variable: None} | dict.fromkeys(steps[last].scope)
        for number in reversed(range(last)):
            step = steps[number]
            if step.scope and min([place[other] for other in step.scope]) in below:
                below.add(number)
                found[step.variable] = None
        # The states that the reduction dropped count as well.
        return closure(list(found), self.network.blamed)


def _infeasible(problem: Problem, candidates: list[int], memo: Memo) -> InfeasibleError:
    """The error, naming candidates without as many as a limited number of tries can spare."""
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
    """Whether these variables by themselves have no assignment of finite cost."""
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
