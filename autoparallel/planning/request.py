"""The request: its options and defaults, the meshes to choose from, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.mesh import MICROBATCH, PIPELINE, Mesh, arrangements
from autoparallel.options import Options
from autoparallel.placement import Layout, Placement
from autoparallel.plan import Plan
from autoparallel.strategy.named_dims import layout_sentences
from autoparallel.support.units import parse_bytes

__all__ = [
    "make_options",
    "possible_meshes",
    "require_clear",
    "require_known",
    "require_parameters",
]


def make_options(
    mesh: Mesh | str | None,
    data_parallel: bool | None,
    memory_limit: int | str | None,
    recompute: str | None,
    layout: str | None = None,
    **others: Any,
) -> Options:
    """Return the options, with the defaults that depend on other arguments of the request.

    mesh, data_parallel, memory_limit, recompute, layout: see make_plan. others: further fields of
    Options. Memory is counted for the example inputs as they are, however small, and so under a
    memory limit the plan is made for them as they are, not for as many tokens as in training.
    Raises PlanError for an option that has no such value.

    >>> make_options(None, None, "40GiB", None).recompute
    'auto'
    >>> make_options(None, None, None, None).data_parallel
    False
    """
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    if limit is not None:
        others["tokens"] = 1
    options = Options(
        data_parallel=mesh is not None if data_parallel is None else data_parallel,
        memory_limit=limit,
        recompute=("model" if limit is None else "auto") if recompute is None else recompute,
        **others,
    )
    if layout is None:
        return options
    if not isinstance(layout, str):
        raise PlanError(f"layout={layout!r}", fix='give a text: "batch:dp, heads:tp"')
    return replace(options, constraints=(*options.constraints, *layout_sentences(layout)))


def possible_meshes(
    world_size: int | None, mesh: Mesh | str | None, options: Options
) -> tuple[Mesh, ...]:
    """Return the arrangements of the ranks to choose from.

    A mesh is taken as it is. Without one the ranks are a single axis, tp; with "auto" they are all
    arrangements that suit the nodes of the hardware.
    Raises PlanError where the number of ranks is not told, told twice in different ways, or no
    positive whole number.

    >>> print(*possible_meshes(8, None, make_options(None, None, None, None)))
    Mesh(tp=8)
    """
    # bool is a subclass of int, and world_size=True is surely a mistake.
    if world_size is not None and (type(world_size) is not int or world_size < 1):
        raise PlanError(
            f"world_size={world_size!r} is no number of ranks",
            why="the model is split over that many processes",
            fix="give a positive whole number: world_size=8",
        )
    if isinstance(mesh, Mesh):
        if world_size is not None and world_size != mesh.world_size:
            raise PlanError(
                f"{mesh} has {mesh.world_size} ranks, and world_size={world_size} was asked for",
                why="the ranks of a mesh are the product of its axes",
                fix="leave one of the two out",
            )
        _require_order(mesh)
        return (mesh,)
    if mesh not in (None, "auto"):
        raise PlanError(f"mesh={mesh!r}", fix='pass mesh=Mesh(dp=2, tp=4), or mesh="auto"')
    if world_size is None:
        raise PlanError("over how many ranks?", fix="pass world_size=8, or mesh=Mesh(dp=2, tp=4)")
    if mesh is None:
        return (Mesh(tp=world_size),)
    return arrangements(world_size, find_hardware(options.hardware).devices_per_node)


def _require_order(mesh: Mesh) -> None:
    """Raise PlanError for an axis of stages that is not the first, and for one in time."""
    names = [name for name, _ in mesh.axes]
    if PIPELINE in names[1:]:
        raise PlanError(
            f"{mesh}: {PIPELINE} is the axis of stages, and stands first",
            why="stages send little to each other; neighbours in rank are those of the last axes",
            fix=f"Mesh({PIPELINE}=..., {', '.join(f'{n}=...' for n in names if n != PIPELINE)})",
        )
    if MICROBATCH in names:
        raise PlanError(
            f"{mesh}: {MICROBATCH} is the name of a pipeline's axis in time",
            why="its places are parts of a batch, and no ranks",
            fix="give the axis another name",
        )


def require_clear(
    meshes: tuple[Mesh, ...],
    options: Options,
    pins: Mapping[str, Layout | Placement] | None,
    product_weight: float | None,
    start: Plan | None,
) -> None:
    """Raise PlanError for demands that no search could heed.

    meshes: those to choose from. pins, product_weight, start: see make_plan.
    """
    if pins is not None and not isinstance(pins, Mapping):
        raise PlanError(f"pins={pins!r}", fix='give a table: {"encoder.weight": Shard(0)}')
    for path, pin in (pins or {}).items():
        placements = pin if isinstance(pin, tuple) else (pin,)
        if not all(isinstance(one, Placement) for one in placements):
            raise PlanError(
                f"{path} is pinned to {pin!r}, which is no placement",
                fix="give Shard(0), Invariant(), or a tuple with one for each axis",
            )
    # True is a number for isinstance, and NaN compares false with everything.
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


def require_known(pins: Mapping[str, Layout] | None, aliases: Mapping[str, str]) -> None:
    """Raise PlanError for a pin of a parameter that the model does not have.

    aliases: see Captured; its keys are all paths of the model's parameters.
    """
    unknown = [path for path in pins or {} if path not in aliases]
    if unknown:
        raise PlanError(
            f"the model has no parameter {unknown[0]!r}",
            why="pins are by the parameters' names",
            fix="see model.named_parameters()",
        )


def require_parameters(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError where a plan is of a model that has other parameters, by path or shape."""
    shapes = {path: tuple(p.shape) for path, p in model.named_parameters(remove_duplicate=False)}
    other = [
        f"{choice.path}: {choice.shape} in the plan, {shapes.get(choice.path, 'none')} in the model"
        for choice in plan.parameters
        if shapes.get(choice.path) != choice.shape
    ]
    if other:
        raise PlanError(
            f"the plan was made for another {plan.model}",
            where="\n".join(other[:5] + [f"and {len(other) - 5} more"] * (len(other) > 5)),
            why="its parameters are not those of this model",
            fix="plan again for this model",
        )
