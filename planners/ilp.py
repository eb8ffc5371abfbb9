"""The planning problem as an integer program, solved by HiGHS: the cross-check, and the fallback.

The local-polytope formulation: one column per state of a variable and per entry of a table (and way
to pay for it), which are 1 where chosen. The columns of a table add up, over all axes but one, to
those of that axis' variable. A limit is one more row. Sources: Wainwright & Jordan 2008, section 8;
HiGHS: Huangfu & Hall 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from planners.problem import Problem
from planners.solution import InfeasibleError, OverLimitError, Solution
from planners.tables import Alternative, Prices, Table
from planners.variables import Factor, Variable

if TYPE_CHECKING:
    # Most problems never become an integer program: it is imported where one does, so that the rest
    # runs where it is not installed.
    import highspy

_METHOD = "integer program"
_RELATIVE_GAP = 1e-9

Columns = NDArray[np.intp]


def solve(
    problem: Problem,
    time_limit_seconds: float | None = None,
    relative_gap: float = _RELATIVE_GAP,
    most_nodes: int | None = None,
) -> Solution:
    """Return an assignment of least cost within the limit, or the best one found in time.

    time_limit_seconds: None for no limit; without one the result is deterministic. relative_gap:
    the result is optimal up to this share of its cost. most_nodes: the largest search tree; with it
    the result may have a larger gap.
    Raises InfeasibleError if no assignment has a finite cost, OverLimitError if those that have are
    over the limit, TimeoutError if none was found in time (or nodes), RuntimeError if HiGHS fails.

    >>> solve(Problem((Variable("a", np.array([2.0, 1.0])),))).assignment
    {'a': 1}
    """
    import highspy

    if not problem.variables:
        return Solution.of(problem, {}, _METHOD)
    program = _Program.of(problem if problem.limit is not None else problem.weighed(0.0))
    highs = program.run(False, time_limit_seconds, relative_gap, most_nodes)
    if highs is None:
        if problem.limit is None:
            raise InfeasibleError()
        least = solve(problem.usage_alone(), time_limit_seconds)
        if least.cost > problem.limit:
            raise OverLimitError(least.cost, least.lower_bound, problem.limit)
        # The presolve of HiGHS 1.8 takes some programs that have a solution for impossible.
        highs = program.run(False, time_limit_seconds, relative_gap, most_nodes, presolve=False)
        if highs is None:
            raise RuntimeError("HiGHS finds no solution, and there is one")
    info = highs.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        within = f"{time_limit_seconds} seconds" if most_nodes is None else f"{most_nodes} nodes"
        raise TimeoutError(f"no assignment was found within {within}")
    values = np.asarray(highs.getSolution().col_value)
    bound = program.offset + info.mip_dual_bound * program.unit
    states = [
        int(columns.states[np.argmax(values[columns.start : columns.start + columns.count])])
        for columns in program.variables
    ]
    assignment = dict(zip(problem.names, states, strict=True))
    if problem.limit is None:
        return Solution.of(problem, assignment, _METHOD, bound)
    items: list[Variable | Factor] = [*problem.variables, *problem.factors]
    scopes = [(place,) for place in range(len(states))] + problem.scopes()
    ways = [0] * len(items)
    for number, payment in program.payments.items():
        entry = tuple(states[place] for place in scopes[number])
        ways[number] = payment.way(entry, values)
    prices = [
        list(item.prices.at(tuple(states[place] for place in scope)))[way]
        for item, scope, way in zip(items, scopes, ways, strict=True)
    ]
    cost = math.fsum(price[0] for price in prices)
    usage = math.fsum(price[1] for price in prices)
    assert math.isfinite(cost), cost
    assert problem.fits(usage), usage
    return Solution(
        assignment,
        cost,
        min(bound, cost),
        _METHOD,
        usage,
        tuple(ways[: len(states)]),
        tuple(ways[len(states) :]),
    )


def lp_bound(problem: Problem) -> float:
    """Return the cost of the relaxation in which states may be mixed: no assignment costs less.

    Raises InfeasibleError if even the relaxation has no finite cost within the limit, RuntimeError
    if HiGHS fails.

    >>> lp_bound(Problem((Variable("a", np.array([2.0, 1.0])),)))
    1.0
    """
    if not problem.variables:
        return 0.0
    program = _Program.of(problem if problem.limit is not None else problem.weighed(0.0))
    highs = program.run(relaxed=True)
    if highs is None:
        raise InfeasibleError()
    return program.offset + highs.getInfo().objective_function_value * program.unit


@dataclass(frozen=True, slots=True)
class _States:
    """The columns of a variable, one per state of finite cost: column start + i is states[i]."""

    states: Columns
    start: int

    @property
    def count(self) -> int:
        """The number of columns."""
        return len(self.states)


@dataclass(frozen=True, slots=True)
class _Payments:
    """The columns of a table with several ways to pay: column start + i is entry[i] paid way[i].

    entries: one row per axis of the table, one column per column of the program.
    """

    start: int
    entries: NDArray[np.intp]
    ways: Columns

    def way(self, entry: tuple[int, ...], values: Table) -> int:
        """Return the way by which an entry is paid in a solution's column values."""
        at = np.flatnonzero((self.entries == np.array(entry)[:, None]).all(axis=0))
        return int(self.ways[at[np.argmax(values[self.start + at])]])


