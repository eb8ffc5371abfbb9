"""Closed forms as values: of what one module sends, computes and holds, and of all modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import sympy

from autoparallel.analysis.communication import PHASES
from autoparallel.analysis.symbolic_sizes import Algebra
from autoparallel.placement import Collective

__all__ = ["AMOUNTS", "HANDED", "ZERO", "ClosedForms", "Form", "Sent", "in_order_of_phases"]

ZERO = sympy.Integer(0)
_ORDER = (*PHASES, "kernel")


@dataclass(frozen=True)
class Sent:
    """Collectives that are alike, and how many of them a step makes.

    phase: "forward", "backward", "update", or "kernel" for those inside of ops. axis: the name of
    the mesh axis. nbytes: of the tensor of one, as it would be on a rank if this axis did not split
    it. kernel: the name of the kernel that makes them, "" for redistributions. together: they are
    made in one call, as a gradient bucket.
    """

    phase: str
    axis: str
    collective: Collective
    nbytes: sympy.Expr
    kernel: str = ""
    together: bool = False
    count: int = 1


@dataclass(frozen=True)
class Form:
    """Closed forms of a part of a model, on the busiest rank.

    paths: of the modules for each of which they hold; ("",) for all that is in no repeated module.
    sent: its collectives. flops: of products in the forward pass. backward_flops: of products in
    the backward pass, those that are recomputed among them. The rest is in bytes; activations:
    those of the forward pass that are saved for the backward pass. handed_on, handed_back: what a
    stage sends to the next one, and to the one before it.
    """

    paths: tuple[str, ...]
    sent: tuple[Sent, ...]
    flops: sympy.Expr
    backward_flops: sympy.Expr
    parameters: sympy.Expr
    gradients: sympy.Expr
    optimizer_state: sympy.Expr
    activations: sympy.Expr
    handed_on: sympy.Expr = ZERO
    handed_back: sympy.Expr = ZERO

    @property
    def count(self) -> int:
        """The number of modules."""
        return len(self.paths)

    @property
    def nbytes(self) -> sympy.Expr:
        """The bytes of all that is sent."""
        return sum((row.count * row.nbytes for row in self.sent), ZERO)


AMOUNTS = ("flops", "backward_flops", "parameters", "gradients", "optimizer_state", "activations")
# Those that plans with stages have besides.
HANDED = ("handed_on", "handed_back")


@dataclass(frozen=True)
class ClosedForms:
    """The closed forms of a plan.

    algebra: the symbols, and the sizes that they stand for. forms: one per group of modules that
    are alike, and one of the rest; of a plan with stages, one per group of stages that are alike,
    for all micro-batches of a step. `autoparallel.forms_text` prints them.
    """

    algebra: Algebra
    forms: tuple[Form, ...]

    @cached_property
    def total(self) -> Form:
        """The form of the whole model: the sum over all modules, or one rank of each stage."""
        sent: dict[Sent, int] = {}
        for form in self.forms:
            for row in form.sent:
                key = replace(row, count=1)
                sent[key] = sent.get(key, 0) + row.count * form.count
        sums = {
            name: sum((form.count * getattr(form, name) for form in self.forms), ZERO)
            for name in (*AMOUNTS, *HANDED)
        }
        paths = tuple(path for form in self.forms for path in form.paths)
        rows = tuple(replace(key, count=count) for key, count in sent.items())
        return Form(paths, in_order_of_phases(rows), **sums)

    def at(self, expression: sympy.Expr, **sizes: int) -> float:
        """Return the value of an expression for these sizes; those that are not named are the
        plan's own.

        sizes: by the symbols' names. Raises PlanError for a name that is no symbol's.
        """
        return self.algebra.at(expression, sizes)


def in_order_of_phases(rows: Iterable[Sent]) -> tuple[Sent, ...]:
    """Return the rows in the order of phases."""
    return tuple(sorted(rows, key=lambda row: _ORDER.index(row.phase)))
