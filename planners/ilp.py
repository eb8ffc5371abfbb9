"""The same problem as an integer program, solved by HiGHS: the cross-check, and the fallback.

The local-polytope formulation: one column per state of a variable and per entry of a table, which
are 1 where chosen. The columns of a table add up, over either axis, to those of the variable.
"""

import math
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from planners.problem import InfeasibleError, Problem, Solution, Table

_METHOD = "integer program"
_RELATIVE_GAP = 1e-9


def solve(problem: Problem, time_limit_seconds: float | None = None) -> Solution:
    """An assignment of least cost, or the best one found in time, with the bound proven.

    Without a time limit the result is deterministic and optimal to a relative gap of about 1e-9.
    Raises InfeasibleError if no assignment has a finite cost, TimeoutError if none was found in
    time, RuntimeError if HiGHS fails.
    """
    if not problem.variables:
        return Solution({}, 0.0, 0.0, _METHOD)
    program = _Program.of(problem)
    highs = program.run(relaxed=False, time_limit_seconds=time_limit_seconds)
    values = np.asarray(highs.getSolution().col_value)
    info = highs.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        raise TimeoutError(f"no assignment was found within {time_limit_seconds} seconds")
    assignment = {}
    for variable, states, start in zip(
        problem.variables, program.states, program.starts, strict=True
    ):
        chosen = values[start : start + len(states)]
        assignment[variable.name] = int(states[np.argmax(chosen)])
    cost = problem.cost(assignment)
    assert math.isfinite(cost), assignment
    bound = program.offset + info.mip_dual_bound * program.unit
    return Solution(assignment, cost, min(bound, cost), _METHOD)


def lp_bound(problem: Problem) -> float:
    """The cost of the relaxation in which states may be mixed: no assignment costs less.

    Raises InfeasibleError if even the relaxation has no finite cost, RuntimeError if HiGHS fails.
    """
    if not problem.variables:
        return 0.0
    program = _Program.of(problem)
    highs = program.run(relaxed=True, time_limit_seconds=None)
    return program.offset + highs.getInfo().objective_function_value * program.unit


@dataclass(frozen=True, slots=True)
class _Program:
    """Columns with costs, and rows with equal lower and upper bounds, as a sparse matrix by row.

    states[i], starts[i]: the states of variable i that have a column, and the first of these.
    binaries: how many columns belong to variables; they come first. The cost of an assignment is
    offset + unit * (sum of chosen columns' costs).
    """

    states: list[NDArray[np.intp]]
    starts: list[int]
    binaries: int
    costs: Table
    sides: Table
    row_starts: NDArray[np.intp]
    columns: NDArray[np.intp]
    entries: Table
    offset: float
    unit: float

    @staticmethod
    def of(problem: Problem) -> "_Program":
        states = [np.flatnonzero(np.isfinite(v.unary)) for v in problem.variables]
        for variable, finite in zip(problem.variables, states, strict=True):
            if not len(finite):
                raise InfeasibleError((variable.name,))
        builder = _Builder()
        starts = []
        for variable, finite in zip(problem.variables, states, strict=True):
            start = builder.add_columns(variable.unary[finite])
            starts.append(start)
            builder.add_row(np.arange(start, start + len(finite)), np.ones(len(finite)), 1.0)
        binaries = builder.count
        for (first, second), table in _merged(problem).items():
            part = table[np.ix_(states[first], states[second])]
            low = float(part.min())
            if low == np.inf:
                names = (problem.variables[first].name, problem.variables[second].name)
                raise InfeasibleError(names)
            if (part == low).all():
                builder.offsets.append(low)
                continue
            rows, columns = np.nonzero(np.isfinite(part))
            start = builder.add_columns(part[rows, columns])
            edges = np.arange(start, start + len(rows))
            for axis, along, count in (
                (first, rows, part.shape[0]),
                (second, columns, part.shape[1]),
            ):
                for state in range(count):
                    chosen = edges[along == state]
                    signs = np.append(np.ones(len(chosen)), -1.0)
                    builder.add_row(np.append(chosen, starts[axis] + state), signs, 0.0)
        return builder.program(states, starts, binaries)

    def run(self, *, relaxed: bool, time_limit_seconds: float | None) -> highspy.Highs:
        """HiGHS after a run that ended as it should; raises as the public functions say."""
        highs: highspy.Highs = highspy.Highs()
        options: dict[str, bool | int | float] = {
            "output_flag": False,
            "threads": 1,
            "random_seed": 0,
            "mip_rel_gap": _RELATIVE_GAP,
            "mip_abs_gap": 0.0,
            "mip_feasibility_tolerance": 1e-9,
            "primal_feasibility_tolerance": 1e-9,
            "dual_feasibility_tolerance": 1e-9,
        }
        if time_limit_seconds is not None:
            options["time_limit"] = float(time_limit_seconds)
        for name, value in options.items():
            _succeeded(highs.setOptionValue(name, value), f"option {name}")
        _succeeded(highs.passModel(self._model(relaxed)), "the model")
        _succeeded(highs.run(), "the run")
        status = highs.getModelStatus()
        if status in (
            highspy.HighsModelStatus.kInfeasible,
            highspy.HighsModelStatus.kUnboundedOrInfeasible,
        ):
            raise InfeasibleError()
        timed_out = status == highspy.HighsModelStatus.kTimeLimit and not relaxed
        if status != highspy.HighsModelStatus.kOptimal and not timed_out:
            raise RuntimeError(f"HiGHS ended with {highs.modelStatusToString(status)}")
        return highs

    def _model(self, relaxed: bool) -> highspy.HighsLp:
        count = len(self.costs)
        model = highspy.HighsLp()
        model.num_col_ = count
        model.num_row_ = len(self.sides)
        model.col_cost_ = self.costs
        model.col_lower_ = np.zeros(count)
        model.col_upper_ = np.ones(count)
        model.row_lower_ = self.sides
        model.row_upper_ = self.sides
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = self.row_starts
        model.a_matrix_.index_ = self.columns
        model.a_matrix_.value_ = self.entries
        if not relaxed:
            # Tables' columns are whole numbers by themselves once the variables' are.
            integer = highspy.HighsVarType.kInteger
            continuous = highspy.HighsVarType.kContinuous
            kinds = [integer] * self.binaries + [continuous] * (count - self.binaries)
            model.integrality_ = kinds
        return model


