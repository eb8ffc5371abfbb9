"""From a model and what is asked of it to the fastest plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autoparallel.analysis.communication import collective_totals
from autoparallel.analysis.memory import memory_of
from autoparallel.capture.graph_breaks import GraphBreaks, trace, trace_parts
from autoparallel.capture.refused_inputs import refuse_arrays, refuse_inputs
from autoparallel.errors import AliasError, CaptureError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout, Placement, layout_text
from autoparallel.plan import Plan
from autoparallel.planning.request import require_clear
from autoparallel.planning.search import search
from autoparallel.planning.traced_parts import search_parts
from autoparallel.rules.lookup import find_rule

__all__ = ["fastest_plan", "trace_model", "with_graphs"]


def trace_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options
) -> Captured | GraphBreaks:
    """The graph of the model or, where there is none, those of its largest parts.

    Raises InputMismatchError for inputs that the model itself does not take.
    """
    refuse_arrays(model, args, kwargs)
    try:
        return trace(model, args, kwargs, known=find_rule)
    except AliasError:
        raise
    except CaptureError as error:
        whole = error
    refuse_inputs(model, args, kwargs)
    broken = trace_parts(model, args, kwargs, whole, known=find_rule)
    if options.strict_capture:
        raise CaptureError(
            f"{type(model).__name__} cannot be traced whole",
            where="\n".join(map(str, broken.breaks)),
            why="strict_capture=True asks for one graph",
            fix=f"{whole.fix};\nor leave strict_capture out: the submodules that can be traced are "
            "split, and the rest runs as it is",
        )
    return broken


def fastest_plan(
    model: nn.Module,
    traced: Captured | GraphBreaks,
    meshes: tuple[Mesh, ...],
    options: Options,
    pins: Mapping[str, Layout | Placement] | None = None,
    product_weight: float | None = None,
    start: Plan | None = None,
) -> Plan:
    """The fastest plan of all arrangements, with the memory and the collectives that it takes.

    Where none has a plan, raises the error of the one that needs least memory, else the first's.
    Raises PlanError for demands that no search could heed.
    """
    require_clear(meshes, options, pins, product_weight, start)
    best: Plan | None = None
    errors: list[PlanError] = []
    for mesh in meshes:
        try:
            begin = start if len(meshes) == 1 or (start and start.mesh == mesh) else None
            plan = _search(model, traced, mesh, options, pins, product_weight, begin)
        except PlanError as error:
            errors.append(error)
            continue
        if best is None or plan.seconds < best.seconds:
            best = plan
    if best is None:
        raise min(errors, key=lambda error: getattr(error, "least", math.inf))
    return _counted(best)


def _counted(plan: Plan) -> Plan:
    """The plan with what it takes and sends in a step, so that to tell it needs no graph."""
    # Under a memory limit it was counted to see whether the plan fits.
    memory = plan.memory or memory_of(plan).rows
    totals = collective_totals(plan)
    collectives = tuple((*key[:2], key[2].value, count) for key, (count, _) in totals.items())
    return replace(plan, memory=memory, collectives=collectives)


def _search(
    model: nn.Module,
    traced: Captured | GraphBreaks,
    mesh: Mesh,
    options: Options,
    pins: Mapping[str, Layout | Placement] | None = None,
    product_weight: float | None = None,
    start: Plan | None = None,
) -> Plan:
    given = {path: pin if isinstance(pin, tuple) else (pin,) for path, pin in (pins or {}).items()}
    for path, pin in given.items():
        if len(pin) != len(mesh.axes):
            raise PlanError(
                f"{path} is pinned to {layout_text(pin)} on a mesh of {len(mesh.axes)} axes",
                fix=f"give one placement for each of {', '.join(name for name, _ in mesh.axes)}",
            )
    if isinstance(traced, GraphBreaks):
        asked = [name for name in ("memory_limit", "constraints") if getattr(options, name)]
        asked += ["start"] * (start is not None)
        if asked:
            raise PlanError(
                f"{' and '.join(asked)}: not for a model that is planned in parts",
                where="\n".join(map(str, traced.breaks)),
                why="each part is planned by itself",
                fix="make the model traceable whole, or plan it without",
            )
        return search_parts(traced, model, mesh, options, given, product_weight)
    name = type(model).__name__
    return search(
        traced, name, mesh, options, pins=given, product_weight=product_weight, start=start
    )


def with_graphs(plan: Plan, traced: Captured | GraphBreaks) -> Plan:
    """The plan with the graphs that it was made for. Raises PlanError where they are others."""
    own = traced.fingerprint if isinstance(traced, GraphBreaks) else traced.graph.fingerprint
    if own != plan.fingerprint:
        raise PlanError(
            f"the plan was made for another {plan.model}",
            why="the traced program differs from the one planned for",
            fix="plan again, or pass the example_inputs and the mode (train, eval) planned for",
        )
    if isinstance(traced, Captured):
        return replace(plan, captured=traced)
    known = {path: part.captured for part in traced.parts for path in part.paths}
    parts = (
        replace(part, plan=replace(part.plan, captured=known[part.paths[0]])) for part in plan.parts
    )
    return replace(plan, parts=tuple(parts))
