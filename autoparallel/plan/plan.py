"""The plan: a placement for everything, what that costs, and how near it is to the optimum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autoparallel.errors import PlanError
from autoparallel.mesh import MICROBATCH, PIPELINE, Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan.choices import (
    Break,
    Conversion,
    OpChoice,
    ParameterChoice,
    Pipeline,
    PlannedInput,
)
from autoparallel.plan.plan_rows import broken_plan, read_rows
from autoparallel.support.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from autoparallel.graph.captured import Captured
    from autoparallel.graph.graph import Graph
    from autoparallel.threads import Threads

from autoparallel.plan.plan_agreement import require_agreement
from autoparallel.plan.plan_fields import fields_of_rows, parts_of_rows, rows_of_plan

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
    needs them. fills_gaps: whether the gradient of a weight may wait for the collective of another
    redistribution than that of the product's own operand, and be computed meanwhile; what it is
    computed of is kept until then. memory: (category, bytes) on the rank that needs most, as
    `memory_of` counts it; empty where nobody has counted it. collectives: (phase, mesh axis,
    collective, number in one step), as `collective_totals` counts them; None where nobody has.
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
    fills_gaps: bool = True
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

    def refuse_stages(self, what: str, fix: str = "") -> None:
        """Raise PlanError for a plan with stages. what: the thing that is not told of such a plan.
        fix: what to do instead, if anything but to look at what is told.

        Costs in it are those of one micro-batch on all stages, which no rank computes.
        """
        if self.pipeline is not None:
            raise PlanError(
                f"{what} is not told of a plan with stages",
                where=str(self.whole_mesh),
                why="a rank computes one stage, micro-batch after micro-batch, and not the whole "
                "model",
                fix=fix
                or "print(plan) tells of its stages; without pp in the mesh, everything is told",
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
        return json.dumps(rows_of_plan(self), indent=1) + "\n"

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

    @staticmethod
    def _from_rows(rows: Mapping[str, Any], inside: bool = False) -> Plan:
        """Return the plan of these rows. inside: whether it is the plan of a part, which has no
        parts of its own.

        Raises KeyError, TypeError and ValueError for rows that are not those of a plan.
        """
        values = fields_of_rows(rows)
        require_agreement(values)
        parts = parts_of_rows(rows)
        if inside and parts:
            raise ValueError("a part has parts")
        return Plan(
            **values,
            parts=tuple(Part(paths, Plan._from_rows(part, inside=True)) for paths, part in parts),
        )
