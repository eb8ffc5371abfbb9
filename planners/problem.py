"""The numbers-only planning problem: variables, cost tables over one or several of them, a limit.

An assignment gives every variable one state. Its cost is the sum of one entry of every table, and
+inf marks combinations that are forbidden; its usage is the sum of the same entries of the tables'
usages. The solvers look for an assignment of least cost whose usage is within the limit.
"""

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from planners.alike_tables import (
    Alike,
    AlikeTables,
    Multiplier,
    Numbers,
    best_ways,
    in_one_way,
    paid,
)
from planners.tables import Alternative, Checker, Prices, Table, read_only
from planners.variables import Factor, Variable, checked_factor, checked_variable, title

__all__ = ["Problem", "Spent"]


# A sum of usages may exceed the limit by this share of it: usages are sums of thousands of floats.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Spent:
    """The cost and the usage of an assignment, and the way by which each table was paid.

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

    variables: in the order that breaks ties, best that of the computation. factors: cost tables
    over several variables; those of the same scope add up. limit: the largest usage that an
    assignment may have; None for no limit.
    Tables are float64 (anything else is converted), may hold +inf, and are kept by reference, as
    read-only views: layers that repeat share them. Do not change a table after it was handed in.
    Usage is finite everywhere.
    Raises ValueError for a duplicate or unknown name, a factor of fewer than two variables or twice
    of the same, an empty variable, a wrong shape, NaN, -inf, or an infinite usage.

    >>> a = Variable("a", np.array([0.0, 1.0]))
    >>> b = Variable("b", np.array([2.0, 0.0]))
    >>> problem = Problem((a, b), (Factor(("a", "b"), np.array([[0.0, 5.0], [5.0, 0.0]])),))
    >>> problem.cost({"a": 1, "b": 1})
    1.0
    """

    variables: tuple[Variable, ...]
    factors: tuple[Factor, ...] = ()
    limit: float | None = None
    _index: dict[str, int] = field(init=False, repr=False, compare=False)
    _alike: AlikeTables = field(init=False, repr=False, compare=False)

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
        object.__setattr__(self, "_alike", AlikeTables(self.variables, self.factors, index))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all variables, in order."""
        return tuple(variable.name for variable in self.variables)

    @property
    def plain(self) -> bool:
        """True if there are only costs: no usage, no alternatives, no limit."""
        return self.limit is None and not any(
            item.usage is not None or item.alternatives
            for group in (self.variables, self.factors)
            for item in group
        )

    def variable(self, name: str) -> Variable:
        """Return the variable of that name. Raises ValueError if there is none."""
        return self.variables[self.index(name)]

    def index(self, name: str) -> int:
        """Return the place of a variable in `variables`. Raises ValueError for an unknown name."""
        if name not in self._index:
            raise ValueError(f"unknown variable {name!r}")
        return self._index[name]

    @property
    def most(self) -> float:
        """The largest usage within the limit, a rounding error above it; +inf without limit."""
        return math.inf if self.limit is None else self.limit + _ROUNDING * abs(self.limit)

    def fits(self, usage: float) -> bool:
        """Say whether a usage is within the limit."""
        return usage <= self.most

    def within(self, limit: float | None) -> "Problem":
        """Return the same problem with another limit, whose tables need not be examined again.

        >>> Problem((Variable("a", np.zeros(2)),)).within(3.0).limit
        3.0
        """
        if limit is not None and math.isnan(limit):
            raise ValueError("the limit is NaN")
        other = copy(self)
        object.__setattr__(other, "limit", limit)
        return other

    def scopes(self) -> list[tuple[int, ...]]:
        """Return the scope of every factor, as indices of variables; the list is not to change."""
        return self._alike.scopes

    def cost(self, assignment: Mapping[str, int]) -> float:
        """Return the cost of a complete assignment, without rounding on the way (math.fsum).

        Every table is paid in its cheapest way. Raises ValueError for a name that is missing or
        unknown and for a state out of range.
        """
        return math.fsum(self.terms(assignment))

    def terms(self, assignment: Mapping[str, int]) -> list[float]:
        """Return the summand of every table (unary ones first); errors as in `cost`."""
        states, groups = self.states(assignment), self.alike()
        count = len(self.variables) + len(self.factors)
        # Without a charge for usage, the best way is the cheapest.
        costs, _ = paid(groups, states, best_ways(groups, states, 0.0, count), count)
        terms: list[float] = costs.tolist()
        return terms

    def spent(self, assignment: Mapping[str, int], multiplier: Multiplier = 0.0) -> Spent:
        """Return cost and usage of an assignment, with every table paid in its best way.

        multiplier: the best way is that of least cost + multiplier * usage. Errors as in `cost`.

        >>> recompute = Alternative(np.array([2.0]), np.array([0.0]))
        >>> kept = Variable("activation", np.array([1.0]), np.array([8.0]), (recompute,))
        >>> Problem((kept,)).spent({"activation": 0}, multiplier=1.0)
        Spent(cost=2.0, usage=0.0, variable_alternatives=(1,), factor_alternatives=())
        """
        states, groups = self.states(assignment), self.alike()
        split, count = len(self.variables), len(self.variables) + len(self.factors)
        chosen = best_ways(groups, states, multiplier, count)
        costs, usages = paid(groups, states, chosen, count)
        ways = tuple(chosen.tolist())
        return Spent(
            math.fsum(costs.tolist()), math.fsum(usages.tolist()), ways[:split], ways[split:]
        )

    def states(self, assignment: Mapping[str, int]) -> Numbers:
        """Return the states of all variables, by place; errors as in `cost`."""
        # A name too many is found here; a name too few is found below.
        if len(assignment) != len(self._index):
            for name in assignment:
                self.index(name)
        try:
            states = np.array([assignment[name] for name in self._index], dtype=np.intp)
        except KeyError as error:
            raise ValueError(f"the assignment lacks variable {error.args[0]!r}") from None
        for group in self._alike.of_variables:
            own = states[group.numbers]
            for place in group.numbers[(own < 0) | (own >= len(group.ways[0].cost))][:1]:
                self._state(self.variables[place], int(states[place]))
        return states

    def alike(self) -> tuple[Alike, ...]:
        """Return all tables in groups of the same arrays, unary ones first."""
        return self._alike.of_variables + self._alike.of_factors

    def weighed(self, multiplier: Multiplier) -> "Problem":
        """Return the plain problem whose tables are the least of cost + multiplier * usage.

        The optimum of the result is the Lagrangian dual at that multiplier (plus multiplier *
        limit). Tables that are shared stay shared (those of one multiplier), and those without
        usage stay as they are.

        >>> layer = Variable("layer", np.array([1.0, 3.0]), np.array([4.0, 0.0]))
        >>> Problem((layer,)).weighed(1.0).variables[0].unary
        array([5., 3.])
        """

        def weighed(group: Alike, price: float) -> Table | None:
            if len(group.ways) == 1 and group.ways[0].usage is None:
                return None
            return Prices(group.ways).weighed(price)

        return self._in_one_way(weighed, multiplier)

    def usage_alone(self) -> "Problem":
        """Return the plain problem of least usage; forbidden entries stay forbidden."""
        return self._in_one_way(lambda group, _: Prices(group.ways).usages(), 0.0)

    def _in_one_way(
        self, table_of: Callable[[Alike, float], Table | None], multiplier: Multiplier
    ) -> "Problem":
        """Return the plain problem with another table for each of those that are alike.

        table_of: of such tables and the multiplier that they have in common; None where they stay.
        """
        split = len(self.variables)
        tables, groups = in_one_way(self.alike(), table_of, multiplier, split + len(self.factors))
        if all(table is None for table in tables):
            return self.within(None)
        problem = self.with_tables(
            tuple(
                v if t is None else Variable(v.name, t)
                for v, t in zip(self.variables, tables, strict=False)
            ),
            tuple(
                f if t is None else Factor(f.scope, t)
                for f, t in zip(self.factors, tables[split:], strict=True)
            ),
        )
        of_variables = [group for group in groups if group.numbers[0] < split]
        problem._alike.of_variables = tuple(of_variables)
        problem._alike.of_factors = tuple(groups[len(of_variables) :])
        return problem

    def with_tables(
        self, variables: tuple[Variable, ...], factors: tuple[Factor, ...]
    ) -> "Problem":
        """Return the problem without a limit and with other tables, which need no checking.

        variables, factors: of the same names, numbers of states and scopes, with tables such as a
        problem that was checked has.
        """
        # The constructor would examine all tables again.
        problem = object.__new__(Problem)
        alike = AlikeTables(variables, factors, self._index)
        alike.scopes = self._alike.scopes
        if factors is self.factors:
            alike.of_factors = self._alike.of_factors
        for name, value in (
            ("variables", variables),
            ("factors", factors),
            ("limit", None),
            ("_index", self._index),
            ("_alike", alike),
        ):
            object.__setattr__(problem, name, value)
        return problem

    def with_unary(self, unaries: Mapping[str, Table]) -> "Problem":
        """Return the same problem with other unary tables for some variables; their usage stays.

        unaries: by variable name, a vector with one cost per state. Where a new table is +inf, the
        variable's alternatives are forbidden too. Raises ValueError for an unknown name or a wrong
        shape.
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

    def among(self, states: Mapping[str, NDArray[np.bool_]]) -> "Problem":
        """Return the same problem with only some states of some variables; others cost +inf.

        states: by variable name, whether each state is kept; equal ones best the same array, so
        that tables which are shared stay shared. Raises ValueError for an unknown name.

        >>> free = Problem((Variable("a", np.array([0.0, 1.0])),))
        >>> free.among({"a": np.array([False, True])}).variables[0].unary
        array([inf,  1.])
        """
        for name in states:
            self.index(name)
        tables: dict[tuple[int, int], Table] = {}

        def forbid(variable: Variable) -> Variable:
            kept = states.get(variable.name)
            if kept is None:
                return variable

            def least(table: Table) -> Table:
                key = (id(table), id(kept))
                if key not in tables:
                    tables[key] = read_only(np.where(kept, table, np.inf))
                return tables[key]

            ways = tuple(Alternative(least(way.cost), way.usage) for way in variable.alternatives)
            return Variable(variable.name, least(variable.unary), variable.usage, ways)

        problem = self.with_tables(tuple(map(forbid, self.variables)), self.factors)
        object.__setattr__(problem, "limit", self.limit)
        return problem

    def pinned(self, assignment: Mapping[str, int]) -> "Problem":
        """Return the same problem with some variables fixed: their other states cost +inf.

        assignment: the state of each variable to fix, by name. Raises ValueError for an unknown
        name and for a state out of range.

        >>> free = Problem((Variable("a", np.array([0.0, 1.0])),))
        >>> free.pinned({"a": 1}).variables[0].unary
        array([inf, 1.])
        """
        variables = list(self.variables)
        for name, state in assignment.items():
            variable = self.variable(name)
            state = self._state(variable, state)
            others = np.arange(variable.size) != state
            # States are forbidden, not removed: the numbers of states keep their meaning for the
            # caller.
            variables[self.index(name)] = Variable(
                name,
                read_only(np.where(others, np.inf, variable.unary)),
                variable.usage,
                tuple(
                    Alternative(read_only(np.where(others, np.inf, way.cost)), way.usage)
                    for way in variable.alternatives
                ),
            )
        problem = self.with_tables(tuple(variables), self.factors)
        object.__setattr__(problem, "limit", self.limit)
        return problem

    def restricted(self, states: Mapping[str, NDArray[np.intp]]) -> "Problem":
        """Return the same problem with only some states of some variables, in the order given.

        states: by variable name, the numbers of the states to keep. State i of a variable of the
        result is state states[name][i] of this problem's. Tables that are shared stay shared where
        the states are equal. Raises ValueError for an unknown name.
        """
        selections: dict[str, tuple[NDArray[np.intp], bytes]] = {}
        for name, selection in states.items():
            self.index(name)
            selections[name] = (selection, selection.tobytes())
        parts_of_tables: dict[tuple[int, tuple[bytes, ...]], Table] = {}

        def part(array: Table, scope: tuple[str, ...]) -> Table:
            if not any(name in selections for name in scope):
                return array
            key = (
                id(array),
                tuple(selections[name][1] if name in selections else b"" for name in scope),
            )
            if key not in parts_of_tables:
                indices = [
                    selections[name][0] if name in selections else np.arange(size)
                    for name, size in zip(scope, array.shape, strict=True)
                ]
                parts_of_tables[key] = read_only(array[np.ix_(*indices)])
            return parts_of_tables[key]

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

        # A part of a checked table needs no checking, and neither does its usage.
        problem = self.with_tables(
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
        """Return two lines: the numbers of variables, states, factors and tables; and the limit."""
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
