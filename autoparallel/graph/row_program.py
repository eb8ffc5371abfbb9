"""A program of rows: what an expert does with each of the rows that it is given.

The op of routed experts carries one as text among its arguments, so that every process that meets
the op knows what it computes.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import torch

from autoparallel.graph.graph import Ref, Value, hint, leaves

__all__ = ["LOOKUP", "NOT_ALL", "PRODUCT", "ROUTED", "RowProgram", "RowStep", "factors_first"]
__all__ += ["parts_met"]

# The op that runs a program of rows for each of the experts that tokens are routed to.
ROUTED = "autoparallel.routed_experts.default"
# The share of choices that are somebody's, where some may be nobody's.
NOT_ALL = 1.0 - 1e-9
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
        structures = (leaves(self.args), leaves(self.kwargs))
        return tuple(leaf.name for leaf in chain(*structures) if isinstance(leaf, Ref))


@dataclass(frozen=True)
class RowProgram:
    """Steps on rows, of which every row goes through all.

    What it reads has names by kind and place: "row0" of a token, "value0" of a token's choice,
    "table0" of the experts, "plain0" of what is the same for all rows. result: the name of the
    rows that it returns.

    >>> double = RowStep(("twice",), "aten.mul.Tensor", (Ref("row0"), 2))
    >>> program = RowProgram((double,), "twice")
    >>> program.text()
    'twice = aten.mul.Tensor(row0, 2); twice'
    >>> RowProgram.parse(program.text()) == program
    True
    """

    steps: tuple[RowStep, ...]
    result: str

    def text(self) -> str:
        """Return the program as text, which `parse` reads: a call for each step.

        Raises ValueError where an argument has no text.
        """
        lines = []
        for step in self.steps:
            parts = [_written(arg) for arg in step.args]
            parts += [f"{key}={_written(item)}" for key, item in step.kwargs]
            lines.append(f"{', '.join(step.makes)} = {step.target}({', '.join(parts)})")
        return "; ".join((*lines, self.result))

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> RowProgram:
        """Return the program that a text is of."""
        *lines, last = ast.parse(text).body
        steps = []
        for line in lines:
            assert isinstance(line, ast.Assign)
            assert isinstance(line.value, ast.Call)
            (left,), call = line.targets, line.value
            makes = left.elts if isinstance(left, ast.Tuple) else [left]
            kwargs = tuple((str(item.arg), _read(item.value)) for item in call.keywords)
            args = tuple(_read(arg) for arg in call.args)
            names = tuple(map(ast.unparse, makes))
            steps.append(RowStep(names, ast.unparse(call.func), args, kwargs))
        return RowProgram(tuple(steps), ast.unparse(last))


def factors_first(
    steps: Sequence[RowStep], result: str, inputs: Mapping[str, Value]
) -> tuple[RowStep, ...]:
    """Return the steps, in which a number for each row multiplies what a product reads, rather than
    what it makes, where that has fewer elements: the result is the same.

    result: the name of what the program returns. inputs: what the program reads, by its name there.
    """
    done = list(steps)
    makers = {name: step for step in steps for name in step.makes}
    reads = Counter([result, *(name for step in steps for name in step.reads())])
    for step in steps:
        if step.target != "aten.mul.Tensor" or not all(isinstance(arg, Ref) for arg in step.args):
            continue
        for rows, number in (step.args, step.args[::-1]):
            product = makers.get(rows.name)
            if product is None or product.target != PRODUCT or reads[rows.name] > 1:
                continue
            x, table, *transposed = product.args
            _, depth, columns = inputs[table.name].shape
            depth, columns = (columns, depth) if transposed == [True] else (depth, columns)
            if (
                hint(depth) < hint(columns)
                and _number(number, makers, inputs) is inputs[table.name].dtype
            ):
                done.remove(product)
                early = RowStep((f"{step.makes[0]}_early",), step.target, (x, number))
                late = replace(
                    product, makes=step.makes, args=(Ref(early.makes[0]), *product.args[1:])
                )
                done[done.index(step) : done.index(step) + 1] = [early, late]
                break
    return tuple(done)


def _number(
    item: Ref, makers: Mapping[str, RowStep], inputs: Mapping[str, Value]
) -> torch.dtype | None:
    """Return the dtype of an operand that is one number of each choice; None where it is not."""
    step = makers.get(item.name)
    unsqueezed = step is not None and step.target == "aten.unsqueeze.default"
    source = step.args[0].name if step is not None and unsqueezed else item.name
    shape = inputs[source].shape if source.startswith("value") else ()
    ends = step.args[1] in (1, -1) if step is not None else shape[2:] == (1,)
    return inputs[source].dtype if ends and len(shape) == (2 if unsqueezed else 3) else None


def _written(item: Any) -> str:
    """Return an argument as text. Raises ValueError for what no text stands for."""
    if isinstance(item, tuple):
        return f"({''.join(f'{_written(part)}, ' for part in item)})"
    if isinstance(item, Ref):
        return item.name
    if item is None or type(item) in (bool, int, str) or isinstance(item, torch.dtype):
        return repr(item)
    # A literal has no infinity, but one that is too large for a number.
    if type(item) is float and not math.isnan(item):
        return repr(item).replace("inf", "1e999")
    raise ValueError(f"no text stands for {item!r:.60}")


def _read(node: ast.expr) -> Any:
    """Return the argument that an expression stands for."""
    if isinstance(node, ast.Name):
        return Ref(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(torch, node.attr)
    if isinstance(node, ast.Tuple):
        return tuple(_read(part) for part in node.elts)
    return ast.literal_eval(node)


def parts_met(choices: float, targets: int, parts: int) -> float:
    """Return the expected number of `parts` that different choices among `targets` fall into.

    choices: how many of the targets are chosen, each as likely as any other. The targets lie in
    equal parts. A token that is routed to `choices` experts is sent to so many ranks.

    >>> [round(parts_met(2, 8, parts), 2) for parts in (1, 4, 8)]
    [1.0, 1.86, 2.0]
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
