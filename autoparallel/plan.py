"""The plan: a placement for everything, what it costs, and how it was proven. JSON round-trips."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import (
    Layout,
    Movement,
    Step,
    layout_text,
    parse_layout,
    parse_placement,
)
from autoparallel.support.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from autoparallel.graph.captured import Captured
    from autoparallel.graph.graph import Graph

__all__ = ["Break", "Conversion", "OpChoice", "ParameterChoice", "Part", "Plan", "PlannedInput"]

VERSION = 2
_WRITE_AGAIN = "give the whole text that plan.to_json() wrote"


@dataclass(frozen=True, slots=True)
class OpChoice:
    """How one op runs. name, target, where, line: of its node. operands, results: layouts.

    reads, makes: names of the values, in the same order. kernels: per mesh axis, the communicating
    kernel that the op needs to be split on it, or "". seconds: predicted, forward and backward.
    forward_seconds: of the forward pass alone; an op that is run again counts it twice in seconds.
    flops: of products, forward, on the busiest rank; whole_flops: unsplit. discovered: the op's
    rule, if it was found by trial. reason: why a product is left whole, empty if it is split or no
    product. added: what the best plan that splits it would add to the cost.
    """

    name: str
    target: str
    where: str
    line: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]
    kernels: tuple[str, ...] = ()
    seconds: float = 0.0
    forward_seconds: float = 0.0
    flops: float = 0.0
    whole_flops: float = 0.0
    discovered: str = ""
    reason: str = ""
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class ParameterChoice:
    """How one parameter is stored. path: in the model. shape: of the whole. nbytes: likewise.

    storage: what is there between steps. state: what the optimizer updates, with its state; it is
    what the user sees. Where state is split and storage is not, the updated parts are gathered
    before the next step. gradient: how the gradient is held until then: on an axis where it is not
    split as the state is, it is reduced at the end of the backward pass only.
    ZeRO's stages on an axis are (storage, gradient, state) = (I, I, S), (I, S, S) and (S, S, S).
    reason: why it is left whole, empty if it is split. added: what the best plan that splits it
    would add to the cost; 0 where it is split, and where none does.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    nbytes: int
    storage: Layout
    gradient: Layout
    state: Layout
    reason: str = ""
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class Conversion:
    """A value made as `source` and read as `target` by `readers`, converted once, step by step.

    again: what it makes is dropped after the forward pass and made again in the backward pass.
    shape: of the whole value for the sizes planned for, as text ("s0, s1, 768"). nbytes: of the
    whole. seconds: predicted for both. together: a parameter's
    gradient, reduced at the end of the backward pass in one collective with others like it.
    """

    value: str
    source: Layout
    target: Layout
    steps: tuple[Step, ...]
    readers: tuple[str, ...]
    shape: str
    nbytes: int
    requires_grad: bool
    seconds: float = 0.0
    together: bool = False
    again: bool = False

    @property
    def moves(self) -> tuple[tuple[int, Movement, Movement], ...]:
        """Per step the axis, and what it does to the value and to the gradient."""
        return tuple(
            (step.axis, step.forward, step.backward if self.requires_grad else Movement.NONE)
            for step in self.steps
        )


@dataclass(frozen=True, slots=True)
class PlannedInput:
    """One tensor that goes in. name: of its node. path: the caller's name of it ("input_ids").

    dims: its sizes as conversions' shapes write them ("s95", "768"). given, planned: its sizes in
    the example inputs, and those planned for. is_integer: whether its elements are whole numbers.
    """

    name: str
    path: str
    dims: tuple[str, ...]
    given: tuple[int, ...]
    planned: tuple[int, ...]
    is_integer: bool = False


@dataclass(frozen=True, slots=True)
class Break:
    """A module whose forward stays the user's Python, run alike on all ranks.

    path: in the model, empty for the model itself. line: of the source, empty if unknown. reason:
    why it cannot be traced.
    """

    path: str
    line: str
    reason: str

    def __str__(self) -> str:
        line = f" ({self.line})" if self.line else ""
        return f"{self.path or 'the model itself'}: {self.reason}{line}"


