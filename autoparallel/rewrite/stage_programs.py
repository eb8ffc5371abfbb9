"""One rank's programs for a stage of a pipeline: what it computes once, and per micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from autoparallel.graph.graph import Dim, Sym
from autoparallel.placement import Layout, Partial, Shard, local_layout_size
from autoparallel.rewrite.emit import emit
from autoparallel.rewrite.program import Program, compiled
from autoparallel.rewrite.stages import Stage
from autoparallel.runtime.axis_parts import join_parts
from autoparallel.runtime.microbatches import ranks_of_microbatch
from autoparallel.runtime.ranks import Ranks

__all__ = ["StagePrograms", "Travelling", "joined_in_time", "part_in_time", "sizes_of_symbols"]


@dataclass(frozen=True)
class Travelling:
    """A tensor that goes from one stage to the next: its layout and whole shape, and its type."""

    layout: Layout
    shape: tuple[Dim, ...]
    dtype: torch.dtype
    requires_grad: bool

    def local_shape(self, symbols: Any, ranks: Ranks) -> tuple[int, ...]:
        """Return the shape of the part that a rank holds of it. symbols: values of the sizes."""
        return tuple(
            local_layout_size(
                int(size.expr.subs(symbols)) if isinstance(size, Sym) else size,
                dim,
                self.layout,
                ranks.sizes,
                ranks.coordinates,
            )
            for dim, size in enumerate(self.shape)
        )

    def empty(self, symbols: Any, ranks: Ranks) -> torch.Tensor:
        """Return a tensor without numbers that says what a rank holds of it."""
        shape = self.local_shape(symbols, ranks)
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=self.requires_grad)


class StagePrograms:
    """The programs of one rank for one stage.

    stage: which. ranks: the rank's place among those of the stage. count: of micro-batches. name:
    of the model.
    """

    def __init__(self, stage: Stage, ranks: Ranks, count: int, name: str) -> None:
        self.stage, self.count, self.name = stage, count, name
        self.places = [ranks_of_microbatch(ranks, number, count) for number in range(count)]
        self.before = emit(stage.before, stage.before_plan, self.places[0], name)
        first = self._emit(0)
        self.first = first
        self.programs = [first]
        # Where sizes are fixed numbers, parts of unlike sizes make texts of their own.
        last = self._emit(count - 1) if count > 1 else first
        for number in range(1, count):
            if number == count - 1:
                self.programs.append(last)
            elif last.source == first.source:
                self.programs.append(self._again(first, number))
            else:
                self.programs.append(self._emit(number))

    def _emit(self, number: int) -> Program:
        """Return the program of one micro-batch, written for it."""
        stage = self.stage
        return emit(
            stage.graph,
            stage.plan,
            self.places[number],
            f"{self.name} stage {stage.number}",
            entering=stage.entering,
            deferred=stage.deferred,
        )

    def _again(self, program: Program, number: int) -> Program:
        """Return the same text as the program of another micro-batch."""
        before, now = self.places[0], self.places[number]
        others: dict[int, Any] = {id(before): now, id(before.groups[0]): now.groups[0]}
        names = {name: others.get(id(value), value) for name, value in program.names.items()}
        run = compiled(program.source, f"{self.name} stage {self.stage.number}", now, names)
        return replace(program, run=run, names=names)

    @cached_property
    def enters(self) -> tuple[Travelling, ...]:
        """The tensors that come from the stage before."""
        values = self.stage.graph.values
        return tuple(
            Travelling(
                self.stage.entering[name],
                values[name].shape,
                values[name].dtype,
                values[name].requires_grad,
            )
            for name in self.stage.takes
        )

    @cached_property
    def leaves(self) -> tuple[Travelling, ...]:
        """The tensors that go to the next stage; of the last stage, those that are returned."""
        values = self.stage.graph.values
        return tuple(
            Travelling(layout, values[name].shape, values[name].dtype, values[name].requires_grad)
            for name, layout in zip(self.stage.gives, self.stage.plan.outputs, strict=True)
        )

    @property
    def source(self) -> str:
        """The text of the programs, as it is read."""
        number = self.stage.number
        texts = []
        if self.stage.before.calls:
            texts.append(f"# stage {number}, once a step\n{self.before.source}")
        texts.append(f"# stage {number}, each micro-batch\n{self.first.source}")
        return "\n".join(texts)


def sizes_of_symbols(
    shapes: Sequence[tuple[Dim, ...]], inputs: Sequence[torch.Tensor]
) -> dict[Any, int]:
    """Return the values that the symbols in the inputs' sizes have in a call.

    shapes: of the inputs, in symbolic sizes.
    """
    symbols: dict[Any, int] = {}
    for tensor, sizes in zip(inputs, shapes, strict=True):
        for actual, size in zip(tensor.shape, sizes, strict=True):
            if isinstance(size, Sym) and size.expr.is_Symbol:
                symbols[size.expr] = actual
    return symbols


def joined_in_time(parts: Sequence[torch.Tensor], layout: Layout) -> torch.Tensor:
    """Return a value of which each micro-batch has made a part. layout: its first axis is time.

    >>> joined_in_time([torch.ones(2), torch.zeros(1)], (Shard(0),))
    tensor([1., 1., 0.])
    >>> joined_in_time([torch.tensor(1.0), torch.tensor(2.0)], (Partial(),))
    tensor(3.)
    """
    placement = layout[0]
    if isinstance(placement, Shard):
        return join_parts(list(parts), placement)
    if isinstance(placement, Partial):
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    return parts[0]


def part_in_time(
    gradient: torch.Tensor, layout: Layout, parts: Sequence[torch.Tensor], number: int
) -> torch.Tensor:
    """Return the gradient of one micro-batch's part of a value, of the gradient of all of it.

    layout: of the value; its first axis is time. parts: of the value, by micro-batch. Of a value
    that all of them make alike, the first one's is what is returned.

    >>> parts = [torch.zeros(2), torch.zeros(1)]
    >>> part_in_time(torch.tensor([1.0, 2.0, 3.0]), (Shard(0),), parts, 1)
    tensor([3.])
    """
    placement = layout[0]
    if isinstance(placement, Shard):
        before = sum(part.size(placement.dim) for part in parts[:number])
        return gradient.narrow(placement.dim, before, parts[number].size(placement.dim))
    if isinstance(placement, Partial) or number == 0:
        return gradient
    return torch.zeros_like(gradient)