class _Builder:
    """Collects columns and rows; costs of a group of columns are taken from their least."""

    def __init__(self) -> None:
        self.count = 0
        self.offsets: list[float] = []
        self._costs: list[Table] = []
        self._rows: list[NDArray[np.intp]] = []
        self._entries: list[Table] = []
        self._sides: list[float] = []

    def add_columns(self, costs: Table) -> int:
        """The first of the new columns, of which exactly one will be chosen."""
        low = float(costs.min())
        self.offsets.append(low)
        self._costs.append(costs - low)
        start = self.count
        self.count += len(costs)
        return start

    def add_row(self, columns: NDArray[np.intp], entries: Table, side: float) -> None:
        self._rows.append(columns)
        self._entries.append(entries)
        self._sides.append(side)

    def program(self, states: list[NDArray[np.intp]], starts: list[int], binaries: int) -> _Program:
        costs = np.concatenate([np.zeros(0), *self._costs])
        positive = costs[costs > 0]
        # HiGHS's tolerances are absolute and meant for costs around 1; seconds are far smaller.
        unit = float(np.median(positive)) / 10 if len(positive) else 1.0
        return _Program(
            states,
            starts,
            binaries,
            costs / unit,
            np.array(self._sides),
            np.cumsum([0] + [len(row) for row in self._rows]),
            np.concatenate([np.zeros(0, dtype=np.intp), *self._rows]),
            np.concatenate([np.zeros(0), *self._entries]),
            math.fsum(self.offsets),
            unit,
        )


def _merged(problem: Problem) -> dict[tuple[int, int], Table]:
    """One table per pair of variables (by index, ascending): the sum of all between them."""
    merged: dict[tuple[int, int], Table] = {}
    for factor in problem.factors:
        pair = (problem.index(factor.first), problem.index(factor.second))
        table = factor.table
        if pair[0] > pair[1]:
            pair, table = (pair[1], pair[0]), table.T
        merged[pair] = merged[pair] + table if pair in merged else table
    return merged


def _succeeded(status: highspy.HighsStatus, what: str) -> None:
    if status == highspy.HighsStatus.kError:
        raise RuntimeError(f"HiGHS refused {what}")
