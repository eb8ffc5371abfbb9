"""The numbers-only planning problem: variables, cost tables over one or several of them, a limit.

An assignment gives every variable one state. Its cost is the sum of one entry of every table, and
+inf marks what is not allowed; its usage is the sum of the same entries of the tables' usages.
The solvers look for an assignment of least cost whose usage is within the limit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from planners.tables import Alternative, Checker, Prices, Table
from planners.variables import Factor, Variable, checked_factor, checked_variable, title

__all__ = ["Multiplier", "Problem", "Spent"]


# What a unit of usage counts: the same for all tables, or one for each (variables come first).
Multiplier = float | Sequence[float]

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Spent:
    """What an assignment costs and uses, and which way of paying each table took.

    variable_alternatives, factor_alternatives: parallel to the problem's variables and factors; 0
    is the table itself, i + 1 is alternatives[i].
    """

    cost: float
    usage: float
    variable_alternatives: tuple[int, ...]
    factor_alternatives: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Find the assignment of least cost within the limit; frozen, compares by content.

    variables: in the order that breaks ties. factors: several of the same scope add up. limit: of
    the usage of an assignment; None for none.
    Tables are float64 (anything else is converted), may hold +inf, and are kept by reference, as
    read-only views: layers that repeat share them. Do not change a table after it was handed in.
    Usage is finite everywhere.
    Raises ValueError for a duplicate or unknown name, a factor of fewer than two variables or
    twice of the same, an empty variable, a wrong shape, NaN, -inf, or an infinite usage.
    """

    variables: tuple[Variable, ...]
    factors: tuple[Factor, ...] = ()
    limit: float | None = None
    _index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.limit is not None and math.isnan(self.limit):
            raise ValueError("the limit is NaN")
        checker = Checker()
        index: dict[str, int] = {}
        variables = []
        for variable in self.variables:
            if variable.name in index:
                raise ValueError(f"variable {variable.name!r} is declared twice")
            index[variable.name] = len(index)
            variables.append(checked_variable(variable, checker))
        sizes = [variable.size for variable in variables]
        factors = []
        for factor in self.factors:
            shape = []
            for name in factor.scope:
                if name not in index:
                    raise ValueError(f"{title(factor)}: unknown variable {name!r}")
                shape.append(sizes[index[name]])
            factors.append(checked_factor(factor, tuple(shape), checker))
        object.__setattr__(self, "variables", tuple(variables))
        object.__setattr__(self, "factors", tuple(factors))
        object.__setattr__(self, "_index", index)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all variables, in order."""
        return tuple(variable.name for variable in self.variables)

    @property
    def plain(self) -> bool:
        """Whether there are only costs: no usage, no alternatives, no limit."""
        return self.limit is None and not any(
            item.usage is not None or item.alternatives
            for group in (self.variables, self.factors)
            for item in group
        )

    def variable(self, name: str) -> Variable:
        """The variable of that name; raises ValueError if there is none."""
        return self.variables[self.index(name)]

    def index(self, name: str) -> int:
        """The variable's place in `variables`; raises ValueError if there is none of that name."""
        if name not in self._index:
            raise ValueError(f"unknown variable {name!r}")
        return self._index[name]

    @property
    def most(self) -> float:
        """The largest usage that counts as within the limit: a rounding error above it."""
        return math.inf if self.limit is None else self.limit + _ROUNDING * abs(self.limit)

    def fits(self, usage: float) -> bool:
        """Whether a usage is within the limit."""
        return usage <= self.most

    def scopes(self) -> list[tuple[int, ...]]:
        """Of every factor, as indices of variables."""
        index = self._index
        return [tuple([index[name] for name in factor.scope]) for factor in self.factors]

    def cost(self, assignment: Mapping[str, int]) -> float:
        """The cost of a complete assignment, summed from scratch and without rounding on the way.

        Every table takes its cheapest alternative. Raises ValueError for a name that is missing or
        unknown and for a state out of range.
        """
        return math.fsum(self.terms(assignment))

    def terms(self, assignment: Mapping[str, int]) -> list[float]:
        """What every table (unary ones first) adds to the cost; errors as in `cost`."""
        terms = []
        for item, entry in self._entries(assignment):
            table = item.unary if isinstance(item, Variable) else item.table
            if item.alternatives:
                terms.append(min(cost for cost, _ in item.prices.at(entry)))
            else:
                terms.append(float(table[entry]))
        return terms

    def spent(self, assignment: Mapping[str, int], multiplier: Multiplier = 0.0) -> Spent:
        """Cost and usage of an assignment; every table takes its best alternative.

        The best is that of least cost + multiplier * usage. Errors as in `cost`.
        """
        costs, usages, picked = [], [], []
        entries = self._entries(assignment)
        for (item, entry), own in zip(entries, self._multipliers(multiplier), strict=True):
            if item.alternatives:
                prices = item.prices
                way = prices.pick(entry, own)
                table, usage = prices.ways[way].cost, prices.ways[way].usage
            else:
                way, usage = 0, item.usage
                table = item.unary if isinstance(item, Variable) else item.table
            picked.append(way)
            costs.append(float(table[entry]))
            if usage is not None:
                usages.append(float(usage[entry]))
        split = len(self.variables)
        return Spent(
            math.fsum(costs), math.fsum(usages), tuple(picked[:split]), tuple(picked[split:])
        )

    def _entries(
        self, assignment: Mapping[str, int]
    ) -> list[tuple[Variable | Factor, tuple[int, ...]]]:
        """Every variable and factor with the entry of its tables that the assignment takes."""
        if len(assignment) != len(self._index):
            for name in assignment:
                self.index(name)
        entries: list[tuple[Variable | Factor, tuple[int, ...]]] = []
        for variable in self.variables:
            if variable.name not in assignment:
                raise ValueError(f"the assignment lacks variable {variable.name!r}")
            entries.append((variable, (self._state(variable, assignment[variable.name]),)))
        for factor in self.factors:
            entries.append((factor, tuple([assignment[name] for name in factor.scope])))
        return entries

    def weighed(self, multiplier: Multiplier) -> "Problem":
        """The plain problem of least cost + multiplier * usage, over all alternatives.

        Tables that are shared stay shared (those of one multiplier), and those without usage stay
        as they are.
        """
        multipliers = self._multipliers(multiplier)
        made: dict[tuple[tuple[int, ...], float], Table] = {}

        def table(item: Variable | Factor, own: float) -> Table:
            prices = item.prices
            key = (prices.key, own)
            if key not in made:
                made[key] = _read_only(prices.weighed(own))
            return made[key]

        return self._replaced(
            tuple(
                Variable(v.name, table(v, own)) if v.usage is not None or v.alternatives else v
                for v, own in zip(self.variables, multipliers, strict=False)
            ),
            tuple(
                Factor(f.scope, table(f, own)) if f.usage is not None or f.alternatives else f
                for f, own in zip(self.factors, multipliers[len(self.variables) :], strict=True)
            ),
        )

    def usage_alone(self) -> "Problem":
        """The plain problem of least usage; what is forbidden stays so."""
        made: dict[tuple[int, ...], Table] = {}

        def table(prices: Prices) -> Table:
            key = prices.key
            if key not in made:
                made[key] = _read_only(prices.usages())
            return made[key]

        return self._replaced(
            tuple(Variable(v.name, table(v.prices)) for v in self.variables),
            tuple(Factor(f.scope, table(f.prices)) for f in self.factors),
        )

    def _multipliers(self, multiplier: Multiplier) -> Sequence[float]:
        """Of every table."""
        if isinstance(multiplier, float | int):
            return [multiplier] * (len(self.variables) + len(self.factors))
        return multiplier

    def _replaced(self, variables: tuple[Variable, ...], factors: tuple[Factor, ...]) -> "Problem":
        """Without a limit and with other tables, which are known to be as they should."""
        problem = object.__new__(Problem)
        for name, value in (
            ("variables", variables),
            ("factors", factors),
            ("limit", None),
            ("_index", self._index),
        ):
            object.__setattr__(problem, name, value)
        return problem

    def with_unary(self, unaries: Mapping[str, Table]) -> "Problem":
        """The same problem with other unary tables for some variables; their usage stays.

        Where a new table is +inf, the variable's alternatives are forbidden too.
        """
        variables = list(self.variables)
        for name, unary in unaries.items():
            variable = self.variable(name)
            ways = tuple(
                Alternative(np.where(np.isinf(unary), np.inf, way.cost), way.usage)
                for way in variable.alternatives
            )
            variables[self.index(name)] = replace(variable, unary=unary, alternatives=ways)
        return replace(self, variables=tuple(variables))

    def pinned(self, assignment: Mapping[str, int]) -> "Problem":
        """The same problem with some variables fixed: their other states cost +inf.

        Raises ValueError for an unknown name and for a state out of range.
        """
        variables = list(self.variables)
        for name, state in assignment.items():
            variable = self.variable(name)
            state = self._state(variable, state)
            others = np.arange(variable.size) != state
            variables[self.index(name)] = Variable(
                name,
                np.where(others, np.inf, variable.unary),
                variable.usage,
                tuple(
                    Alternative(np.where(others, np.inf, way.cost), way.usage)
                    for way in variable.alternatives
                ),
            )
        return replace(self, variables=tuple(variables))

    def restricted(self, states: Mapping[str, NDArray[np.intp]]) -> "Problem":
        """The same problem with some states of some variables alone, in the order given.

        State i of a variable of the result is state states[name][i] of this problem's. Tables that
        are shared stay shared where the states are equal. Raises ValueError for an unknown name.
        """
        kept: dict[str, tuple[NDArray[np.intp], bytes]] = {}
        for name, own in states.items():
            self.index(name)
            kept[name] = (own, own.tobytes())
        made: dict[tuple[int, tuple[bytes, ...]], Table] = {}

        def part(array: Table, scope: tuple[str, ...]) -> Table:
            if not any(name in kept for name in scope):
                return array
            key = (id(array), tuple(kept[name][1] if name in kept else b"" for name in scope))
            if key not in made:
                indices = [
                    kept[name][0] if name in kept else np.arange(size)
                    for name, size in zip(scope, array.shape, strict=True)
                ]
                made[key] = _read_only(array[np.ix_(*indices)])
            return made[key]

        def parts(
            item: Variable | Factor, scope: tuple[str, ...]
        ) -> tuple[Table | None, tuple[Alternative, ...]]:
            usage = None if item.usage is None else part(item.usage, scope)
            ways = tuple(
                Alternative(
                    part(way.cost, scope), None if way.usage is None else part(way.usage, scope)
                )
                for way in item.alternatives
            )
            return usage, ways

        problem = self._replaced(
            tuple(
                Variable(v.name, part(v.unary, (v.name,)), *parts(v, (v.name,)))
                for v in self.variables
            ),
            tuple(
                Factor(f.scope, part(f.table, f.scope), *parts(f, f.scope)) for f in self.factors
            ),
        )
        object.__setattr__(problem, "limit", self.limit)
        return problem

    def text(self) -> str:
        """Two lines: how many variables, states, factors and distinct tables; one for a limit."""
        sizes = [variable.size for variable in self.variables] or [0]
        scopes = dict.fromkeys(tuple(sorted(factor.scope)) for factor in self.factors)
        prices = [item.prices for group in (self.variables, self.factors) for item in group]
        arrays = [
            array
            for each in prices
            for way in each.ways
            for array in (way.cost, way.usage)
            if array is not None
        ]
        distinct = {id(array): array for array in arrays}
        nbytes = sum(array.nbytes for array in distinct.values())
        mean = sum(sizes) / len(sizes)
        limit = "" if self.limit is None else f"\nusage of at most {self.limit:.9g}"
        return (
            f"{len(self.variables)} variables of {min(sizes)} to {max(sizes)} states"
            f" (mean {mean:.1f})\n"
            f"{len(self.factors)} factors between {len(scopes)} groups;"
            f" {len(distinct)} distinct tables, {nbytes / 2**20:.2f} MiB{limit}"
        )

    @staticmethod
    def _state(variable: Variable, state: int) -> int:
        if not 0 <= state < variable.size:
            raise ValueError(
                f"state {state} of {variable.name!r} is out of range: it has {variable.size}"
            )
        return state


def _read_only(table: Table) -> Table:
    table = table.view()
    table.flags.writeable = False
    return table
