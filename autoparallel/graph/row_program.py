"""A program of rows: what an expert does with each of the rows that it is given.

The op of routed experts carries one as text among its arguments, so that every process that meets
the op knows what it computes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from autoparallel.graph.graph import Ref, map_leaves

__all__ = ["LOOKUP", "PRODUCT", "ROUTED", "RowProgram", "RowStep", "parts_met"]

# The op that runs a program of rows for each of the experts that tokens are routed to.
ROUTED = "autoparallel.routed_experts.default"
# Steps that depend on the row's expert: the product with its matrix, and the row of a table.
PRODUCT, LOOKUP = "product", "lookup"


@dataclass(frozen=True, slots=True)
class RowStep:
    """One step: names of the values that it makes, its op, and its arguments.

    makes: names. target: an op that treats each row by itself, such as "aten.silu.default"; or
    PRODUCT of rows and matrices, or LOOKUP in a table. args, kwargs: as of a `Node`.
    """

    makes: tuple[str, ...]
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def reads(self) -> tuple[str, ...]:
        """Return the names of the values that it reads, in order."""
        names: list[str] = []
        for structure in (self.args, self.kwargs):
            map_leaves(lambda leaf: names.append(leaf.name) if _is_use(leaf) else None, structure)
        return tuple(names)


@dataclass(frozen=True)
class RowProgram:
    """Steps on rows, of which every row goes through all.

    What it reads has names by kind and place: "row0" of a token, "value0" of a token's choice,
    "table0" of the experts, "plain0" of what is the same for all rows. result: the name of the
    rows that it returns.

    >>> double = RowStep(("twice",), "aten.mul.Tensor", (Ref("row0"), 2))
    >>> program = RowProgram((double,), "twice")
    >>> RowProgram.parse(program.text()) == program
    True
    """

    steps: tuple[RowStep, ...]
    result: str

    def text(self) -> str:
        """Return the program as text, which `parse` reads."""
        rows = [
            [list(step.makes), step.target, _written(step.args), dict(_pairs(step))]
            for step in self.steps
        ]
        return json.dumps([rows, self.result], separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> RowProgram:
        """Return the program that a text is of."""
        rows, result = json.loads(text)
        steps = tuple(
            RowStep(
                tuple(makes),
                target,
                tuple(_read(item) for item in args),
                tuple((key, _read(item)) for key, item in kwargs.items()),
            )
            for makes, target, args, kwargs in rows
        )
        return RowProgram(steps, result)


def _is_use(leaf: Any) -> bool:
    """Return whether an argument is a use of a value."""
    return isinstance(leaf, Ref)


def _pairs(step: RowStep) -> list[tuple[str, Any]]:
    """Return the keyword arguments of a step as JSON has them."""
    return [(key, _written(item)) for key, item in step.kwargs]


def _written(item: Any) -> Any:
    """Return an argument as JSON has it. Raises ValueError for what no text stands for."""
    if isinstance(item, tuple):
        return [_written(part) for part in item]
    if isinstance(item, Ref):
        return {"use": item.name}
    if isinstance(item, torch.dtype):
        return {"dtype": str(item).removeprefix("torch.")}
    if item is None or type(item) in (bool, int, str):
        return item
    if type(item) is float:
        return {"float": item.hex()}
    raise ValueError(f"no text stands for {item!r:.60}")


def _read(item: Any) -> Any:
    """Return the argument that JSON stands for."""
    if isinstance(item, list):
        return tuple(_read(part) for part in item)
    if not isinstance(item, dict):
        return item
    ((kind, text),) = item.items()
    if kind == "use":
        return Ref(text)
    if kind == "float":
        return float.fromhex(text)
    return getattr(torch, text)


def parts_met(choices: float, targets: int, parts: int) -> float:
    """Return the expected number of `parts` that different choices among `targets` fall into.

    choices: how many of the targets are chosen, each as likely as any other. The targets lie in
    equal parts. A token that is routed to `choices` experts is sent to so many ranks.

    >>> parts_met(2, 8, 8), parts_met(8, 64, 1), round(parts_met(8, 256, 64), 2)
    (2.0, 1.0, 7.62)
    """
    if parts <= 1:
        return 1.0
    outside = targets - targets / parts
    if choices > outside:
        return float(parts)
    # The chance that no choice falls into a part: C(outside, choices) / C(targets, choices).
    terms = (outside + 1, targets - choices + 1, -(outside - choices + 1), -(targets + 1))
    log = sum(math.copysign(math.lgamma(abs(term)), term) for term in terms)
    return parts * (1.0 - math.exp(log))