@dataclass(frozen=True, slots=True)
class _Program:
    """Columns with costs, and rows with lower and upper bounds, as a sparse matrix by row.

    variables: the columns of every variable. payments: those of tables with several ways, by the
    table's number (variables first). integer: per column, whether it must be whole. The cost of an
    assignment is offset + unit * (sum of chosen columns' costs).
    """

    variables: list[_States]
    payments: dict[int, _Payments]
    integer: NDArray[np.bool_]
    costs: Table
    lower: Table
    upper: Table
    row_starts: Columns
    columns: Columns
    entries: Table
    offset: float
    unit: float

    @staticmethod
    def of(problem: Problem) -> _Program:
        """Return the integer program of a problem."""
        builder = _Builder(problem)
        for factor, (scope, prices) in _merged(problem):
            builder.add_table(scope, prices, factor)
        return builder.program()

    def run(
        self,
        relaxed: bool,
        time_limit_seconds: float | None = None,
        relative_gap: float = _RELATIVE_GAP,
        most_nodes: int | None = None,
        presolve: bool = True,
    ) -> highspy.Highs | None:
        """Run HiGHS; return it, or None if there is no solution.

        relaxed: columns may be fractions. presolve: whether it makes the program smaller first.
        Raises RuntimeError if HiGHS ends in any other way than solved, infeasible or out of time or
        nodes.
        """
        import highspy

        # One thread and a fixed seed, so that the same program gives the same solution.
        highs: highspy.Highs = highspy.Highs()
        options: dict[str, bool | int | float | str] = {
            "output_flag": False,
            "presolve": "choose" if presolve else "off",
            "threads": 1,
            "random_seed": 0,
            "mip_rel_gap": relative_gap,
            "mip_abs_gap": 0.0,
            "mip_feasibility_tolerance": 1e-9,
            "primal_feasibility_tolerance": 1e-9,
            "dual_feasibility_tolerance": 1e-9,
        }
        if time_limit_seconds is not None:
            options["time_limit"] = float(time_limit_seconds)
        if most_nodes is not None:
            options["mip_max_nodes"] = most_nodes
        for name, value in options.items():
            _succeeded(highs.setOptionValue(name, value), f"option {name}")
        _succeeded(highs.passModel(self._model(relaxed)), "the model")
        _succeeded(highs.run(), "the run")
        status = highs.getModelStatus()
        if status in (
            highspy.HighsModelStatus.kInfeasible,
            highspy.HighsModelStatus.kUnboundedOrInfeasible,
        ):
            return None
        stopped = (highspy.HighsModelStatus.kTimeLimit, highspy.HighsModelStatus.kSolutionLimit)
        if status != highspy.HighsModelStatus.kOptimal and (relaxed or status not in stopped):
            raise RuntimeError(f"HiGHS ended with {highs.modelStatusToString(status)}")
        return highs

    def _model(self, relaxed: bool) -> highspy.HighsLp:
        """Return the program in the form that HiGHS takes."""
        import highspy

        count = len(self.costs)
        model = highspy.HighsLp()
        model.num_col_ = count
        model.num_row_ = len(self.lower)
        model.col_cost_ = self.costs
        model.col_lower_ = np.zeros(count)
        model.col_upper_ = np.ones(count)
        model.row_lower_ = self.lower
        model.row_upper_ = self.upper
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = self.row_starts
        model.a_matrix_.index_ = self.columns
        model.a_matrix_.value_ = self.entries
        if not relaxed:
            # Tables' columns are whole numbers by themselves once the variables' are, unless there
            # are several ways to pay.
            integer = highspy.HighsVarType.kInteger
            continuous = highspy.HighsVarType.kContinuous
            model.integrality_ = [integer if each else continuous for each in self.integer]
        return model


