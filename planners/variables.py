"""What is chosen, and what choices cost: variables, and factors that join several of them."""

from __future__ import annotations

from dataclasses import dataclass

from planners.tables import Alternative, Checker, Prices, Table

__all__ = ["Factor", "Variable", "checked_factor", "checked_variable", "title"]


@dataclass(frozen=True, slots=True, eq=False)
class Variable:
    """A choice between `len(unary)` states; unary[state] is the cost of the state by itself.

    usage: of each state, of what the problem limits; None is 0. alternatives: other ways to pay
    for each state, of which the cheapest counts (`Alternative`).
    """

    name: str
    unary: Table
    usage: Table | None = None
    alternatives: tuple[Alternative, ...] = ()

    @property
    def size(self) -> int:
        """How many states it has."""
        return len(self.unary)

    @property
    def prices(self) -> Prices:
        """All ways to pay for its states."""
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

    usage, alternatives: as of a variable, of the table's shape.
    """

    scope: tuple[str, ...]
    table: Table
    usage: Table | None = None
    alternatives: tuple[Alternative, ...] = ()

    @property
    def prices(self) -> Prices:
        """All ways to pay for its entries."""
        return Prices((Alternative(self.table, self.usage), *self.alternatives))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Factor):
            return NotImplemented
        return self.scope == other.scope and self.prices == other.prices

    def __hash__(self) -> int:
        return hash(self.scope)


def title(factor: Factor) -> str:
    """How errors call it."""
    return "factor between " + " and ".join(map(repr, factor.scope))


def checked_variable(variable: Variable, checker: Checker) -> Variable:
    """The variable with tables as they should be. Raises ValueError where they are not."""
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
    """The factor with tables of `shape`, as they should be. Raises ValueError where not."""
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
    return all(one is two for one, two in zip(ways, item.alternatives, strict=True))
