"""Plans of a model that is traced in parts: one for each kind of part, and their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autoparallel.capture.graph_breaks import GraphBreaks, TracedPart
from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout, layout_text, whole_layout
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Part, Plan
from autoparallel.planning.request import require_known
from autoparallel.planning.search import search

__all__ = ["search_parts"]


def search_parts(
    broken: GraphBreaks,
    model: nn.Module,
    mesh: Mesh,
    options: Options,
    pins: Mapping[str, Layout] | None = None,
    product_weight: float | None = None,
) -> Plan:
    """Return the plans of least cost of all parts, and one plan that sums them up.

    broken: the traced parts, and where the model stays Python. model: for the parameters that no
    part holds, which are whole. Other arguments and errors: those of `search`.
    A parameter of several parts is stored as the first of them wants it, or whole where another
    cannot take it so: then all parts are planned again.
    """
    require_known(pins, broken.aliases)
    pinned = {broken.aliases[path]: pin for path, pin in (pins or {}).items()}
    # Each attempt that fails adds to `whole`, so that the loop ends.
    whole: set[str] = set()
    while True:
        planner = _Planner(broken, mesh, options, pinned, product_weight, whole)
        parts = planner.plan()
        if parts is not None:
            break
    return _sum(broken, model, mesh, options, tuple(parts), pinned)


class _Planner:
    """One attempt to plan all parts, each with the layouts that the parts before it decided on.

    pins: layouts of parameters, by path in the model. whole: shared parameters that are whole,
    because no two parts could agree on them; it grows where an attempt fails. decided: layouts of
    parameters so far, by path in the model.
    """

    def __init__(
        self,
        broken: GraphBreaks,
        mesh: Mesh,
        options: Options,
        pins: Mapping[str, Layout],
        product_weight: float | None,
        whole: set[str],
    ) -> None:
        self.broken, self.mesh, self.options = broken, mesh, options
        self.pins, self.product_weight, self.whole = pins, product_weight, whole
        invariant = whole_layout(len(mesh.axes))
        self.decided: dict[str, Layout] = dict.fromkeys(sorted(whole), invariant)

    def plan(self) -> list[Part] | None:
        """Return the parts' plans, None where more parameters turned out to have to be whole."""
        planned: dict[int, list[Part]] = {}
        for traced in self.in_order():
            # Equal parts share a plan where the same is decided of their parameters.
            known: dict[Any, tuple[list[str], Plan]] = {}
            for path in traced.paths:
                stored, pins = self.demands(path, traced)
                key = (tuple(stored.items()), tuple(pins.items()))
                if key not in known:
                    try:
                        plan = self.search(path, traced, stored, pins)
                    except PlanError:
                        # It fails for what is decided of its parameters, or else by itself.
                        held = {self.full(path, inner) for inner in stored}
                        if held <= self.whole:
                            raise
                        self.whole |= held
                        return None
                    known[key] = ([], plan)
                known[key][0].append(path)
                for inner, layout in known[key][1].storage.items():
                    self.decided.setdefault(self.full(path, inner), layout)
            planned[id(traced)] = [Part(tuple(paths), plan) for paths, plan in known.values()]
        return [part for traced in self.broken.parts for part in planned[id(traced)]]

    def in_order(self) -> list[TracedPart]:
        """Return the parts in the order in which they are planned.

        Of the parts that share parameters, the one that computes most, in FLOPs, comes first and
        decides on their layouts. Those that share none come last, in the order of the model.
        """
        readers: dict[str, int] = {}
        for traced in self.broken.parts:
            for path in traced.paths:
                for inner in dict.fromkeys(traced.captured.aliases.values()):
                    full = self.full(path, inner)
                    readers[full] = readers.get(full, 0) + 1
        work: dict[int, float] = {}
        for index, traced in enumerate(self.broken.parts):
            path = traced.paths[0]
            inside = traced.captured.aliases.values()
            if any(readers[self.full(path, inner)] > 1 for inner in inside):
                # FLOPs do not depend on what is decided of parameters: a plan without tells them.
                alone = self.search(path, traced, {}, {})
                work[index] = sum(op.whole_flops for op in alone.ops)
        order = sorted(range(len(self.broken.parts)), key=lambda index: -work.get(index, 0.0))
        return [self.broken.parts[index] for index in order]

    def demands(self, path: str, traced: TracedPart) -> tuple[dict[str, Layout], dict[str, Layout]]:
        """Return the layouts that are decided of a part's parameters, and those that are pinned.

        Both are by the parameters' paths in the part, which is at `path`.
        """
        stored: dict[str, Layout] = {}
        pins: dict[str, Layout] = {}
        for inner in dict.fromkeys(traced.captured.aliases.values()):
            full = self.full(path, inner)
            if full in self.decided:
                stored[inner] = self.decided[full]
            elif full in self.pins:
                pins[inner] = self.pins[full]
        return stored, pins

    def full(self, path: str, inner: str) -> str:
        """Return the first path in the model of a parameter that is at `inner` in a part."""
        return self.broken.aliases[f"{path}.{inner}"]

    def search(
        self,
        path: str,
        traced: TracedPart,
        stored: Mapping[str, Layout],
        pins: Mapping[str, Layout],
    ) -> Plan:
        """Plan a part by itself. An error says besides of which part it is."""
        try:
            return search(
                traced.captured,
                path,
                self.mesh,
                self.options,
                stored=stored,
                pins=pins,
                product_weight=self.product_weight,
            )
        except AutoParallelError as error:
            error.add_note(f"while planning {path}, a part of a model that is not traced whole")
            raise


