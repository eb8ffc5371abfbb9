"""Plain words for placements, movements and sizes, which the report and the picture share.

The placements of an op say how a split of its operand is called, without naming the op: where the
result is a pending sum, the loop that is split is summed ("row"); where the result is split, it is
not ("column").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # at run time, a plan is shown without torch
    from autoparallel.strategy.parameter_storage import ParameterStorage

__all__ = [
    "Words",
    "collective_text",
    "is_unary",
    "kind_of",
    "op_text",
]

# How a split parameter is called where a kernel of ours runs the op that reads it.
_KERNELS = {"embedding_rows": "rows of the table"}
# What ranks send each other in kernels of ours that run an op on parts.
_EXCHANGED = {
    "attention_ring": "keys passed round",
    "convolution_edges": "edges exchanged",
}
# The kinds of values that no op makes, by the prefixes that the graph gives to their names.
_KINDS = {"b_": "buffer", "c_": "constant"}
_PHRASES = {"column": "column: output dim", "row": "row: input dim"}


class Words:
    """Words tells about one plan, and has indices of its values for that.

    plan: it may have been read from JSON; nothing here needs the graph.

    >>> from autoparallel import Mesh, make_plan
    >>> import torch
    >>> layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    >>> words = Words(make_plan(layers, 2, example_inputs=torch.ones(8, 64)))
    >>> [words.split(parameter) for parameter in words.plan.parameters if parameter.shape[1:]]
    ['column: output dim', 'row: input dim']
    """

    def __init__(self, plan: Plan) -> None:
        """Index the parameters; all other indices are made when they are first asked for."""
        self.plan = plan
        self.parameters: Mapping[str, ParameterChoice] = {p.name: p for p in plan.parameters}

    @cached_property
    def producers(self) -> Mapping[str, OpChoice]:
        """The op that makes each value, by the value's name."""
        return {value: op for op in self.plan.ops for value in op.makes}

    @cached_property
    def readers(self) -> Mapping[str, list[tuple[OpChoice, int]]]:
        """The ops that read each value, each with the position of the operand."""
        readers: dict[str, list[tuple[OpChoice, int]]] = {}
        for op in self.plan.ops:
            for position, value in enumerate(op.reads):
                readers.setdefault(value, []).append((op, position))
        return readers

    @cached_property
    def converted(self) -> Mapping[tuple[str, str], Conversion]:
        """The conversion between each (value, reader); a reader is an op's name or "return"."""
        return {
            (conversion.value, reader): conversion
            for conversion in self.plan.conversions
            for reader in conversion.readers
        }

    def value(self, name: str) -> str:
        """Return the caller's name of an input, and for all other values that of the graph."""
        prefix, inputs = self._inputs(name)
        in_graph = name.removeprefix(prefix)
        path = next((item.path for item in inputs if item.name == in_graph), "")
        return prefix + (path or in_graph)

    def source(self, name: str) -> str:
        """Return the kind and the name of a value that no op makes: "input tokens", "buffer mask".

        A plan's JSON lists inputs and parameters only; buffers and constants are told by the
        prefixes of their names.
        """
        path, inputs = self._inputs(name)
        in_graph = name.removeprefix(path)
        if all(item.name != in_graph for item in inputs):
            for prefix, kind in _KINDS.items():
                if in_graph.startswith(prefix):
                    return f"{kind} {path}{in_graph.removeprefix(prefix)}"
        return f"input {self.value(name)}"

    def shape(self, conversion: Conversion) -> str:
        """Return the shape of the whole value, with names for the sizes that the inputs decide.

        A value without dims is a "scalar".
        """
        names = size_names(self._inputs(conversion.value)[1])
        return shape_text(conversion.shape, names) or "scalar"

    def _inputs(self, value: str) -> tuple[str, tuple[PlannedInput, ...]]:
        """Return the prefix of the names in the part that a value belongs to, and its inputs."""
        for part in self.plan.parts:
            for path in part.paths:
                if value.startswith(f"{path}/"):
                    return f"{path}/", part.plan.inputs
        return "", self.plan.inputs

    def where(self, value: str) -> str:
        """Return the path of the module in which a value is made, "(input)" for an input."""
        if value in self.parameters:
            return self.parameters[value].path
        op = self.producers.get(value)
        return "(input)" if op is None else op.where or "(model)"

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The names of the mesh axes, outermost first."""
        return tuple(name for name, _ in self.plan.mesh.axes)

    @cached_property
    def transfers(self) -> Mapping[tuple[str, Layout], list[Transfer]]:
        """The transfers of each conversion in one step, by its value and target."""
        by_conversion: dict[tuple[str, Layout], list[Transfer]] = {}
        for transfer in transfers(self.plan):
            conversion = transfer.conversion
            by_conversion.setdefault((conversion.value, conversion.target), []).append(transfer)
        return by_conversion

    def sent(self, conversion: Conversion | None) -> list[Transfer]:
        """Return the transfers of a conversion in one step; none for no conversion."""
        if conversion is None:
            return []
        return self.transfers.get((conversion.value, conversion.target), [])

    def on(self, axis: int) -> str:
        """Return " on tp" for the axis of that number; "" where the mesh has one axis only."""
        return f" on {self.axes[axis]}" if len(self.axes) > 1 else ""

    def by_axes(self, told: Iterable[tuple[str, int]], between: str = ", ") -> str:
        """Join texts with the axes that they are about; equal texts in a row are told once.

        told: (text, number of the mesh axis). The result is like "S(0) on dp and tp" or "R on dp,
        S(1) on tp", and has no axes where the mesh has one only.
        """
        groups: list[tuple[str, list[int]]] = []
        for text, axis in told:
            if groups and groups[-1][0] == text:
                groups[-1][1].append(axis)
            else:
                groups.append((text, [axis]))
        if len(self.axes) == 1:
            return between.join(text for text, _ in groups)
        return between.join(
            f"{text} on {' and '.join(self.axes[axis] for axis in axes)}" for text, axes in groups
        )

    def layout(self, layout: Layout) -> str:
        """Return "S(0)" on one axis, "R on dp, S(0) on tp" on several, where I is left out."""
        if len(set(layout)) == 1 and not isinstance(layout[0], Shard):
            return str(layout[0])
        return self.by_axes(
            (str(placement), axis)
            for axis, placement in enumerate(layout)
            if len(layout) == 1 or not isinstance(placement, Invariant)
        )

    def stored(self, way: ParameterChoice | ParameterStorage) -> str:
        """Return how a parameter is stored, with its gradient and its optimizer's state where these
        lie otherwise.
        """
        text = self.layout(way.storage)
        if way.gradient != way.storage:
            text += f", gradient {self.layout(way.gradient)}"
        if way.state != way.storage:
            text += f", optimizer state {self.layout(way.state)}"
        return text

    def without(self, conversion: Conversion) -> tuple[str, str]:
        """Return the two ways to do without a conversion: it is made so, or nothing reads it so."""
        target = self.layout(conversion.target)
        return f"made as {target} at once", f"never read as {target}"

    def change(self, conversion: Conversion, between: str = ", ") -> str:
        """Return "I → R", or "I → R on dp" where there are several axes; the others stay."""
        pairs = enumerate(zip(conversion.source, conversion.target, strict=True))
        return self.by_axes(
            ((f"{old} → {new}", axis) for axis, (old, new) in pairs if old != new), between
        )

    def split(self, parameter: ParameterChoice) -> str:
        """Say how a parameter is split, on which axes; "whole" if it is not.

        The split of the state is told, which is that of the storage unless ZeRO's first two
        stages are used.
        """
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
        """Return the name of a value's split for each op that reads it, also through views.

        Two readers may call it differently: a table that is also the last layer's weight is split
        by "rows of the table" and by "column". axis: the number of the mesh axis.
        """
        names = []
        for op, position in self.readers.get(value, ()):
            if not isinstance(op.operands[position][axis], Shard):
                if (value, op.name) in self.converted:
                    names.append("stored in parts, gathered for use (ZeRO-3)")
            elif is_unary(op) and len(op.makes) == 1:
                names += self.splits(op.makes[0], axis)
            else:
                names.append(_PHRASES.get(name := self._split(op, position, axis), name))
        return names

    def origin(self, value: str) -> str:
        """Return the value that this one is a view or a cast of, itself if it is none."""
        while (op := self.producers.get(value)) is not None and is_unary(op):
            value = op.reads[0]
        return value

    def role(self, op: OpChoice) -> str:
        """Return the name of an op's split, "column-parallel on tp"; empty if it has none."""
        return self.by_axes(
            (text, axis) for axis in range(len(self.axes)) if (text := self._role(op, axis))
        )

    def _role(self, op: OpChoice, axis: int) -> str:
        """Return the name of an op's split on one axis; a split parameter decides it if there is.

        Only products and ops with kernels have one: all others do the same to every part.
        """
        for position, value in enumerate(op.reads):
            split = isinstance(op.operands[position][axis], Shard)
            known = op.whole_flops or op.kernel(axis)
            if split and known and self.origin(value) in self.parameters:
                name = self._split(op, position, axis)
                return f"{name}-parallel" if name in _PHRASES else name
        if not op.whole_flops:
            return ""
        result = op.results[0][axis]
        if not isinstance(result, Shard):
            return ""
        how = _EXCHANGED.get(op.kernels[axis] if op.kernels else "", "")
        return f"split along dim {result.dim}" + (how and f", {how}")

    def _split(self, op: OpChoice, position: int, axis: int) -> str:
        """Return "row" or "column" where the split of an operand is one of these, else a phrase."""
        placement = op.operands[position][axis]
        assert isinstance(placement, Shard)
        if kernel := op.kernel(axis):
            return _KERNELS.get(kernel, f"dim {placement.dim}")
        if all(isinstance(result[axis], Partial) for result in op.results):
            return "row"
        # A bias is split as the product that it is added to; an expert's weight, as its tokens.
        others = (*op.operands[:position], *op.operands[position + 1 :])
        if not any(isinstance(other[axis], Shard) for other in others):
            return "column"
        if op.whole_flops:
            return f"dim {placement.dim}, each part with its part of the input"
        return "sharded like its activation"

    @staticmethod
    def _parts(shard: Shard) -> str:
        """Say in which blocks and runs a dim is split; empty for a plain split."""
        text = ""
        if isinstance(shard.blocks, tuple):
            text = f", in blocks as {':'.join(map(str, shard.blocks))}"
        elif shard.blocks > 1:
            text = f", in {shard.blocks} blocks"
        units = shard.unit if isinstance(shard.unit, tuple) else (shard.unit,)
        if max(units) > 1:
            text += f", in whole runs of {', '.join(map(str, units))}"
        repeats = shard.repeat if isinstance(shard.repeat, tuple) else (shard.repeat,)
        if max(repeats) > 1:
            text += f", each part on {', '.join(map(str, repeats))} ranks"
        return text


