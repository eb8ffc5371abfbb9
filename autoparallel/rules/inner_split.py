"""The split of the inner dim of routed experts: column-parallel first, then row-parallel."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import torch

from autoparallel.graph.graph import Ref, hint, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.graph.row_program import LOOKUP, PRODUCT, RowProgram, RowStep
from autoparallel.rules.rule import OpCall

__all__ = ["LINEAR_STEPS", "SUM_STEPS", "VIEW_STEPS", "ExpertShapes", "InnerSplit", "inner_split"]


class ExpertShapes:
    """The tensors of a call by kind, and the shapes of what its program makes of two rows.

    rows, values, tables, plain: the operands. program: as parsed. shapes, types: of the program's
    values, by name. count: the number of experts. choices: of each token. tokens: the number of
    tokens, for the example inputs.
    """

    def __init__(self, call: OpCall) -> None:
        rows, _, values, tables, plain, text = call.node.args[:6]
        operands = iter(call.operands)
        self.rows = [next(operands) for _ in rows]
        experts = next(operands)
        self.values = [next(operands) for _ in values]
        self.tables = [next(operands) for _ in tables]
        self.plain = [next(operands) for _ in plain]
        self.program = RowProgram.parse(text)
        self.count = hint(self.tables[0].shape[0])
        self.choices = hint(experts.shape[-1])
        self.tokens = prod(map(hint, experts.shape[:-1]))
        leading = len(experts.shape) - 1
        known: dict[str, torch.Tensor] = {}

        def add(kind: str, values: list[Any], first: int, rows: tuple[int, ...]) -> None:
            """Add the inputs of one kind, each with rows in the place of its first dims."""
            for at, value in enumerate(values):
                shape = (*rows, *map(hint, value.shape[first:]))
                known[f"{kind}{at}"] = torch.empty(shape, dtype=value.dtype, device="meta")

        add("row", self.rows, leading, (2,))
        add("value", self.values, leading + 1, (2,))
        add("table", self.tables, 0, ())
        add("plain", self.plain, 0, ())
        with torch.no_grad():
            for step in self.program.steps:
                _run_step(step, known)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in known.items()}
        self.nbytes = {
            name: tensor.numel() * tensor.itemsize // 2 for name, tensor in known.items()
        }


def _run_step(step: RowStep, known: dict[str, torch.Tensor]) -> None:
    """Add the results of a step, without data."""
    args = [map_leaves(lambda leaf: _actual(leaf, known), arg) for arg in step.args]
    if step.target == PRODUCT:
        x, weight, *transposed = args
        width = weight.shape[1 if transposed == [True] else 2]
        known[step.makes[0]] = x.new_empty((x.shape[0], width))
    elif step.target == LOOKUP:
        known[step.makes[0]] = args[0].new_empty((2, *args[0].shape[1:]))
    else:
        kwargs = {key: map_leaves(lambda leaf: _actual(leaf, known), v) for key, v in step.kwargs}
        returned = operator_of(step.target)(*args, **kwargs)
        results = [returned] if isinstance(returned, torch.Tensor) else list(returned)
        known.update(zip(step.makes, results, strict=True))


def _actual(leaf: Any, known: dict[str, torch.Tensor]) -> Any:
    """Return an argument as an op is called with it."""
    return known[leaf.name] if isinstance(leaf, Ref) else leaf


@dataclass(frozen=True)
class InnerSplit:
    """The split of the experts' inner dim.

    size: of the loop. tables: by place, the dim that has it, and the blocks and the unit that it is
    split with. once: the tables that count on one rank alone.
    """

    size: int
    tables: dict[int, tuple[int, int, int]]
    once: tuple[int, ...]


# A value's state where the inner dim is split: whole, a pending sum, or not known yet, as a table's
# looked-up part is before it is joined with something; else (blocks, unit) of its last dim.
_WHOLE, _PENDING, _OPEN = "whole", "pending", "open"
SUM_STEPS = {"aten.add.Tensor", "aten.sub.Tensor"}
_FACTORS = {"aten.mul.Tensor", "aten.div.Tensor"}
LINEAR_STEPS = {
    "aten.neg.default",
    "aten.clone.default",
    "aten.to.dtype",
    "aten.contiguous.default",
}
VIEW_STEPS = {"aten.unsqueeze.default", "aten.squeeze.dim"}


class _NoSplitError(Exception):
    """The inner dim cannot be split in this way."""


def inner_split(shapes: ExpertShapes) -> InnerSplit | None:
    """Return how the inner dim of the experts is split; None where it cannot be."""
    program = shapes.program
    cuts: dict[tuple[int, int], None] = {(1, 1): None}
    for step in program.steps:
        if step.target == "aten.chunk.default":
            cuts[step.args[1], 1] = None
        if step.target == "aten.slice.Tensor" and len(step.args) > 4:
            cuts[1, step.args[4]] = None
    products = [step for step in program.steps if step.target == PRODUCT]
    # Which products come first is known only on the way; most programs have few.
    for choice in product(cuts, repeat=min(len(products) - 1, 3)):
        try:
            return _Propagation(shapes, list(choice)).run()
        except _NoSplitError:
            continue
    return None


@dataclass
class _Propagation:
    """One try: first products are split by columns, as `choices` say one after the other."""

    shapes: ExpertShapes
    choices: list[tuple[int, int]]
    states: dict[str, Any] = field(default_factory=dict)
    tables: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    looked_up: dict[str, int] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    whole: set[int] = field(default_factory=set)
    size: int = 0

    def run(self) -> InnerSplit:
        """Return the split. Raises _NoSplitError where a step does not allow it."""
        program = self.shapes.program
        for step in program.steps:
            state = self.after(step)
            self.states.update(dict.fromkeys(step.makes, state))
        once = self.pending
        if self.states[program.result] != _PENDING or once & (set(self.tables) | self.whole):
            raise _NoSplitError
        if self.whole & set(self.tables):
            raise _NoSplitError
        return InnerSplit(self.size, self.tables, tuple(sorted(once)))

    def state(self, name: str) -> Any:
        """Return the state of a value; inputs are whole."""
        return self.states.get(name, _WHOLE)

    def after(self, step: RowStep) -> Any:
        """Return the state of what a step makes."""
        if step.target == PRODUCT:
            return self.product(step)
        if step.target == LOOKUP:
            self.looked_up[step.makes[0]] = int(step.args[0].name.removeprefix("table"))
            return _OPEN
        names = step.reads()
        states = [self.state(name) for name in names]
        if all(state == _WHOLE for state in states):
            return _WHOLE
        if step.target == "aten.chunk.default":
            return self.chunked(step, states[0])
        if step.target == "aten.slice.Tensor":
            return self.sliced(step, states[0])
        return self.joined(step, names, states)

    def product(self, step: RowStep) -> Any:
        """Return the state of a product: split by columns, or a sum where its rows are split."""
        rows, table = (leaf.name for leaf in step.args[:2])
        at = int(table.removeprefix("table"))
        transposed = step.args[2:] == (True,)
        state = self.state(rows)
        if state == _OPEN or at in self.tables:
            raise _NoSplitError
        if state == _PENDING:
            self.whole.add(at)
            return _PENDING
        if state == _WHOLE:
            if not self.choices:
                raise _NoSplitError
            blocks, unit = self.choices.pop(0)
            width = self.shapes.shapes[step.makes[0]][1]
            size, rest = divmod(width, blocks * unit)
            if rest or size < 2 or self.size not in (0, size):
                raise _NoSplitError
            self.size = size
            self.tables[at] = (1 if transposed else 2, blocks, unit)
            return (blocks, unit)
        self.tables[at] = (2 if transposed else 1, *state)
        return _PENDING

    def chunked(self, step: RowStep, state: Any) -> Any:
        """Return the state of equal parts of the last dim."""
        shape = self.shapes.shapes[step.reads()[0]]
        dim = step.args[2] if len(step.args) > 2 else 0
        if state in (_PENDING, _OPEN) or dim % len(shape) != len(shape) - 1:
            raise _NoSplitError
        blocks, unit = state
        if blocks % step.args[1]:
            raise _NoSplitError
        return (blocks // step.args[1], unit)

    def sliced(self, step: RowStep, state: Any) -> Any:
        """Return the state of every so many elements of the last dim."""
        name = step.reads()[0]
        shape = self.shapes.shapes[name]
        _, dim, start, end, *stride = step.args
        last = dim % len(shape) == len(shape) - 1 and end >= shape[-1]
        if state in (_PENDING, _OPEN) or not last or not stride or not 0 <= start < stride[0]:
            raise _NoSplitError
        blocks, unit = state
        if unit % stride[0]:
            raise _NoSplitError
        return (blocks, unit // stride[0])

    def joined(self, step: RowStep, names: tuple[str, ...], states: list[Any]) -> Any:
        """Return the state of what an op makes of values element by element."""
        if (
            torch.Tag.pointwise not in operator_of(step.target).tags
            and step.target not in LINEAR_STEPS
        ):
            raise _NoSplitError
        settled = {state for state in states if state not in (_WHOLE, _OPEN)}
        if not settled:
            # Nothing is split yet; what was looked up stays whole.
            self.settle(names, states, _WHOLE)
            return _WHOLE
        if len(settled) > 1:
            raise _NoSplitError
        (state,) = settled
        if state == _PENDING:
            return self.summed(step, names, states)
        width = self.shapes.shapes[step.makes[0]][-1]
        for name, each in zip(names, states, strict=True):
            shape = self.shapes.shapes[name]
            # What is whole must be the same for all elements of the split dim.
            if each == _WHOLE and shape and shape[-1] != 1:
                raise _NoSplitError
            if each != _WHOLE and shape[-1] != width:
                raise _NoSplitError
        self.settle(names, states, state)
        return state

    def summed(self, step: RowStep, names: tuple[str, ...], states: list[Any]) -> Any:
        """Return the state of an op on a pending sum, which it must be linear in."""
        if step.target in SUM_STEPS and all(state in (_PENDING, _OPEN) for state in states):
            self.settle(names, states, _PENDING)
            return _PENDING
        whole = [state for state in states if state != _PENDING]
        linear = step.target in LINEAR_STEPS and not whole
        if step.target == "aten.to.dtype":
            linear = linear and step.args[1].is_floating_point
        scaled = step.target in _FACTORS and len(whole) <= 1 and _OPEN not in whole
        if step.target == "aten.div.Tensor" and states[0] != _PENDING:
            scaled = False
        if not linear and not scaled:
            raise _NoSplitError
        return _PENDING

    def settle(self, names: tuple[str, ...], states: list[Any], state: Any) -> None:
        """Give what was looked up in tables the state of what it is joined with."""
        for name, each in zip(names, states, strict=True):
            if each != _OPEN:
                continue
            at = self.looked_up[name]
            if state == _PENDING:
                self.pending.add(at)
            elif state == _WHOLE:
                self.whole.add(at)
            else:
                shape = self.shapes.shapes[f"table{at}"]
                if at in self.tables and self.tables[at] != (len(shape) - 1, *state):
                    raise _NoSplitError
                self.tables[at] = (len(shape) - 1, *state)
            self.states[name] = state