def _sum(
    broken: GraphBreaks,
    model: nn.Module,
    mesh: Mesh,
    options: Options,
    parts: tuple[Part, ...],
    pins: Mapping[str, Layout],
) -> Plan:
    """Return one plan that tells of all parts: their rows under the names of the model.

    A part that stands in the model several times has its rows as many times.
    """
    parameters: dict[str, ParameterChoice] = {}
    ops: list[OpChoice] = []
    conversions: list[Conversion] = []
    for path, plan in ((path, part.plan) for part in parts for path in part.paths):
        rename = _renaming(broken, path, plan)
        for choice in plan.parameters:
            full = broken.aliases[f"{path}.{choice.path}"]
            named = replace(choice, name=rename(choice.name), path=full)
            parameters.setdefault(full, named)
        for op in plan.ops:
            renamed = replace(
                op,
                name=rename(op.name),
                where=f"{path}.{op.where}" if op.where else path,
                reads=tuple(map(rename, op.reads)),
                makes=tuple(map(rename, op.makes)),
            )
            ops.append(renamed)
        for conversion in plan.conversions:
            readers = tuple(map(rename, conversion.readers))
            moved = replace(conversion, value=rename(conversion.value), readers=readers)
            conversions.append(moved)
    invariant = whole_layout(len(mesh.axes))
    for path, parameter in model.named_parameters():
        if path not in parameters:
            if pins.get(path, invariant) != invariant:
                raise PlanError(
                    f"parameter {path} cannot be stored as {layout_text(pins[path])}",
                    why="it belongs to a module that stays Python, which reads it whole",
                    fix=f"leave {path} out of pins",
                )
            size = parameter.numel() * parameter.element_size()
            shape = tuple(parameter.shape)
            reason = "its module stays Python"
            row = ParameterChoice(path, path, shape, size, invariant, invariant, invariant, reason)
            parameters[path] = row
    plans = [part.plan for part in parts]
    counts = [len(part.paths) for part in parts]
    methods = ", ".join(dict.fromkeys(plan.method for plan in plans))

    def total(number: Callable[[Plan], float]) -> float:
        """Add up a number of the parts' plans, each as often as the part is there."""
        return sum(number(plan) * count for plan, count in zip(plans, counts, strict=True))

    return Plan(
        model=type(model).__name__,
        mesh=mesh,
        options=options,
        hardware=plans[0].hardware,
        fingerprint=broken.fingerprint,
        parameters=tuple(parameters.values()),
        ops=tuple(ops),
        conversions=tuple(conversions),
        outputs=(),
        cost=total(lambda plan: plan.cost),
        lower_bound=total(lambda plan: plan.lower_bound),
        method=f"the sum of {sum(counts)} parts; {methods}",
        seconds=total(lambda plan: plan.seconds),
        step_seconds=total(lambda plan: plan.step),
        step_bound=total(lambda plan: plan.step_bound),
        product_weight=max(plan.product_weight for plan in plans),
        breaks=broken.breaks,
        parts=parts,
    )


def _renaming(broken: GraphBreaks, path: str, plan: Plan) -> Callable[[str], str]:
    """Return a function from names of a part's values and ops to those in the sum.

    A parameter has the name of its path in the model, so that parts that share it name it alike.
    """
    parameters = {
        choice.name: broken.aliases[f"{path}.{choice.path}"] for choice in plan.parameters
    }

    def rename(name: str) -> str:
        """Return the name in the sum. "return" and "write PATH" are readers that are no ops."""
        if name == "return":
            return name
        if name.startswith("write "):
            return f"write {path}.{name.removeprefix('write ')}"
        return parameters.get(name) or f"{path}/{name}"

    return rename
