"""The numbers-only planning problem: a network of variables, unary and pairwise cost tables.

An assignment gives every variable one state. Its cost is the sum of one entry of every table, and
+inf marks what is not allowed. The solvers look for an assignment of least cost.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]


class InfeasibleError(ValueError):
    """No assignment has a finite cost.

    variables: a few variables that cannot agree even when all others are left out; empty when the
    solver has no cheap way to tell which.
    """

    def __init__(self, variables: tuple[str, ...] = ()) -> None:
        self.variables = variables
        what = "no assignment has a finite cost"
        if variables:
            shown = ", ".join(variables[:12]) + (", ..." if len(variables) > 12 else "")
            what += f": {len(variables)} variables cannot agree: {shown}"
        super().__init__(what)


def _same(first: Table, second: Table) -> bool:
    return first is second or np.array_equal(first, second)


@dataclass(frozen=True, slots=True, eq=False)
class Variable:
    """A choice between `len(unary)` states; unary[state] is the cost of the state by itself."""

    name: str
    unary: Table

    @property
    def size(self) -> int:
        """How many states it has."""
        return len(self.unary)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Variable):
            return NotImplemented
        return self.name == other.name and _same(self.unary, other.unary)

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A cost of two variables together: table[state of first, state of second]."""

    first: str
    second: str
    table: Table

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Factor):
            return NotImplemented
        same_names = (self.first, self.second) == (other.first, other.second)
        return same_names and _same(self.table, other.table)

    def __hash__(self) -> int:
        return hash((self.first, self.second))