@dataclass(frozen=True)
class Part:
    """A plan for the modules at `paths`, which are equal. What goes in and comes out is whole."""

    paths: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Plan:
    """A placement for everything.

    model: the class's name. cost: what was minimized; lower_bound: no plan costs less; method: how
    that is known. seconds: predicted time of a step's work that depends on the plan.
    product_weight: what a second of matrix products counted in the cost (1 unless the model is so
    small that leaving it whole would be the fastest; then as much as makes splitting pay).
    fingerprint: of the graph it was made for. outputs: placement of each returned tensor.
    captured: the graph itself, where the plan was made in this process.
    breaks: where the model cannot be traced whole, the modules that stay Python. parts: the plans
    of the others; ops, conversions and parameters are then those of all parts, named by the
    part's path, and those parameters besides that Python reads.
    recomputed: groups of neighbouring ops that are run again in the backward pass: of each, what it
    reads is kept, and what it makes is not. recompute: the blocks that they belong to, (path,
    "selective" or "full"). memory: (category, bytes) on the rank that needs most, as
    `memory_of` counts it; empty where nobody has counted it. collectives: (phase, mesh axis,
    collective, number in one step), as `collective_totals` counts them; None where nobody has.
    inputs: the tensors that go in. returned: what the caller calls each returned tensor
    ("logits"). Both are empty for a plan in parts, and one that was written without them.

    >>> import torch, autoparallel
    >>> layer, inputs = torch.nn.Linear(4096, 4096, bias=False), torch.zeros(512, 4096)
    >>> plan = autoparallel.make_plan(layer, 2, example_inputs=inputs, hardware="dgx-a100")
    >>> plan
    <Plan: Linear on Mesh(tp=2), 3.23 ms a step, proven optimal>
    >>> print(plan)
    model        Linear
    mesh         Mesh(tp=2), 2 ranks
    hardware     dgx-a100
    step         3.23 ms, predicted
    cost         0.00323134, lower bound 0.00323134: proven optimal
    method       variable elimination
    split        100.0% of the FLOPs of matrix products, 100.0% of the bytes of matrices
    memory       164.0 MiB on the rank that needs most
    collectives  1 (1 all-gather) in one step
    """

    model: str
    mesh: Mesh
    options: Options
    hardware: str
    fingerprint: str
    parameters: tuple[ParameterChoice, ...]
    ops: tuple[OpChoice, ...]
    conversions: tuple[Conversion, ...]
    outputs: tuple[Layout, ...]
    cost: float
    lower_bound: float
    method: str
    seconds: float
    product_weight: float
    captured: Captured | None = field(default=None, compare=False, repr=False)
    breaks: tuple[Break, ...] = ()
    parts: tuple[Part, ...] = ()
    recomputed: tuple[tuple[str, ...], ...] = ()
    recompute: tuple[tuple[str, str], ...] = ()
    memory: tuple[tuple[str, int], ...] = ()
    collectives: tuple[tuple[str, str, str, int], ...] | None = None
    inputs: tuple[PlannedInput, ...] = ()
    returned: tuple[str, ...] = ()

    def __repr__(self) -> str:
        step = f"{seconds_text(self.seconds)} a step"
        return f"<Plan: {self.model} on {self.mesh}, {step}, {self._proof}>"

    def __str__(self) -> str:
        """A dozen lines at most; `print_plan` tells all."""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        split = f"{self.split_flops:.1%} of the FLOPs of matrix products"
        rows = [
            ("model", self.model),
            ("mesh", f"{self.mesh}, {ranks}"),
            ("hardware", self.hardware),
            ("step", f"{seconds_text(self.seconds)}, predicted"),
            ("cost", f"{self.cost:.6g}, lower bound {self.lower_bound:.6g}: {self._proof}"),
            ("method", self.method),
            ("split", f"{split}, {self.split_parameter_bytes:.1%} of the bytes of matrices"),
        ]
        if self.memory:
            total = bytes_text(sum(nbytes for _, nbytes in self.memory))
            limit = self.memory_limit
            allowed = f" of {bytes_text(limit)} allowed" if limit is not None else ""
            rows.append(("memory", f"{total}{allowed} on the rank that needs most"))
        if self.collectives is not None:
            rows.append(("collectives", f"{self._collectives_text()} in one step"))
        blocks = sum(mode != "none" for _, mode in self.recompute)
        if blocks:
            rows.append(("recomputed", f"{blocks} block{'s' if blocks > 1 else ''}"))
        if self.breaks:
            rows.append(("plain Python", f"{len(self.breaks)} of its modules"))
        return "\n".join(f"{name:13}{text}" for name, text in rows)

    @property
    def _proof(self) -> str:
        """How near the cost is to the least possible."""
        gap = self.cost - self.lower_bound
        if gap <= 1e-9 * self.cost:
            return "proven optimal"
        return f"at most {gap / self.cost:.2%} above the optimum"

    def _collectives_text(self) -> str:
        counts: dict[str, int] = {}
        for _, axis, kind, count in self.collectives or ():
            name = kind.replace("_", "-")
            name += f" on {axis}" if len(self.mesh.axes) > 1 else ""
            counts[name] = counts.get(name, 0) + count
        each = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"{sum(counts.values())} ({each})" if counts else "none"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.mesh.world_size

    @property
    def memory_limit(self) -> int | None:
        """Bytes that a rank may use, if it was planned for a limit."""
        return self.options.memory_limit

    @property
    def storage(self) -> Mapping[str, Layout]:
        """How each parameter, by its path, is stored."""
        return {parameter.path: parameter.storage for parameter in self.parameters}

    @property
    def split_flops(self) -> float:
        """Share of the matrix products' FLOPs that belong to ops that are split."""
        whole = sum(op.whole_flops for op in self.ops)
        split = sum(op.whole_flops for op in self.ops if op.flops < op.whole_flops)
        return split / whole if whole else 1.0

    @property
    def split_parameter_bytes(self) -> float:
        """Share of the bytes of parameters of two dims and more that is split."""
        matrices = [p for p in self.parameters if len(p.shape) > 1]
        whole = sum(p.nbytes for p in matrices)
        return sum(p.nbytes for p in matrices if not p.reason) / whole if whole else 1.0

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The graphs that the plan is for; none where it was read from a text."""
        if self.captured is not None:
            return (self.captured.graph,)
        return tuple(graph for part in self.parts for graph in part.plan.graphs)

    @property
    def is_traced(self) -> bool:
        """Whether the graphs are there; a plan that was read has none."""
        if self.breaks:
            return all(part.plan.is_traced for part in self.parts)
        return self.captured is not None

    def to_json(self) -> str:
        """Versioned JSON, the same text for the same plan."""
        return json.dumps(self._rows(), indent=1) + "\n"

    def _rows(self) -> dict[str, Any]:
        rows: dict[str, Any] = {
            "version": VERSION,
            "model": self.model,
            "mesh": dict(self.mesh.axes),
            "options": {name: getattr(self.options, name) for name in Options.__slots__},
            "hardware": self.hardware,
            "fingerprint": self.fingerprint,
            "cost": self.cost,
            "lower_bound": self.lower_bound,
            "method": self.method,
            "seconds": self.seconds,
            "product_weight": self.product_weight,
            "outputs": [layout_text(layout) for layout in self.outputs],
            "parameters": [_row(parameter) for parameter in self.parameters],
            "ops": [_row(op) for op in self.ops],
            "conversions": [_row(conversion) for conversion in self.conversions],
            "recomputed": [list(group) for group in self.recomputed],
            "recompute": [list(item) for item in self.recompute],
            "memory": dict(self.memory),
        }
        if self.collectives is not None:
            rows["collectives"] = [list(row) for row in self.collectives]
        if self.inputs or self.returned:
            rows["inputs"] = [_row(item) for item in self.inputs]
            rows["returned"] = list(self.returned)
        if self.breaks:
            rows["breaks"] = [_row(item) for item in self.breaks]
            rows["parts"] = [
                {"paths": list(part.paths), "plan": part.plan._rows()} for part in self.parts
            ]
        return rows

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that was written. Raises PlanError for another version or a broken text."""
        try:
            rows = json.loads(text)
            version = rows["version"]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise PlanError(
                "not a plan", why="the text is not a plan's JSON", fix=_WRITE_AGAIN
            ) from None
        if version != VERSION:
            raise PlanError(f"a plan of version {version}", fix=f"plan again (version {VERSION})")
        try:
            return Plan._from_rows(rows)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                "not a plan", why=f"{type(error).__name__}: {error}", fix=_WRITE_AGAIN
            ) from None

    @staticmethod
    def _from_rows(rows: Mapping[str, Any]) -> Plan:
        return Plan(
            model=rows["model"],
            mesh=Mesh(**rows["mesh"]),
            options=Options(**rows["options"]),
            hardware=rows["hardware"],
            fingerprint=rows["fingerprint"],
            parameters=tuple(_load(ParameterChoice, row) for row in rows["parameters"]),
            ops=tuple(_load(OpChoice, row) for row in rows["ops"]),
            conversions=tuple(_load(Conversion, row) for row in rows["conversions"]),
            outputs=tuple(map(parse_layout, rows["outputs"])),
            cost=rows["cost"],
            lower_bound=rows["lower_bound"],
            method=rows["method"],
            seconds=rows["seconds"],
            product_weight=rows["product_weight"],
            recomputed=tuple(map(tuple, rows["recomputed"])),
            recompute=tuple((path, mode) for path, mode in rows["recompute"]),
            memory=tuple(rows["memory"].items()),
            collectives=_counts(rows.get("collectives")),
            inputs=tuple(_load(PlannedInput, row) for row in rows.get("inputs", ())),
            returned=tuple(rows.get("returned", ())),
            breaks=tuple(Break(**row) for row in rows.get("breaks", ())),
            parts=tuple(
                Part(tuple(part["paths"]), Plan._from_rows(part["plan"]))
                for part in rows.get("parts", ())
            ),
        )


