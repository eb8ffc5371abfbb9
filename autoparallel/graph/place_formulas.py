"""Formulas of values whose elements follow from their places alone, such as positions and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy

from autoparallel.graph.graph import Dim, size_expression

__all__ = ["Affine", "Bias", "Formula", "Fraction", "Truth", "changed", "in_shape", "is_zero"]


@dataclass(frozen=True, slots=True)
class Affine:
    """A whole number at each place: start + the sum of steps[dim] * place[dim].

    start: an expression in the sizes of inputs. steps: one for each dim of the value.

    >>> print(Affine(sympy.Integer(3), (0, 2)))
    3 + 2 p1
    """

    start: sympy.Expr
    steps: tuple[int, ...] = ()

    def __str__(self) -> str:
        rest = [f" + {step} p{dim}" for dim, step in enumerate(self.steps) if step]
        return f"{self.start}{''.join(rest)}"

    def plus(self, other: Affine, times: int = 1) -> Affine:
        """Return self + times * other, whose dims are aligned right as torch broadcasts."""
        rank = max(len(self.steps), len(other.steps))
        pairs = zip(self.wide(rank).steps, other.wide(rank).steps, strict=True)
        steps = tuple(one + times * two for one, two in pairs)
        return Affine((self.start + times * other.start).expand(), steps)

    def times(self, factor: int) -> Affine:
        """Return the number, multiplied."""
        return Affine(self.start * factor, tuple(step * factor for step in self.steps))

    def wide(self, rank: int) -> Affine:
        """Return the formula of a value that has so many dims: the new ones come first."""
        return Affine(self.start, (0,) * (rank - len(self.steps)) + self.steps)

    def is_constant(self) -> bool:
        """Return whether all places have one number."""
        return not any(self.steps)

    def least(self, shape: tuple[Dim, ...]) -> sympy.Expr:
        """Return the least number of a value of that shape."""
        ends = zip(self.steps, shape, strict=True)
        return self.start + sum(step * (size_expression(n) - 1) for step, n in ends if step < 0)


@dataclass(frozen=True, slots=True)
class Truth:
    """1 or true where all conditions are at least 0, and 0 or false elsewhere.

    >>> behind = Truth.of(Affine(sympy.Integer(0), (1, -1)))
    >>> print(*behind.denied().conditions)
    -1 + -1 p0 + 1 p1
    """

    conditions: frozenset[Affine] = frozenset()

    @staticmethod
    def of(*numbers: Affine) -> Truth:
        """Return where all numbers are at least 0."""
        always = [each for each in numbers if each.is_constant() and each.start.is_nonnegative]
        return Truth(frozenset(numbers) - frozenset(always))

    @staticmethod
    def always(is_true: bool) -> Truth:
        """Return the truth that is the same at all places."""
        return Truth() if is_true else Truth.of(Affine(sympy.Integer(-1)))

    def denied(self) -> Truth | None:
        """Return the opposite; None where it is no conjunction."""
        if not self.conditions:
            return Truth.always(False)
        if len(self.conditions) != 1:
            return None
        (only,) = self.conditions
        return Truth.of(only.times(-1).plus(Affine(sympy.Integer(-1))))

    def within(self, shape: tuple[Dim, ...]) -> Truth:
        """Return the same without conditions that hold at all places of a value of that shape."""
        rank = len(shape)
        left = (each.wide(rank) for each in self.conditions)
        return Truth(frozenset(each for each in left if not each.least(shape).is_nonnegative))


@dataclass(frozen=True, slots=True)
class Bias:
    """A number that is added to scores: 0 where `seen` is true, and elsewhere one that hides."""

    seen: Truth


@dataclass(frozen=True, slots=True)
class Fraction:
    """One number of floating point at all places."""

    number: float


Formula = Affine | Truth | Bias | Fraction


def changed(formula: Formula, change: Callable[[Affine], Affine]) -> Formula:
    """Return a formula, each part of which that is in places is changed."""
    if isinstance(formula, Affine):
        return change(formula)
    if isinstance(formula, Truth):
        return Truth(frozenset(change(each) for each in formula.conditions))
    if isinstance(formula, Bias):
        return Bias(Truth(frozenset(change(each) for each in formula.seen.conditions)))
    return formula


def in_shape(formula: Affine, shape: tuple[Dim, ...]) -> Affine:
    """Return a formula with a step for each dim, which is 0 where there is one place."""
    pairs = zip(formula.wide(len(shape)).steps, shape, strict=True)
    return Affine(formula.start, tuple(0 if size == 1 else step for step, size in pairs))


def is_zero(formula: Formula | None) -> bool:
    """Return whether a value is 0, or false, at all places."""
    if isinstance(formula, Truth):
        return any(each.is_constant() and each.start.is_negative for each in formula.conditions)
    if isinstance(formula, Affine):
        return formula.is_constant() and bool(formula.start.is_zero)
    return formula == Fraction(0.0)