@dataclass(frozen=True, slots=True)
class Problem:
    """Find the assignment of least cost; frozen, compares by content.

    variables: in the order that breaks ties. factors: several between the same pair add up.
    Tables are float64 (anything else is converted), may hold +inf, and are kept by reference, as
    read-only views: layers that repeat share them. Do not change a table after it was handed in.
    Raises ValueError for a duplicate or unknown name, a factor of a variable with itself, an empty
    variable, a wrong shape, NaN or -inf.
    """

    variables: tuple[Variable, ...]
    factors: tuple[Factor, ...] = ()
    _index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checked: dict[int, Table] = {}
        index: dict[str, int] = {}
        variables = []
        for variable in self.variables:
            if variable.name in index:
                raise ValueError(f"variable {variable.name!r} is declared twice")
            index[variable.name] = len(index)
            unary = _checked(variable.unary, f"unary table of {variable.name!r}", checked)
            if unary.ndim != 1 or not len(unary):
                raise ValueError(
                    f"unary table of {variable.name!r} must be a vector with one entry per state,"
                    f" not of shape {unary.shape}"
                )
            same = unary is variable.unary
            variables.append(variable if same else Variable(variable.name, unary))
        factors = []
        for factor in self.factors:
            what = f"factor between {factor.first!r} and {factor.second!r}"
            for name in (factor.first, factor.second):
                if name not in index:
                    raise ValueError(f"{what}: unknown variable {name!r}")
            if factor.first == factor.second:
                raise ValueError(f"{what}: add the diagonal to the unary table instead")
            table = _checked(factor.table, what, checked)
            shape = (variables[index[factor.first]].size, variables[index[factor.second]].size)
            if table.shape != shape:
                raise ValueError(f"{what}: table has shape {table.shape}, not {shape}")
            same = table is factor.table
            factors.append(factor if same else Factor(factor.first, factor.second, table))
        object.__setattr__(self, "variables", tuple(variables))
        object.__setattr__(self, "factors", tuple(factors))
        object.__setattr__(self, "_index", index)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all variables, in order."""
        return tuple(variable.name for variable in self.variables)

    def variable(self, name: str) -> Variable:
        """The variable of that name; raises ValueError if there is none."""
        return self.variables[self.index(name)]

    def index(self, name: str) -> int:
        """The variable's place in `variables`; raises ValueError if there is none of that name."""
        if name not in self._index:
            raise ValueError(f"unknown variable {name!r}")
        return self._index[name]

    def cost(self, assignment: Mapping[str, int]) -> float:
        """The cost of a complete assignment, summed from scratch and without rounding on the way.

        Raises ValueError for a name that is missing or unknown and for a state out of range.
        """
        return math.fsum(self.terms(assignment))

    def terms(self, assignment: Mapping[str, int]) -> list[float]:
        """What every table (unary ones first) adds to the cost; errors as in `cost`."""
        if len(assignment) != len(self._index):
            for name in assignment:
                self.index(name)
        terms = []
        for variable in self.variables:
            if variable.name not in assignment:
                raise ValueError(f"the assignment lacks variable {variable.name!r}")
            terms.append(float(variable.unary[self._state(variable, assignment[variable.name])]))
        for factor in self.factors:
            entry = factor.table[assignment[factor.first], assignment[factor.second]]
            terms.append(float(entry))
        return terms

    def with_unary(self, unaries: Mapping[str, Table]) -> "Problem":
        """The same problem with other unary tables for some variables."""
        variables = list(self.variables)
        for name, unary in unaries.items():
            variables[self.index(name)] = Variable(name, unary)
        return Problem(tuple(variables), self.factors)

    def pinned(self, assignment: Mapping[str, int]) -> "Problem":
        """The same problem with some variables fixed: their other states cost +inf.

        Raises ValueError for an unknown name and for a state out of range.
        """
        unaries = {}
        for name, state in assignment.items():
            variable = self.variable(name)
            state = self._state(variable, state)
            unaries[name] = np.full(variable.size, np.inf)
            unaries[name][state] = variable.unary[state]
        return self.with_unary(unaries)

    def text(self) -> str:
        """Two lines: how many variables, states, factors and distinct tables."""
        sizes = [variable.size for variable in self.variables] or [0]
        pairs = dict.fromkeys(tuple(sorted((f.first, f.second))) for f in self.factors)
        arrays = [v.unary for v in self.variables] + [f.table for f in self.factors]
        distinct = {id(array): array for array in arrays}
        nbytes = sum(array.nbytes for array in distinct.values())
        mean = sum(sizes) / len(sizes)
        return (
            f"{len(self.variables)} variables of {min(sizes)} to {max(sizes)} states"
            f" (mean {mean:.1f})\n"
            f"{len(self.factors)} factors between {len(pairs)} pairs;"
            f" {len(distinct)} distinct tables, {nbytes / 2**20:.2f} MiB"
        )

    @staticmethod
    def _state(variable: Variable, state: int) -> int:
        if not 0 <= state < variable.size:
            raise ValueError(
                f"state {state} of {variable.name!r} is out of range: it has {variable.size}"
            )
        return state


@dataclass(frozen=True, slots=True)
class Solution:
    """A complete assignment and what is proven about it.

    cost: of the assignment, from `Problem.cost`. lower_bound: no assignment costs less, up to
    rounding. method: the solver's name in words.
    """

    assignment: Mapping[str, int]
    cost: float
    lower_bound: float
    method: str

    @property
    def gap(self) -> float:
        """How much an optimal assignment could cost less, at most; 0 when proven optimal."""
        return max(0.0, self.cost - self.lower_bound)

    def text(self) -> str:
        """One line: cost, bound, gap and method."""
        return (
            f"cost {self.cost:.9g}, bound {self.lower_bound:.9g}, gap {self.gap:.3g}"
            f" ({self.method}, {len(self.assignment)} variables)"
        )


def _checked(array: object, what: str, checked: dict[int, Table]) -> Table:
    """A read-only float64 view of the array; each distinct array object is looked at once."""
    known = checked.get(id(array))
    if known is not None:
        return known
    table = cast(Table, np.asarray(array, dtype=np.float64))
    if np.isnan(table).any():
        raise ValueError(f"{what} holds NaN")
    if (table == -np.inf).any():
        raise ValueError(f"{what} holds -inf")
    if table.flags.writeable:
        table = table.view()
        table.flags.writeable = False
    # The caller's tuple keeps `array` alive while `checked` is in use, so its id is not reused.
    checked[id(array)] = table
    return table
