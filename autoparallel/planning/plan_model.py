"""Plans of a model: traced once, planned for every mesh, the one of the shortest step taken."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn

from autoparallel.analysis.communication import collective_totals
from autoparallel.analysis.memory import memory_of
from autoparallel.capture.graph_breaks import GraphBreaks, trace_parts
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import AliasError, CaptureError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import PIPELINE, Mesh, finer
from autoparallel.options import Options
from autoparallel.placement import Layout, Placement, layout_text
from autoparallel.plan import Plan
from autoparallel.planning.kept_plans import is_on, key_of, load, store
from autoparallel.planning.pipeline_estimates import Estimator
from autoparallel.planning.pipeline_meshes import best_mesh, estimator_of, likely_meshes
from autoparallel.planning.pipelines import is_pipeline, pipeline_plan
from autoparallel.planning.planning_progress import planning_progress
from autoparallel.planning.request import require_clear, require_known
from autoparallel.planning.search import search
from autoparallel.planning.stage_cuts import with_memory
from autoparallel.planning.traced_parts import search_parts
from autoparallel.planning.whole_trace import trace_whole
from autoparallel.rules.lookup import find_rule
from planners.effort import Effort, current, effort

__all__ = ["fastest_plan", "trace_model"]

# Seconds of planning from which on a plan is kept: to read one takes some tenths of that.
_WORTH_KEEPING = 1.0
# Of more meshes than these, those are planned in full that estimates say are quickest; within a
# memory limit, where a plan takes as long as several without, of meshes with more ops together.
_MOST_IN_FULL, _MOST_OPS = 6, 10_000


def trace_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options
) -> Captured | GraphBreaks:
    """Return the graph of the model or, where it cannot be traced whole, of its largest parts.

    args, kwargs: the example inputs. Raises InputMismatchError for inputs that the model itself
    does not take, AliasError where the model keeps a view of a parameter, and CaptureError where
    strict_capture asks for one graph, or no part can be traced.
    """
    try:
        return trace_whole(model, args, kwargs)
    except AliasError:
        raise
    except CaptureError as error:
        whole = error
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
    stages: bool = True,
) -> Plan:
    """Return the fastest plan of all meshes, with the memory and the collectives of one step.

    traced: see trace_model. meshes: the arrangements of the ranks to choose from. pins, by path,
    product_weight and start: see make_plan. stages: whether, of several meshes, one with stages may
    be chosen that is not among them. Raises PlanError for demands that no search could heed;
    where no mesh has a plan, the error of the one that needs least memory, else the first's.
    A plan that took a while is kept on disk, and read where the same is asked for again.
    """
    require_clear(meshes, options, pins, product_weight, start)
    key = None
    if start is None and is_on():
        asked = (meshes, pins, product_weight, stages)
        key = key_of(model, traced, options, asked)
    kept = None if key is None else load(key, model, traced)
    if kept is not None:
        return kept
    began = time.process_time()
    with planning_progress() as report:
        # Ranks that were interrupted at different steps would have different plans.
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and not (
            dist.is_available() and dist.is_initialized()
        )
        most = math.inf if options.seconds is None else options.seconds
        with effort(Effort(most, can_stop=alone, report=report)) as spent:
            free = stages and len(meshes) > 1 and not (pins or product_weight or start)
            estimator: Estimator | None = None
            likely: dict[Mesh, float] | None = None
            if free and isinstance(traced, Captured) and _are_many(meshes, traced, options):
                estimator = estimator_of(traced, options)
                likely = None if estimator is None else likely_meshes(estimator, meshes, options)
            chosen = meshes if likely is None else tuple(likely)
            best, errors = _fastest(
                model, traced, chosen, options, pins, product_weight, start, estimator, likely or {}
            )
            if likely is not None and best is not None:
                left = len([mesh for mesh in meshes if mesh not in likely])
                left_out = f"; {left} of {len(meshes)} meshes left out by estimates"
                best = replace(best, method=best.method + left_out)
            elif likely is not None:
                best, errors = _fastest(model, traced, meshes, options, pins, product_weight, start)
            # Stages are tried last: they have to be better than what needs no micro-batches.
            elif free and isinstance(traced, Captured) and not current().is_over:
                world_size = meshes[0].world_size
                best = _or_with_stages(best, errors, model, traced, world_size, options)
            if best is None:
                raise _nearest(errors)
            plan = _counted(best).checked()
    # What was interrupted may be better the next time; what is quickly planned needs no file.
    if key is not None and not spent.is_stopped and time.process_time() - began > _WORTH_KEEPING:
        store(key, plan)
    return plan


def _are_many(meshes: Sequence[Mesh], captured: Captured, options: Options) -> bool:
    """Return whether to plan on all of these meshes in full takes too long."""
    ops = len(meshes) * len(captured.graph.calls)
    limited = options.memory_limit is not None
    return len(meshes) > _MOST_IN_FULL or (limited and ops > _MOST_OPS)


def _fastest(
    model: nn.Module,
    traced: Captured | GraphBreaks,
    meshes: tuple[Mesh, ...],
    options: Options,
    pins: Mapping[str, Layout | Placement] | None,
    product_weight: float | None,
    start: Plan | None,
    estimator: Estimator | None = None,
    expected: Mapping[Mesh, float] = {},
) -> tuple[Plan | None, list[PlanError]]:
    """Return the fastest plan of all meshes, None where there is none, and the others' errors.

    Arguments as of `fastest_plan`. estimator: as of `pipeline_plan`. expected: estimated steps by
    mesh; one is not planned if it is no shorter than a plan is already.
    """
    best: Plan | None = None
    errors: list[PlanError] = []
    waiting = list(meshes)
    while waiting:
        mesh = waiting.pop(0)
        if best is not None and expected.get(mesh, 0.0) >= best.step:
            continue
        try:
            # A plan to begin with is of one mesh; for the other meshes there is none.
            begin = start if len(meshes) == 1 or (start and start.mesh == mesh) else None
            beat = best.step if best else math.inf
            plan = _search(
                model, traced, mesh, options, pins, product_weight, begin, beat, estimator
            )
        # One mesh may have no plan, as where heads do not divide, and another one may.
        except PlanError as error:
            errors.append(error)
            plan = None
        except KeyboardInterrupt:
            # The best so far is worth more than nothing.
            if best is None:
                raise
            current().stop()
            waiting.insert(0, mesh)
            plan = None
        if plan is not None and (best is None or plan.step < best.step):
            best = plan
        if best is not None and current().is_over:
            ended = "" if current().end in best.method else f"; {current().end}"
            left = f", {len(waiting)} other meshes not tried" if waiting else ""
            best = replace(best, method=best.method + ended + left)
            break
        # Of many meshes of three axes, one that divides an axis of the best one is tried. Layouts
        # that are demanded, and searches within a limit, are of the axes there are.
        if not waiting and best is not None and len(meshes) > 1 and mesh in meshes:
            devices = find_hardware(options.hardware).devices_per_node
            fixed = pins or options.memory_limit or best.pipeline is not None
            third = None if fixed else finer(best.mesh, devices)
            waiting += [third] if third is not None else []
    return best, errors


def _or_with_stages(
    best: Plan | None,
    errors: list[PlanError],
    model: nn.Module,
    traced: Captured,
    world_size: int,
    options: Options,
) -> Plan | None:
    """Return a plan with stages where one is faster than the best without, else that one.

    errors: of other meshes; one of stages is added.
    """
    beat = math.inf if best is None else best.step
    staged = best_mesh(traced, world_size, options, beat)
    if staged is None:
        return best
    mesh, estimator = staged
    try:
        plan = _search(model, traced, mesh, options, estimator=estimator)
    except PlanError as error:
        errors.append(error)
        return best
    return plan if best is None or plan.step < best.step else best


def _nearest(errors: list[PlanError]) -> PlanError:
    """Return the error of the mesh that needs least memory, else the first."""
    nearest = min(errors, key=lambda error: getattr(error, "least", math.inf))
    # What would do is looked for once, and not for every mesh that was tried.
    advised = getattr(nearest, "advised", None)
    return nearest if advised is None else advised()


def _counted(plan: Plan) -> Plan:
    """Return the plan with its memory and its collectives, which are told without its graph."""
    if plan.pipeline is not None:
        return with_memory(plan)
    # Under a memory limit it was counted to see whether the plan fits.
    memory = plan.memory or memory_of(plan).rows
    totals = collective_totals(plan)
    collectives = tuple((*key[:2], key[2].value, count) for key, (count, _) in totals.items())
    device = find_hardware(plan.options.hardware).device_memory_bytes
    return replace(plan, memory=memory, collectives=collectives, device_nbytes=device)


def _search(
    model: nn.Module,
    traced: Captured | GraphBreaks,
    mesh: Mesh,
    options: Options,
    pins: Mapping[str, Layout | Placement] | None = None,
    product_weight: float | None = None,
    start: Plan | None = None,
    beat: float = math.inf,
    estimator: Estimator | None = None,
) -> Plan:
    """Search for the best plan on one mesh.

    beat: the step of the best plan on another mesh, in seconds. estimator: as of `pipeline_plan`.

    Raises PlanError for pins that do not fit the mesh, and for demands that a model in parts cannot
    heed, because each part is planned by itself.
    """
    layouts = {
        path: pin if isinstance(pin, tuple) else (pin,) for path, pin in (pins or {}).items()
    }
    if options.microbatches is not None and not is_pipeline(mesh):
        raise PlanError(
            f"microbatches={options.microbatches} on {mesh}",
            why="micro-batches are what the stages of a pipeline work at, and there are none",
            fix="give the mesh an axis pp, as Mesh(pp=2, tp=2), or leave microbatches out",
        )
    # Stages split ops, and no parameter.
    axes = [name for name, _ in mesh.axes if name != PIPELINE] or ["tp"]
    for path, pin in layouts.items():
        if len(pin) != len(axes):
            raise PlanError(
                f"{path} is pinned to {layout_text(pin)} on a mesh of {len(axes)} axes",
                fix=f"give one placement for each of {', '.join(axes)}",
            )
    if is_pipeline(mesh):
        return _with_stages(model, traced, mesh, options, layouts, product_weight, start, estimator)
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
        return search_parts(traced, model, mesh, options, layouts, product_weight)
    name = type(model).__name__
    return search(traced, name, mesh, options, None, layouts, product_weight, start, beat)


def _with_stages(
    model: nn.Module,
    traced: Captured | GraphBreaks,
    mesh: Mesh,
    options: Options,
    pins: Mapping[str, Layout],
    product_weight: float | None,
    start: Plan | None,
    estimator: Estimator | None,
) -> Plan:
    """Return the plan of a model on a mesh with stages. estimator: as of `pipeline_plan`.

    Raises PlanError for a model in parts, and for demands that such a plan cannot heed.
    """
    if isinstance(traced, GraphBreaks):
        raise PlanError(
            f"{type(model).__name__} cannot be cut into stages",
            where="\n".join(map(str, traced.breaks)),
            why="stages are cut from one graph, and the model cannot be traced whole",
            fix="make the model traceable whole, or leave pp out of the mesh",
        )
    given = {"product_weight": product_weight, "start": start}
    asked = [name for name, value in given.items() if value]
    if asked:
        raise PlanError(
            f"{' and '.join(asked)}: not on a mesh with stages",
            fix="leave it out, or leave pp out of the mesh",
        )
    require_known(pins, traced.aliases)
    name = type(model).__name__
    return pipeline_plan(traced, name, mesh, options, pins=pins, estimator=estimator)