def _counts(rows: list[Any] | None) -> tuple[tuple[str, str, str, int], ...] | None:
    """The collectives of a plan; None of a text that was written without them."""
    if rows is None:
        return None
    return tuple((phase, axis, kind, count) for phase, axis, kind, count in rows)


_LAYOUTS = {
    OpChoice: ("operands", "results"),
    ParameterChoice: ("storage", "gradient", "state"),
    Conversion: ("source", "target"),
}


def _row(item: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in type(item).__slots__:
        value = getattr(item, name)
        if name in _LAYOUTS.get(type(item), ()):
            many = not value or isinstance(value[0], tuple)
            value = list(map(layout_text, value)) if many else layout_text(value)
        elif name == "steps":
            value = [[step.axis, str(step.source), str(step.target)] for step in value]
        elif isinstance(value, tuple):
            value = list(value)
        made[name] = value
    return made


def _load(kind: Any, row: Mapping[str, Any]) -> Any:
    made: dict[str, Any] = {}
    for name, value in row.items():
        if name in _LAYOUTS.get(kind, ()):
            many = isinstance(value, list)
            made[name] = tuple(map(parse_layout, value)) if many else parse_layout(value)
        elif name == "steps":
            made[name] = tuple(
                Step(axis, parse_placement(source), parse_placement(target))
                for axis, source, target in value
            )
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)