class _Builder:
    """Collects columns and rows; costs of a group of columns are counted from their least."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.count = 0
        self.offsets: list[float] = []
        self.payments: dict[int, _Payments] = {}
        self._costs: list[Table] = []
        self._usages: list[Table] = []
        self._integer: list[NDArray[np.bool_]] = []
        self._rows: list[Columns] = []
        self._entries: list[Table] = []
        self._sides: list[float] = []
        self.variables: list[_States] = []
        for place, variable in enumerate(problem.variables):
            prices = variable.prices
            finite = np.flatnonzero(np.isfinite(prices.weighed(0.0)))
            if not len(finite):
                raise InfeasibleError((variable.name,))
            several = len(prices.ways) > 1
            # With several ways to pay, the columns of (state, way) carry the costs instead.
            zeros = np.zeros(len(finite))
            costs = zeros if several else variable.unary[finite]
            usage = None if several or variable.usage is None else variable.usage[finite]
            start = self.add_columns(costs, usage, True)
            self.variables.append(_States(finite, start))
            self.add_row(np.arange(start, start + len(finite)), np.ones(len(finite)), 1.0)
            if several:
                self.add_table((place,), prices, place)

    def add_columns(self, costs: Table, usages: Table | None, integer: bool) -> int:
        """Add columns of which exactly one will be chosen; return the number of the first.

        The least cost goes into the offset, so that all costs of the program are not negative.
        """
        low = float(costs.min())
        self.offsets.append(low)
        self._costs.append(costs - low)
        self._usages.append(np.zeros(len(costs)) if usages is None else usages)
        self._integer.append(np.full(len(costs), integer))
        start = self.count
        self.count += len(costs)
        return start

    def add_row(self, columns: Columns, entries: Table, side: float) -> None:
        """Add the row: sum of entries * columns = side."""
        self._rows.append(columns)
        self._entries.append(entries)
        self._sides.append(side)

    def add_table(self, scope: tuple[int, ...], prices: Prices, number: int | None) -> None:
        """Add columns for the entries of one table, tied to those of its variables.

        scope: indices of variables. number: of the table, if its way is to be read from the
        solution.
        """
        states_left = [self.variables[place].states for place in scope]
        parts = [way.cost[np.ix_(*states_left)] for way in prices.ways]
        usage_parts = [
            None if way.usage is None else way.usage[np.ix_(*states_left)] for way in prices.ways
        ]
        low = float(min(part.min() for part in parts))
        if low == np.inf:
            raise InfeasibleError(tuple(self.problem.variables[place].name for place in scope))
        single = len(parts) == 1
        # A constant table needs no columns.
        if single and usage_parts[0] is None and (parts[0] == low).all():
            self.offsets.append(low)
            return
        at = [np.nonzero(np.isfinite(part)) for part in parts]
        entries = np.stack([np.concatenate(axis) for axis in zip(*at, strict=True)])
        costs = np.concatenate([part[where] for part, where in zip(parts, at, strict=True)])
        usages = np.concatenate(
            [
                np.zeros(len(where[0])) if usage is None else usage[where]
                for usage, where in zip(usage_parts, at, strict=True)
            ]
        )
        start = self.add_columns(costs, usages, not single)
        if not single:
            assert number is not None
            ways = np.repeat(np.arange(len(parts)), [len(where[0]) for where in at])
            states = np.stack([k[axis] for k, axis in zip(states_left, entries, strict=True)])
            self.payments[number] = _Payments(start, states, ways)
        # For each state of each variable: the table's columns with that state add up to its column.
        for place, along in zip(scope, entries, strict=True):
            variable = self.variables[place]
            for state in range(variable.count):
                chosen = start + np.flatnonzero(along == state)
                signs = np.append(np.ones(len(chosen)), -1.0)
                self.add_row(np.append(chosen, variable.start + state), signs, 0.0)

    def program(self) -> _Program:
        """Return the program of all columns and rows, with the limit as its last row."""
        costs = np.concatenate([np.zeros(0), *self._costs])
        positive = costs[costs > 0]
        # HiGHS's tolerances are absolute and meant for costs around 1; seconds are far smaller.
        unit = float(np.median(positive)) / 10 if len(positive) else 1.0
        lower, upper = np.array(self._sides), np.array(self._sides)
        limit = self.problem.limit
        if limit is not None:
            usages = np.concatenate([np.zeros(0), *self._usages])
            # Bytes are scaled to at most 1, for the same absolute tolerances.
            scale = float(np.abs(usages).max()) or 1.0
            using = np.flatnonzero(usages)
            self._rows.append(using)
            self._entries.append(usages[using] / scale)
            lower = np.append(lower, -np.inf)
            upper = np.append(upper, limit / scale)
        return _Program(
            self.variables,
            self.payments,
            np.concatenate([np.zeros(0, dtype=np.bool_), *self._integer]),
            costs / unit,
            lower,
            upper,
            np.cumsum([0] + [len(row) for row in self._rows]),
            np.concatenate([np.zeros(0, dtype=np.intp), *self._rows]),
            np.concatenate([np.zeros(0), *self._entries]),
            math.fsum(self.offsets),
            unit,
        )


def _merged(problem: Problem) -> list[tuple[int | None, tuple[tuple[int, ...], Prices]]]:
    """Return the tables with their scope (variable indices): one for all that can be added up.

    Those with several ways to pay stay alone, and come with their number.
    """
    sums: dict[tuple[int, ...], tuple[Table, Table | None]] = {}
    alone: list[tuple[int | None, tuple[tuple[int, ...], Prices]]] = []
    scopes = problem.scopes()
    for number, (factor, scope) in enumerate(zip(problem.factors, scopes, strict=True)):
        if factor.alternatives:
            alone.append((len(problem.variables) + number, (scope, factor.prices)))
            continue
        order = sorted(range(len(scope)), key=lambda axis: scope[axis])
        group = tuple(scope[axis] for axis in order)
        table, usage = _turned(factor, order)
        if group in sums:
            sum_so_far, usage_so_far = sums[group]
            table = sum_so_far + table
            if usage_so_far is not None:
                usage = usage_so_far if usage is None else usage_so_far + usage
        sums[group] = (table, usage)
    merged: list[tuple[int | None, tuple[tuple[int, ...], Prices]]] = [
        (None, (group, Prices((Alternative(table, usage),))))
        for group, (table, usage) in sums.items()
    ]
    return merged + alone


def _turned(factor: Factor, order: list[int]) -> tuple[Table, Table | None]:
    """Return the factor's table and usage with the axes in the given order."""
    usage = factor.usage
    return factor.table.transpose(order), None if usage is None else usage.transpose(order)


def _succeeded(status: highspy.HighsStatus, what: str) -> None:
    """Raise RuntimeError if HiGHS reports an error."""
    import highspy

    if status == highspy.HighsStatus.kError:
        raise RuntimeError(f"HiGHS refused {what}")
