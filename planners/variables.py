"""Variables to choose a state for, and factors: cost tables over several of them."""

from __future__ import annotations

from dataclasses import dataclass

from planners.tables import Alternative, Checker, Prices, Table

__all__ = ["Factor", "Variable", "checked_factor", "checked_variable", "title"]


@dataclass(frozen=True, slots=True, eq=False)
class Variable:
    """A choice between `len(unary)` states, each with a cost and a usage of its own.

    name: unique in its problem. unary: vector of costs, unary[state] in the unit of the objective
    (seconds here); +inf forbids the state. usage: vector, what each state uses of the resource that
    the problem limits (bytes here); None stands for 0. alternatives: other ways to pay for every
    state, each a (cost, usage) pair of vectors; a solver takes the best one for each state.

    >>> import numpy as np
    >>> Variable("mlp", np.array([3.0, 1.0])).size
    2
    """

    name: str
    unary: Table
    usage: Table | None = None
    alternatives: tuple[Alternative, ...] = ()

    @property
    def size(self) -> int:
        """The number of states."""
        return len(self.unary)

    @property
    def prices(self) -> Prices:
        """All ways to pay for the states: the own tables first, then the alternatives."""
        return Prices((Alternative(self.unary, self.usage), *self.alternatives))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Variable):
            return NotImplemented
        return self.name == other.name and self.prices == other.prices

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A cost of several variables together: table[state of scope[0], state of scope[1], ...].

    scope: names of two or more variables, each once. table: one axis per variable of the scope, in
    that order; +inf forbids a combination. usage, alternatives: as of a variable, of the table's
    shape. Several factors of one scope add up.

    >>> import numpy as np
    >>> Factor(("a", "b"), np.zeros((2, 3))).prices.ways[0].cost.shape
    (2, 3)
    """

    scope: tuple[str, ...]
    table: Table
    usage: Table | None = None
    alternatives: tuple[Alternative, ...] = ()

    @property
    def prices(self) -> Prices:
        """All ways to pay for the entries: the own tables first, then the alternatives."""
        return Prices((Alternative(self.table, self.usage), *self.alternatives))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Factor):
            return NotImplemented
        return self.scope == other.scope and self.prices == other.prices

    def __hash__(self) -> int:
        # Content is compared, but hashing it would read every entry: the scope tells factors apart
        # well enough for a dictionary.
        return hash(self.scope)


def title(factor: Factor) -> str:
    """Return the words by which error messages name a factor."""
    return "factor between " + " and ".join(map(repr, factor.scope))


def checked_variable(variable: Variable, checker: Checker) -> Variable:
    """Return the variable with its tables as read-only float64 arrays.

    checker: shared by one problem, so that an array used by many variables is examined once.
    Returns `variable` itself where nothing had to be converted. Raises ValueError for a unary table
    that is no vector, is empty, or holds NaN or -inf, and for a usage or an alternative of another
    shape.
    """
    what = f"unary table of {variable.name!r}"
    unary = checker.cost(variable.unary, what)
    if unary.ndim != 1 or not len(unary):
        raise ValueError(
            f"{what} must be a vector with one entry per state, not of shape {unary.shape}"
        )
    usage = checker.usage(variable.usage, unary.shape, f"usage of {variable.name!r}")
    ways = checker.alternatives(variable.alternatives, unary.shape, what)
    if unary is variable.unary and usage is variable.usage and _same_ways(ways, variable):
        return variable
    return Variable(variable.name, unary, usage, ways)


def checked_factor(factor: Factor, shape: tuple[int, ...], checker: Checker) -> Factor:
    """Return the factor with its tables as read-only float64 arrays.

    shape: the number of states of each variable of the scope. Returns `factor` itself where nothing
    had to be converted. Raises ValueError for a scope of fewer than two variables or with one
    twice, and for a table of another shape or with NaN or -inf.
    """
    what = title(factor)
    if len(shape) < 2 or len(dict.fromkeys(factor.scope)) < len(shape):
        raise ValueError(
            f"{what}: the scope must be two or more variables, each once;"
            " add to the unary table what concerns one alone"
        )
    table = checker.cost(factor.table, what)
    if table.shape != shape:
        raise ValueError(f"{what}: table has shape {table.shape}, not {shape}")
    usage = checker.usage(factor.usage, shape, f"usage of {what}")
    ways = checker.alternatives(factor.alternatives, shape, what)
    if table is factor.table and usage is factor.usage and _same_ways(ways, factor):
        return factor
    return Factor(factor.scope, table, usage, ways)


def _same_ways(ways: tuple[Alternative, ...], item: Variable | Factor) -> bool:
    """Say whether checking left every alternative the object that it was."""
    return all(one is two for one, two in zip(ways, item.alternatives, strict=True))
