"""Plain words for placements, movements and sizes. What a split is called follows from placements.

The loop that is split says what a split is: it is summed ("row") where the reading op's result is
a pending sum, and it is not ("column") where the result is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from autoparallel.analysis.communication import Transfer, transfers
from autoparallel.placement import (
    Collective,
    Invariant,
    Layout,
    Partial,
    Placement,
    Replicate,
    Shard,
)
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan, PlannedInput
from autoparallel.view.size_names import shape_text, size_names

__all__ = [
    "Words",
    "collective_text",
    "is_unary",
    "kind_of",
    "op_text",
]

# What a split of the parameter read first is called where a kernel of ours runs the op.
_KERNELS = {"embedding_rows": "rows of the table"}
_PHRASES = {"column": "column: output dim", "row": "row: input dim"}


class Words:
    """The plan, indexed for telling it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.parameters: Mapping[str, ParameterChoice] = {p.name: p for p in plan.parameters}

    @cached_property
    def producers(self) -> Mapping[str, OpChoice]:
        """The op that makes each value."""
        return {value: op for op in self.plan.ops for value in op.makes}

    @cached_property
    def readers(self) -> Mapping[str, list[tuple[OpChoice, int]]]:
        """The ops that read each value, with the position of the operand."""
        found: dict[str, list[tuple[OpChoice, int]]] = {}
        for op in self.plan.ops:
            for position, value in enumerate(op.reads):
                found.setdefault(value, []).append((op, position))
        return found

    @cached_property
    def converted(self) -> Mapping[tuple[str, str], Conversion]:
        """(value, reader) to the conversion between them. A reader is an op's name or "return"."""
        return {
            (conversion.value, reader): conversion
            for conversion in self.plan.conversions
            for reader in conversion.readers
        }

    def value(self, name: str) -> str:
        """What a value is called: an input as the caller calls it, all others as in the graph."""
        prefix, inputs = self._inputs(name)
        own = name.removeprefix(prefix)
        path = next((item.path for item in inputs if item.name == own), "")
        return prefix + (path or own)

    def shape(self, conversion: Conversion) -> str:
        """Of the whole value, with names for the sizes that the inputs decide."""
        return shape_text(conversion.shape, size_names(self._inputs(conversion.value)[1]))

    def _inputs(self, value: str) -> tuple[str, tuple[PlannedInput, ...]]:
        """The inputs of the part in which a value is, and what the part's names begin with."""
        for part in self.plan.parts:
            for path in part.paths:
                if value.startswith(f"{path}/"):
                    return f"{path}/", part.plan.inputs
        return "", self.plan.inputs

    def where(self, value: str) -> str:
        """The module in which a value is made, "(input)" for an input."""
        if value in self.parameters:
            return self.parameters[value].path
        op = self.producers.get(value)
        return "(input)" if op is None else op.where or "(model)"

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Names of the mesh axes."""
        return tuple(name for name, _ in self.plan.mesh.axes)

    @cached_property
    def transfers(self) -> Mapping[tuple[str, Layout], list[Transfer]]:
        """What each conversion, by value and target, sends in one step."""
        found: dict[tuple[str, Layout], list[Transfer]] = {}
        for transfer in transfers(self.plan):
            conversion = transfer.conversion
            found.setdefault((conversion.value, conversion.target), []).append(transfer)
        return found

    def sent(self, conversion: Conversion | None) -> list[Transfer]:
        """What a conversion sends in one step."""
        if conversion is None:
            return []
        return self.transfers.get((conversion.value, conversion.target), [])

    def on(self, axis: int) -> str:
        """ " on tp"; empty where there is one axis only."""
        return f" on {self.axes[axis]}" if len(self.axes) > 1 else ""

    def layout(self, layout: Layout) -> str:
        """ "S(0)" on one axis; "R on dp, S(0) on tp", where I goes without saying, on several."""
        if len(layout) == 1:
            return str(layout[0])
        if len(set(layout)) == 1 and not isinstance(layout[0], Shard):
            return str(layout[0])
        told = [
            f"{placement}{self.on(axis)}"
            for axis, placement in enumerate(layout)
            if not isinstance(placement, Invariant)
        ]
        return ", ".join(told)

    def change(self, conversion: Conversion, between: str = ", ") -> str:
        """ "I → R"; "I → R on dp" where there are several axes, of which the others stay."""
        pairs = enumerate(zip(conversion.source, conversion.target, strict=True))
        return between.join(
            f"{source} → {target}{self.on(axis)}"
            for axis, (source, target) in pairs
            if source != target
        )

    def split(self, parameter: ParameterChoice) -> str:
        """How a parameter is split, in words; "whole" if it is not."""
        told: dict[str, list[str]] = {}
        for axis, state in enumerate(parameter.state):
            if not isinstance(state, Shard):
                continue
            if isinstance(parameter.storage[axis], Shard):
                names = dict.fromkeys(self.splits(parameter.name, axis))
                text = " + ".join(names) or f"dim {state.dim}"
            else:
                text = _late_text(parameter, axis)
            told.setdefault(text + self._parts(state), []).append(self.axes[axis])
        if len(self.axes) == 1:
            return next(iter(told), "whole")
        rows = [f"{text} on {' and '.join(axes)}" for text, axes in told.items()]
        return "; ".join(rows) or "whole"

    def splits(self, value: str, axis: int = 0) -> list[str]:
        """What the split of a value is called by each op that reads it, through views."""
        found = []
        for op, position in self.readers.get(value, ()):
            if not isinstance(op.operands[position][axis], Shard):
                if (value, op.name) in self.converted:
                    found.append("stored in parts, gathered for use (ZeRO-3)")
            elif is_unary(op) and len(op.makes) == 1:
                found += self.splits(op.makes[0], axis)
            else:
                found.append(_PHRASES.get(name := self._split(op, position, axis), name))
        return found

    def origin(self, value: str) -> str:
        """The value that this one is a view or a cast of, itself if it is none."""
        while (op := self.producers.get(value)) is not None and is_unary(op):
            value = op.reads[0]
        return value

    def role(self, op: OpChoice) -> str:
        """What an op's split is called: "column-parallel"; empty if there is no word for it."""
        told = [
            f"{text}{self.on(axis)}"
            for axis in range(len(self.axes))
            if (text := self._role(op, axis))
        ]
        return ", ".join(told)

    def _role(self, op: OpChoice, axis: int) -> str:
        for position, value in enumerate(op.reads):
            split = isinstance(op.operands[position][axis], Shard)
            known = op.whole_flops or op.kernels[axis]
            if split and known and self.origin(value) in self.parameters:
                name = self._split(op, position, axis)
                return f"{name}-parallel" if name in _PHRASES else name
        if not op.whole_flops:
            return ""
        result = op.results[0][axis]
        return f"split along dim {result.dim}" if isinstance(result, Shard) else ""

    def _split(self, op: OpChoice, position: int, axis: int) -> str:
        """ "row" or "column" where that is what the split of an operand is, else a phrase."""
        placement = op.operands[position][axis]
        assert isinstance(placement, Shard)
        if op.kernels[axis]:
            return _KERNELS.get(op.kernels[axis], f"dim {placement.dim}")
        if all(isinstance(result[axis], Partial) for result in op.results):
            return "row"
        others = (*op.operands[:position], *op.operands[position + 1 :])
        if not any(isinstance(other[axis], Shard) for other in others):
            return "column"
        if op.whole_flops:
            return f"dim {placement.dim}, each part with its part of the input"
        return "sharded like its activation"

    @staticmethod
    def _parts(shard: Shard) -> str:
        text = f", in {shard.blocks} blocks" if shard.blocks > 1 else ""
        return text + (f", in whole runs of {shard.unit}" if shard.unit > 1 else "")


def is_unary(op: OpChoice) -> bool:
    """Whether an op makes what it makes from one operand, and is no product."""
    return len(op.reads) == 1 and not op.whole_flops and not any(op.kernels)


def _late_text(parameter: ParameterChoice, axis: int) -> str:
    """What ZeRO's first two stages are called (arXiv:1910.02054)."""
    if isinstance(parameter.gradient[axis], Shard):
        return "whole, its gradient and optimizer state in parts (ZeRO-2)"
    return "whole, its optimizer state in parts (ZeRO-1)"


def kind_of(layout: Layout) -> type[Placement]:
    """The placement that matters most: what is pending, then what is split."""
    kinds = {type(placement) for placement in layout}
    order: tuple[type[Placement], ...] = (Partial, Shard, Replicate, Invariant)
    return next(kind for kind in order if kind in kinds)


def collective_text(collective: Collective) -> str:
    """ "all-reduce"."""
    return collective.value.replace("_", "-")


def op_text(target: str) -> str:
    """ "linear" for "aten.linear.default"."""
    parts = target.split(".")
    return parts[1] if len(parts) > 2 else parts[0]
