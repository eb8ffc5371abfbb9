"""From a model and what is asked of it to the fastest plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.capture.graph_breaks import GraphBreaks, trace, trace_parts
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import AliasError, CaptureError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import Mesh, arrangements
from autoparallel.options import Options
from autoparallel.placement import Layout, Placement, layout_text
from autoparallel.plan import Plan
from autoparallel.planning.search import search
from autoparallel.planning.traced_parts import search_parts
from autoparallel.support.units import parse_bytes

__all__ = [
    "fastest_plan",
    "make_options",
    "possible_meshes",
    "require_parameters",
    "trace_model",
    "with_graphs",
]


def make_options(
    mesh: Mesh | str | None,
    data_parallel: bool | None,
    memory_limit: int | str | None,
    recompute: str | None,
    own_inputs: bool,
    **others: Any,
) -> Options:
    """The options, with the defaults that depend on others.

    own_inputs: whether the example inputs are the user's own. Memory is counted for those as they
    are, however small; those that come with a model say nothing of the batch.
    """
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    if limit is not None and own_inputs:
        others["tokens"] = 1
    return Options(
        data_parallel=mesh is not None if data_parallel is None else data_parallel,
        memory_limit=limit,
        recompute=("none" if limit is None else "auto") if recompute is None else recompute,
        **others,
    )


def possible_meshes(
    world_size: int | None, mesh: Mesh | str | None, options: Options
) -> tuple[Mesh, ...]:
    """The arrangements of the ranks to choose from.

    Raises PlanError where their number is not told, or told twice, or no number of ranks.
    """
    if world_size is not None and (type(world_size) is not int or world_size < 1):
        raise PlanError(f"world_size={world_size!r}", fix="give a positive whole number of ranks")
    if isinstance(mesh, Mesh):
        if world_size is not None and world_size != mesh.world_size:
            raise PlanError(
                f"{mesh} has {mesh.world_size} ranks, and world_size={world_size} was asked for",
                fix="leave one of the two out",
            )
        return (mesh,)
    if mesh not in (None, "auto"):
        raise PlanError(f"mesh={mesh!r}", fix='pass mesh=Mesh(dp=2, tp=4), or mesh="auto"')
    if world_size is None:
        raise PlanError("over how many ranks?", fix="pass world_size=8, or mesh=Mesh(dp=2, tp=4)")
    if mesh is None:
        return (Mesh(tp=world_size),)
    return arrangements(world_size, find_hardware(options.hardware).devices_per_node)


def trace_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options
) -> Captured | GraphBreaks:
    """The graph of the model or, where there is none, those of its largest parts."""
    bind_inputs(model, args, kwargs)
    try:
        return trace(model, args, kwargs)
    except AliasError:
        raise
    except CaptureError as error:
        whole = error
    broken = trace_parts(model, args, kwargs, whole)
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
    """The fastest plan of all arrangements.

    Where none has a plan, raises the error of the one that needs least memory, else the first's.
    Raises PlanError for demands that no search could heed.
    """
    _require_clear(meshes, options, pins, product_weight, start)
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
    return best


def _require_clear(
    meshes: tuple[Mesh, ...],
    options: Options,
    pins: Mapping[str, Layout | Placement] | None,
    product_weight: float | None,
    start: Plan | None,
) -> None:
    if pins is not None and not isinstance(pins, Mapping):
        raise PlanError(f"pins={pins!r}", fix='give a table: {"encoder.weight": Shard(0)}')
    for path, pin in (pins or {}).items():
        placements = pin if isinstance(pin, tuple) else (pin,)
        if not all(isinstance(one, Placement) for one in placements):
            raise PlanError(
                f"{path} is pinned to {pin!r}, which is no placement",
                fix="give Shard(0), Invariant(), or a tuple with one for each axis",
            )
    if product_weight is not None:
        number = isinstance(product_weight, int | float) and not isinstance(product_weight, bool)
        if not number or not 0 < product_weight < math.inf:
            raise PlanError(f"product_weight={product_weight!r}", fix="give a positive number")
        if options.memory_limit is not None:
            raise PlanError(
                f"product_weight={product_weight!r} under a memory limit",
                why="what fits is planned for its seconds alone",
                fix="leave one of the two out",
            )
    if start is not None and not isinstance(start, Plan):
        raise PlanError(
            f"start is a {type(start).__name__}",
            fix="give a Plan; Plan.from_json(text) reads one",
        )
    if start is not None and start.mesh not in meshes:
        tried = ", ".join(map(str, meshes))
        raise PlanError(
            f"the plan to begin with is for another mesh, {start.mesh}",
            why=f"the ranks are arranged as {tried}",
            fix="begin with a plan of the same model, example inputs and mesh",
        )


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


def require_parameters(plan: Plan, model: nn.Module) -> None:
    """Raises PlanError for a plan of a model that has other parameters."""
    own = {path: tuple(p.shape) for path, p in model.named_parameters(remove_duplicate=False)}
    other = [
        f"{choice.path}: {choice.shape} in the plan, {own.get(choice.path, 'none')} in the model"
        for choice in plan.parameters
        if own.get(choice.path) != choice.shape
    ]
    if other:
        raise PlanError(
            f"the plan was made for another {plan.model}",
            where="\n".join(other[:5] + [f"and {len(other) - 5} more"] * (len(other) > 5)),
            why="its parameters are not those of this model",
            fix="plan again for this model",
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
