"""The plan: a placement for everything, what that costs, and how near it is to the optimum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from autoparallel.errors import PlanError
from autoparallel.mesh import MICROBATCH, PIPELINE, Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout, layout_text
from autoparallel.plan.choices import (
    Break,
    Conversion,
    OpChoice,
    ParameterChoice,
    Pipeline,
    PlannedInput,
)
from autoparallel.plan.plan_rows import VERSION, broken_plan, read_rows, row_of, typed, value_of
from autoparallel.support.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from autoparallel.graph.captured import Captured
    from autoparallel.graph.graph import Graph
    from autoparallel.threads import Threads

__all__ = ["Part", "Plan"]


@dataclass(frozen=True)
class Part:
    """A Part is a plan for equal modules within a model that is not traced whole.

    paths: of the modules, in the model. plan: one for all of them. Whatever goes into such a module
    and comes out of it is whole on all ranks.
    """

    paths: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Plan:
    """A Plan fixes a placement for every tensor of a model, and says what a step then costs.

    model: the name of the model's class. mesh, options, hardware: what was planned for.
    fingerprint: of the graph, by which a plan that was read is matched to a model. parameters,
    ops, conversions: the choices, in the graph's order. outputs: the layout of each returned
    tensor.
    cost: what was minimized, in seconds weighted by product_weight. lower_bound: no plan costs
    less. method: how that is known, and which plans were compared. seconds: predicted times of the
    parts of a step that depend on the plan, added up. step_seconds: predicted time of the step, in
    which they overlap; step_bound: no plan's is less, as far as known. Both are 0 for a plan of
    which nobody has told a timeline. device_nbytes: the memory of one device of the hardware; 0
    where nobody has told it. product_weight: how many seconds a second of matrix products counted
    in the cost. It is 1 unless the model is so small that leaving it whole would be the fastest;
    then it is as large as makes splitting pay.
    captured: the graph itself, where the plan was made in this process; it is not compared.
    breaks: where the model cannot be traced whole, the modules that stay Python. parts: the plans
    of the others; ops, conversions and parameters are then those of all parts, named by the
    part's path, and besides those parameters that the Python reads.
    recomputed: groups of neighbouring ops that are run again in the backward pass: of each group,
    the values that it reads are saved for the backward pass, and those that it makes are not.
    recompute: the blocks that they belong to, as (path, "selective" or "full"). remade: ops of such
    blocks whose results are not saved either, but made again one by one where the backward pass
    needs them. memory: (category,
    bytes) on the rank that needs most, as `memory_of` counts it; empty where nobody has counted
    it. collectives: (phase, mesh axis, collective, number in one step), as `collective_totals`
    counts them; None where nobody has.
    pipeline: the stages that the ops are cut into; None where all ranks compute all ops. Layouts
    then have a first axis in time, whose places are the micro-batches, and none for the stages:
    what a stage computes, its ranks alone hold; see `stage_mesh`.
    inputs: the tensors that go in. returned: the caller's name for each returned tensor
    ("logits"). Both are empty for a plan in parts, and for one that was written without them.
    memory_price: under a memory limit, the seconds of cost that the search charged for a byte when
    it ended: about what a byte more would save. 0 where nothing has to give way to the limit.
    request: (name, text) of the command line that asked for the plan, by which a command builds the
    model again; empty for a plan that Python asked for.

    >>> import torch, autoparallel
    >>> layer, inputs = torch.nn.Linear(4096, 4096, bias=False), torch.zeros(512, 4096)
    >>> plan = autoparallel.make_plan(layer, 2, example_inputs=inputs, hardware="dgx-a100")
    >>> plan
    <Plan: Linear on Mesh(tp=2), 3.23 ms a step, proven least>
    >>> print(plan)
    model        Linear
    mesh         Mesh(tp=2), 2 ranks
    hardware     dgx-a100
    step         3.23 ms, predicted, proven least
    cost         0.00323134, lower bound 0.00323134: proven optimal
    method       variable elimination
    split        100.0% of the FLOPs of matrix products, 100.0% of the bytes of matrices
    memory       164.0 MiB on the rank that needs most
    collectives  1 all-gather in one step
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
    remade: tuple[str, ...] = ()
    memory: tuple[tuple[str, int], ...] = ()
    collectives: tuple[tuple[str, str, str, int], ...] | None = None
    inputs: tuple[PlannedInput, ...] = ()
    returned: tuple[str, ...] = ()
    pipeline: Pipeline | None = None
    step_seconds: float = 0.0
    step_bound: float = 0.0
    memory_price: float = 0.0
    device_nbytes: int = 0
    request: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    # True of what the planner itself has returned in this process: a copy with changes is another
    # plan, and is checked against the rules when it is applied, as one that was read is.
    is_checked: bool = field(default=False, init=False, compare=False, repr=False)

    def __repr__(self) -> str:
        """Return one short line; the fields would fill pages."""
        step = f"{seconds_text(self.step)} a step"
        return (
            f"<Plan: {self.model} on {self.whole_mesh}, {step}, {self.step_proof or self._proof}>"
        )

    def __str__(self) -> str:
        """Return a dozen lines at most; `print_plan` prints everything."""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        split = f"{self.split_flops:.1%} of the FLOPs of matrix products"
        step = (seconds_text(self.step), "predicted")
        rows = [
            ("model", self.model),
            ("mesh", f"{self.whole_mesh}, {ranks}"),
            ("hardware", self.hardware),
            ("step", ", ".join(filter(None, (*step, self.step_proof)))),
            ("cost", f"{self.cost:.6g}, lower bound {self.lower_bound:.6g}: {self._proof}"),
            ("method", self.method),
            ("split", f"{split}, {self.split_parameter_bytes:.1%} of the bytes of matrices"),
        ]
        if self.pipeline is not None:
            rows.insert(2, ("pipeline", str(self.pipeline)))
        if self.memory:
            total = bytes_text(sum(nbytes for _, nbytes in self.memory))
            limit = self.memory_limit
            allowed = f" of {bytes_text(limit)} allowed" if limit is not None else ""
            rows.append(("memory", f"{total}{allowed} on the rank that needs most"))
            if self.memory_price:
                saved = seconds_text(self.memory_price * 2**30)
                rows.append(("", f"at this limit, a byte more saves {saved} a GiB"))
            if self.excess_nbytes:
                rows.append(("", f"MORE THAN A DEVICE HAS: {bytes_text(self.device_nbytes)}"))
        if self.collectives is not None:
            rows.append(("collectives", self._collectives_text()))
        blocks = sum(mode != "none" for _, mode in self.recompute)
        if blocks:
            rows.append(("recomputed", f"{blocks} block{'s' if blocks > 1 else ''}"))
        if self.breaks:
            rows.append(("plain Python", f"{len(self.breaks)} of its modules"))
        return "\n".join(f"{name:13}{text}" for name, text in rows)

    @property
    def _proof(self) -> str:
        """Say how near the cost is to the lower bound."""
        gap = self.cost - self.lower_bound
        # Both are sums of the same seconds in another order, so that they differ by roundings.
        if gap <= 1e-9 * self.cost or not self.cost:
            return "proven optimal"
        return f"at most {gap / self.cost:.2%} above the optimum"

    @property
    def step(self) -> float:
        """The predicted seconds of a step; their sum, where nobody has told a timeline."""
        return self.step_seconds or self.seconds

    @property
    def step_proof(self) -> str:
        """The words for how near the step is to the least of any plan; "" where that is unknown."""
        if not self.step_bound:
            return ""
        above = self.step_seconds / self.step_bound - 1
        return "proven least" if above <= 1e-9 else f"at most {above:.2%} above the least"

    def _collectives_text(self) -> str:
        """Count the collectives of one step, all phases together: "3: 2 all-gather, ...".

        A single kind is told without the total.
        """
        counts: dict[str, int] = {}
        for _, axis, kind, count in self.collectives or ():
            name = kind.replace("_", "-")
            name += f" on {axis}" if len(self.mesh.axes) > 1 else ""
            counts[name] = counts.get(name, 0) + count
        each = ", ".join(f"{count} {name}" for name, count in counts.items())
        if len(counts) > 1:
            return f"{sum(counts.values())} in one step: {each}"
        return f"{each or 'none'} in one step"

    @property
    def world_size(self) -> int:
        """The number of ranks in the mesh."""
        return self.whole_mesh.world_size

    @property
    def whole_mesh(self) -> Mesh:
        """The mesh of all ranks, with the axis of stages where there is one."""
        if self.pipeline is None:
            return self.mesh
        return Mesh(**{PIPELINE: self.pipeline.ranks}, **dict(self.stage_mesh.axes))

    @property
    def stage_mesh(self) -> Mesh:
        """The mesh of the ranks that hold a parameter together: all, or those of one stage."""
        if self.pipeline is None:
            return self.mesh
        return Mesh(**{name: size for name, size in self.mesh.axes if name != MICROBATCH})

    def refuse_stages(self, what: str) -> None:
        """Raise PlanError for a plan with stages. what: the thing that is not told of such a plan.

        Costs in it are those of one micro-batch on all stages, which no rank computes.
        """
        if self.pipeline is not None:
            raise PlanError(
                f"{what} is not told of a plan with stages",
                where=str(self.whole_mesh),
                why="a rank computes one stage, micro-batch after micro-batch, and not the whole "
                "model",
                fix="print(plan) tells of its stages; without pp in the mesh, everything is told",
            )

    @property
    def excess_nbytes(self) -> int:
        """The bytes that the plan takes beyond the memory of a device; 0 where it fits."""
        if not self.device_nbytes:
            return 0
        return max(sum(nbytes for _, nbytes in self.memory) - self.device_nbytes, 0)

    @property
    def memory_limit(self) -> int | None:
        """The bytes that a rank may use; None where the plan was made without a limit."""
        return self.options.memory_limit

    @property
    def held_parameters(self) -> tuple[ParameterChoice, ...]:
        """The choices for parameters, with layouts on the mesh of the ranks that hold them."""
        if self.pipeline is None:
            return self.parameters
        return tuple(
            replace(
                choice,
                storage=choice.storage[1:],
                gradient=choice.gradient[1:],
                state=choice.state[1:],
            )
            for choice in self.parameters
        )

    @property
    def storage(self) -> Mapping[str, Layout]:
        """The layout of each parameter between optimizer steps, by the parameter's path."""
        return {parameter.path: parameter.storage for parameter in self.parameters}

    @property
    def split_flops(self) -> float:
        """The share of the matrix products' FLOPs in ops that are split, from 0 to 1.

        It is 1 where there are no matrix products. Those of modules that stay Python are not split.
        """
        whole = sum(op.whole_flops for op in self.ops)
        split = sum(op.whole_flops for op in self.ops if op.flops < op.whole_flops)
        traced = max(0.0, 1 - sum(stays.flops for stays in self.breaks))
        return traced * (split / whole if whole else 1.0)

    @property
    def split_parameter_bytes(self) -> float:
        """The share of the bytes of split parameters, from 0 to 1; vectors are not counted.

        It is 1 where there are no parameters of two and more dims.
        """
        matrices = [p for p in self.parameters if len(p.shape) > 1]
        whole = sum(p.nbytes for p in matrices)
        return sum(p.nbytes for p in matrices if not p.reason) / whole if whole else 1.0

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The graphs that the plan is for; there are none where it was read from a text."""
        if self.captured is not None:
            return (self.captured.graph,)
        return tuple(graph for part in self.parts for graph in part.plan.graphs)

    @property
    def is_traced(self) -> bool:
        """True if the graphs are there; a plan that was read has none."""
        if self.breaks:
            return all(part.plan.is_traced for part in self.parts)
        return self.captured is not None

    def threads(self) -> Threads:
        """Return the threads of the model: every dim, followed through the dataflow.

        They are those of the program, whatever is split; `autoparallel.thread_splits` tells which
        of them the plan splits. Raises PlanError where the plan was read from a text, and has no
        graph, and where it is in parts, each of which has threads of its own.

        >>> import torch, autoparallel
        >>> layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
        >>> plan = autoparallel.make_plan(layers, 2, example_inputs=torch.ones(8, 64))
        >>> threads = plan.threads()
        >>> threads.names
        ('feed-forward', 'features', 'batch')
        >>> threads.shape("linear")
        '[batch, feed-forward]'
        """
        from autoparallel.threads import find_threads

        if self.captured is None:
            raise PlanError(
                "the plan is in parts" if self.parts else "the plan has no graph",
                why="each part has threads of its own"
                if self.parts
                else "it was read from a text, or nothing of the model could be traced",
                fix="ask part.plan.threads() for each of plan.parts"
                if self.parts
                else "plan again with the model and example inputs",
            )
        return find_threads(self.captured.graph, {item.name: item.path for item in self.inputs})

    def to_json(self) -> str:
        """Return the plan as versioned JSON, the same text for the same plan.

        The graph is not in it: what needs the graph, as applying the plan does, traces the model.
        """
        return json.dumps(self._rows(), indent=1) + "\n"

    def checked(self) -> Plan:
        """Return the plan, marked as one that follows the rules of its ops; see `is_checked`."""
        object.__setattr__(self, "is_checked", True)
        return self

    @staticmethod
    def from_json(text: str) -> Plan:
        """Return the plan that `to_json` has written as `text`; it has no graph.

        Raises PlanError for another version and for a text that is broken. Whether the plan fits a
        model, and is one by the rules of its ops, is checked when it is applied.
        """
        rows = read_rows(text)
        try:
            return Plan._from_rows(rows)
        except (KeyError, TypeError, ValueError) as error:
            why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise broken_plan(why) from None

    def _rows(self) -> dict[str, Any]:
        """Return what JSON is to hold; keys that not every text has are last."""
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
            "parameters": [row_of(parameter) for parameter in self.parameters],
            "ops": [row_of(op) for op in self.ops],
            "conversions": [row_of(conversion) for conversion in self.conversions],
            "recomputed": [list(group) for group in self.recomputed],
            "recompute": [list(item) for item in self.recompute],
            "memory": dict(self.memory),
        }
        for name in (*_TOLD, "device_nbytes"):
            if getattr(self, name):
                rows[name] = getattr(self, name)
        if self.remade:
            rows["remade"] = list(self.remade)
        if self.collectives is not None:
            rows["collectives"] = [list(row) for row in self.collectives]
        if self.inputs or self.returned:
            rows["inputs"] = [row_of(item) for item in self.inputs]
            rows["returned"] = list(self.returned)
        if self.pipeline is not None:
            rows["pipeline"] = row_of(self.pipeline)
        if self.request:
            rows["request"] = dict(self.request)
        if self.breaks:
            rows["breaks"] = [row_of(item) for item in self.breaks]
            rows["parts"] = [
                {"paths": list(part.paths), "plan": part.plan._rows()} for part in self.parts
            ]
        return rows

    @staticmethod
    def _from_rows(rows: Mapping[str, Any], inside: bool = False) -> Plan:
        """Return the plan of these rows; keys that not every text has may be absent.

        inside: whether it is the plan of a part, which has no parts of its own. Raises KeyError,
        TypeError and ValueError for rows that are not those of a plan.
        """
        unknown = [key for key in rows if key not in _KEYS]
        if unknown:
            raise ValueError(f"a plan has no {unknown[0]!r:.60}")
        simple = {name: typed(kind, rows[name], name) for name, kind in _SCALARS.items()}
        simple |= {name: typed("float", rows.get(name, 0.0), name) for name in _TOLD}
        counts = rows.get("collectives")
        parts = _list(rows.get("parts", []), "parts")
        if inside and parts:
            raise ValueError("a part has parts")
        return Plan(
            **simple,
            mesh=_mesh(rows["mesh"]),
            device_nbytes=typed("int", rows.get("device_nbytes", 0), "device_nbytes"),
            options=_options(rows["options"]),
            parameters=_values(ParameterChoice, rows["parameters"]),
            ops=_values(OpChoice, rows["ops"]),
            conversions=_values(Conversion, rows["conversions"]),
            outputs=typed("tuple[Layout, ...]", rows["outputs"], "outputs"),
            recomputed=typed("tuple[tuple[str, ...], ...]", rows["recomputed"], "recomputed"),
            recompute=_table_of(rows["recompute"], "recompute", "str", "str"),
            remade=typed("tuple[str, ...]", rows.get("remade", []), "remade"),
            memory=_table_of(
                [list(row) for row in _table(rows["memory"], "memory").items()],
                *("memory", "str", "int"),
            ),
            # None says that nobody has counted; an empty tuple, that there are none.
            collectives=None
            if counts is None
            else _table_of(counts, "collectives", "str", "str", "str", "int"),
            inputs=_values(PlannedInput, rows.get("inputs", [])),
            returned=typed("tuple[str, ...]", rows.get("returned", []), "returned"),
            pipeline=value_of(Pipeline, rows["pipeline"]) if "pipeline" in rows else None,
            request=_table_of(
                [list(row) for row in _table(rows.get("request", {}), "request").items()],
                *("request", "str", "str"),
            ),
            breaks=_values(Break, rows.get("breaks", [])),
            parts=tuple(
                Part(
                    typed("tuple[str, ...]", part["paths"], "paths"),
                    Plan._from_rows(_table(part["plan"], "plan"), inside=True),
                )
                for part in (_table(item, "parts") for item in parts)
            ),
        )


# The fields that are a single value, with their types.
_SCALARS = {
    "model": "str",
    "hardware": "str",
    "fingerprint": "str",
    "cost": "float",
    "lower_bound": "float",
    "method": "str",
    "seconds": "float",
    "product_weight": "float",
}
# Numbers that not every text has.
_TOLD = ("step_seconds", "step_bound", "memory_price")
# All keys of a plan's rows: a key that is misspelt would be left out without a word.
_KEYS = {
    *_SCALARS,
    *_TOLD,
    "device_nbytes",
    *"version mesh options parameters ops conversions outputs recomputed recompute memory".split(),
    *"collectives inputs returned request breaks parts pipeline remade".split(),
}
_OPTIONS = {
    field.name: str(field.type)
    for field in fields(Options)
    if field.name not in ("memory_limit", "microbatches")
}
# Ranks in all that a plan may be for: those that run are compared with it, and counted by it.
_MOST_RANKS = 2**24


def _table(content: Any, what: str) -> dict[str, Any]:
    """Return a table of named entries. Raises TypeError for anything else."""
    if not isinstance(content, dict):
        raise TypeError(f"{what} is no table")
    return content


def _list(content: Any, what: str) -> list[Any]:
    """Return a list. Raises TypeError for anything else."""
    if not isinstance(content, list):
        raise TypeError(f"{what} is no list")
    return content


def _values(kind: Any, rows: Any) -> tuple[Any, ...]:
    """Return the frozen values of a list of rows."""
    return tuple([value_of(kind, row) for row in _list(rows, kind.__name__)])


def _table_of(rows: Any, what: str, *kinds: str) -> tuple[Any, ...]:
    """Return rows of as many values as there are types."""
    lists = [_list(row, what) for row in _list(rows, what)]
    return tuple(
        tuple(typed(kind, item, what) for kind, item in zip(kinds, row, strict=True))
        for row in lists
    )


def _mesh(rows: Any) -> Mesh:
    """Return the mesh of these axes."""
    mesh = Mesh(**_table(rows, "mesh"))
    if mesh.world_size > _MOST_RANKS:
        raise ValueError(f"mesh has {mesh.world_size} ranks")
    return mesh


def _options(rows: Any) -> Options:
    """Return the options of these entries; those that are missing have their defaults."""
    rows = dict(_table(rows, "options"))
    limit, count = rows.pop("memory_limit", None), rows.pop("microbatches", None)
    seconds = rows.pop("seconds", None)
    unknown = [name for name in rows if name not in _OPTIONS]
    if unknown:
        raise ValueError(f"there is no option {unknown[0]!r:.60}")
    return Options(
        **{name: typed(_OPTIONS[name], content, name) for name, content in rows.items()},
        memory_limit=None if limit is None else typed("int", limit, "memory_limit"),
        microbatches=None if count is None else typed("int", count, "microbatches"),
        seconds=None if seconds is None else typed("float", seconds, "seconds"),
    )
