"""The steps of an elimination by name: what goes into each, and what the whole of them takes.

Steps that will give the same table have the same recipe. Which tables are the same differs from
problem to problem; what is added up for which variable follows from the form of the network and the
order alone. That is told once, in an outline, and problems of the same form fill in their tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from planners.reduction import Network
from planners.table_memo import Form, Operand

__all__ = ["KnownOrder", "Orders", "Outline", "Recipe", "Schedule", "Step"]

# Predicted cost of a step, in table entries read: this fixed part and the entries of its tables.
_ENTRIES_PER_STEP = 10_000


@dataclass(frozen=True, slots=True)
class Recipe:
    """One step of elimination up to renaming: the tables to add up, over one joint shape.

    operands: tables with the axes of the joint table that they lie along; a table's number is one
    of the network's, or -1 - r for the result of recipe r. shape: of the joint table; axis 0 is the
    variable that is eliminated, and the result has the other axes.
    """

    operands: tuple[Operand, ...]
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """The number of entries of the resulting table."""
        return math.prod(self.shape[1:])

    @property
    def work(self) -> int:
        """The table entries that are read: tables are added up from the smallest on, so that the
        sum grows as late as possible, and its least is taken.
        """
        shape = self.shape
        total = [1] * len(shape)
        read = math.prod(shape)
        for axes in sorted(
            (axes for _, axes in self.operands),
            key=lambda axes: math.prod([shape[axis] for axis in axes]),
        ):
            for axis in axes:
                total[axis] = shape[axis]
            read += math.prod(total)
        return read


@dataclass(frozen=True, slots=True)
class Step:
    """Eliminate one variable; the result is a table over its neighbours.

    variable: its index. scope: indices of the neighbours, ascending. recipe: number of the recipe.
    """

    variable: int
    scope: tuple[int, ...]
    recipe: int


@dataclass(frozen=True)
class Schedule:
    """The steps of elimination in order; they share recipes when the network repeats itself."""

    steps: tuple[Step, ...]
    recipes: tuple[Recipe, ...]

    @property
    def width(self) -> int:
        """The most variables that a step's result is a table over."""
        return max([len(step.scope) for step in self.steps], default=0)

    @cached_property
    def work(self) -> int:
        """The predicted cost of all distinct recipes, in table entries read."""
        return sum(_ENTRIES_PER_STEP + recipe.work for recipe in self.recipes)

    @cached_property
    def largest(self) -> int:
        """The entries of the largest resulting table."""
        return max([recipe.entries for recipe in self.recipes], default=0)

    @cached_property
    def entries(self) -> int:
        """The entries of all distinct resulting tables together."""
        return sum(recipe.entries for recipe in self.recipes)


@dataclass(frozen=True, slots=True)
class _Line:
    """A step of an outline. sources: places among the network's terms, or -1 - s for the result of
    step s, each with the axes of the joint table. Other fields: as of `Step` and `Recipe`.
    """

    variable: int
    scope: tuple[int, ...]
    shape: tuple[int, ...]
    sources: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(slots=True)
class Outline:
    """The steps of bucket elimination of all networks of one form, in one order.

    last: the numbers of the tables that a schedule was last told for, and that schedule.
    """

    lines: tuple[_Line, ...]
    last: tuple[tuple[int, ...], Schedule] | None = field(default=None, repr=False)

    @staticmethod
    def of(network: Network, order: list[int]) -> Outline:
        """Return the outline for the form of a network: every table waits in the bucket of the
        first of its variables to be eliminated, and so does every result.
        """
        sizes = network.sizes
        position = {variable: place for place, variable in enumerate(order)}
        buckets: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in order]
        for number, (scope, _) in enumerate(network.terms):
            buckets[min([position[variable] for variable in scope])].append((scope, number))
        lines: list[_Line] = []
        for variable, bucket in zip(order, buckets, strict=True):
            # A set is sorted at once, so that its order plays no part.
            others = {other for scope, _ in bucket for other in scope}
            others.discard(variable)
            scope = tuple(sorted(others))
            place = {variable: 0}
            for other in scope:
                place[other] = len(place)
            sources = [(source, tuple([place[v] for v in axes])) for axes, source in bucket]
            shape = (sizes[variable], *[sizes[other] for other in scope])
            if scope:
                result = scope, -1 - len(lines)
                buckets[min([position[other] for other in scope])].append(result)
            lines.append(_Line(variable, scope, shape, tuple(sources)))
        return Outline(tuple(lines))

    def schedule(self, network: Network) -> Schedule:
        """Return the schedule of a network of this form, by the numbers of its tables."""
        numbers = tuple([number for _, number in network.terms])
        if self.last is None or self.last[0] != numbers:
            self.last = numbers, self._scheduled(numbers)
        return self.last[1]

    def _scheduled(self, numbers: tuple[int, ...]) -> Schedule:
        """Return the schedule with these tables."""
        recipes: dict[tuple[tuple[Operand, ...], tuple[int, ...]], int] = {}
        of_step: list[int] = []
        steps = []
        for line in self.lines:
            operands = [
                (numbers[source] if source >= 0 else -1 - of_step[-1 - source], axes)
                for source, axes in line.sources
            ]
            operands.sort()
            recipe = recipes.setdefault((tuple(operands), line.shape), len(recipes))
            of_step.append(recipe)
            steps.append(Step(line.variable, line.scope, recipe))
        return Schedule(tuple(steps), tuple([Recipe(*recipe) for recipe in recipes]))


@dataclass(frozen=True, slots=True)
class KnownOrder:
    """An order of elimination that was taken. work: of the network that it was found for."""

    order: list[int]
    work: int
    outline: Outline


# The orders that were taken, by the form of the network and the scores that were tried.
Orders = dict[tuple[Form, tuple[str, ...]], KnownOrder]