def is_unary(op: OpChoice) -> bool:
    """Return whether an op reads one operand, and is neither a product nor run by a kernel of ours.

    Views and casts are such ops. The op's placements then say nothing that those of its operand
    do not.
    """
    return len(op.reads) == 1 and not op.whole_flops and not any(op.kernels)


def _late_text(parameter: ParameterChoice, axis: int) -> str:
    """Name ZeRO's stage, 1 or 2, of a parameter on an axis (arXiv:1910.02054)."""
    if isinstance(parameter.gradient[axis], Shard):
        return "whole, its gradient and optimizer state in parts (ZeRO-2)"
    return "whole, its optimizer state in parts (ZeRO-1)"


def kind_of(layout: Layout) -> type[Placement]:
    """Return the kind of placement that colours a layout: pending sums first, then splits.

    >>> from autoparallel.placement import parse_layout
    >>> kind_of(parse_layout("I | S(0)")).__name__
    'Shard'
    """
    kinds = {type(placement) for placement in layout}
    order: tuple[type[Placement], ...] = (Partial, Shard, Replicate, Invariant)
    return next(kind for kind in order if kind in kinds)


def collective_text(collective: Collective) -> str:
    """Return a collective's name as the field writes it.

    >>> collective_text(Collective.ALL_REDUCE)
    'all-reduce'
    """
    return collective.value.replace("_", "-")


def op_text(target: str) -> str:
    """Return an operator's name without its library and overload.

    >>> op_text("aten.linear.default")
    'linear'
    """
    parts = target.split(".")
    return parts[1] if len(parts) > 2 else parts[0]
