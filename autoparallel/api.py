"""The road: model -> graph -> problem -> plan -> sharded module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoparallel.capture.example_inputs import find_example_inputs, split_example
from autoparallel.capture.export import refuse_wrapped
from autoparallel.discovery.unknown_ops import learn
from autoparallel.errors import InputsNeededError, PlanError
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.parallel.deferred import deferred
from autoparallel.parallel.launch import join_mesh, join_world
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.rank_agreement import require_same_parts
from autoparallel.parallel.simulate import Simulation, simulate_plan
from autoparallel.placement import Layout, Placement
from autoparallel.plan import Plan
from autoparallel.planning.plan_model import fastest_plan, trace_model, with_graphs
from autoparallel.planning.replan import Replanner
from autoparallel.planning.request import make_options, possible_meshes, require_parameters
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.arguments import MAKE_ONE, require_kind
from autoparallel.support.model_snapshot import untouched

__all__ = ["apply_plan", "autoparallelize", "make_plan", "simulate"]

CHECKED_CALLS = 2


def autoparallelize(
    model: nn.Module,
    world_size: int | None = None,
    *,
    mesh: Mesh | str | None = None,
    example_inputs: Any = None,
    sequence_parallel: bool = True,
    data_parallel: bool | None = None,
    hardware: str = "auto",
    unknown_ops: str = "discover",
    rng: str = "counter",
    strict_capture: bool = False,
    optimizer: str = "adam",
    memory_limit: int | str | None = None,
    recompute: str | None = None,
    constraints: Sequence[str] = (),
    check_inputs: int = CHECKED_CALLS,
) -> nn.Module:
    """The model, split over `world_size` ranks, as an ordinary module for this rank.

    model: any module; it is left as it is. world_size: number of processes; 1 changes nothing.
    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; without it the
    model's own (see make_plan), and where it has none, planning waits for the first call.
    check_inputs: number of first calls in which the ranks compare their inputs. Other arguments:
    see make_plan.
    Under torchrun, starts the process group if there is none.
    Raises AutoParallelError or a child of it; see autoparallel.errors.
    """
    refuse_wrapped(model)
    options = make_options(
        mesh,
        data_parallel,
        memory_limit,
        recompute,
        sequence_parallel=sequence_parallel,
        hardware=hardware,
        unknown_ops=unknown_ops,
        rng=rng,
        strict_capture=strict_capture,
        optimizer=optimizer,
        constraints=constraints,
    )
    meshes = possible_meshes(world_size, mesh, options)
    join_world(meshes[0].world_size)
    try:
        with untouched(model):
            args, kwargs = _example(model, example_inputs)
            plan = fastest_plan(model, trace_model(model, args, kwargs, options), meshes, options)
    except InputsNeededError:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise
        return _plan_at_first_call(model, meshes, options, check_inputs)
    return _apply(model, plan, *join_mesh(plan.mesh), check_inputs)


def make_plan(
    model: nn.Module,
    world_size: int | None = None,
    *,
    mesh: Mesh | str | None = None,
    example_inputs: Any = None,
    sequence_parallel: bool = True,
    data_parallel: bool | None = None,
    hardware: str = "auto",
    unknown_ops: str = "discover",
    rng: str = "counter",
    strict_capture: bool = False,
    optimizer: str = "adam",
    memory_limit: int | str | None = None,
    recompute: str | None = None,
    constraints: Sequence[str] = (),
    pins: Mapping[str, Layout | Placement] | None = None,
    product_weight: float | None = None,
    start: Plan | None = None,
) -> Plan:
    """The plan of least cost. Needs no devices, no processes and no weights (meta is fine).

    mesh: how the ranks are arranged, `Mesh(dp=2, tp=4)`, outermost axis first; "auto" tries the
    ways to arrange world_size ranks on the nodes of the hardware and takes the fastest plan;
    without it they are one axis, tp, and products are split by weights alone.
    Without example_inputs, the model's `example_inputs()` or Hugging Face `dummy_inputs` are used;
    raises InputsNeededError where there is neither.
    data_parallel: whether products may be split along the inputs' dims, and parameters gathered
    where they are used; by default, if a mesh is given. memory_limit: what a rank may use, "40GiB"
    or bytes, with inputs as large as the example inputs; raises MemoryLimitError where no plan
    fits. recompute: "none", "selective", "full", or "auto", the default under a memory limit, for
    each repeated block's best.
    constraints: what plans must have, "blocks.*.weight on dp is whole" (see constraints.py).
    pins: how parameters, by path, are to be stored. product_weight: what a second of matrix
    products counts in the cost; by default 1, and more only for a model so small that leaving it
    whole would be the fastest. start: a plan to begin with, of the same model, inputs and mesh; it
    is taken where nothing better is found. Other arguments: see Options.
    """
    refuse_wrapped(model)
    options = make_options(
        mesh,
        data_parallel,
        memory_limit,
        recompute,
        sequence_parallel=sequence_parallel,
        hardware=hardware,
        unknown_ops=unknown_ops,
        rng=rng,
        strict_capture=strict_capture,
        optimizer=optimizer,
        constraints=constraints,
    )
    meshes = possible_meshes(world_size, mesh, options)
    with untouched(model):
        args, kwargs = _example(model, example_inputs)
        traced = trace_model(model, args, kwargs, options)
        return fastest_plan(model, traced, meshes, options, pins, product_weight, start)


def _example(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the example inputs: the given ones, else the model's own."""
    return split_example(find_example_inputs(model) if example_inputs is None else example_inputs)


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    check_inputs: int = CHECKED_CALLS,
) -> nn.Module:
    """The model, split as `plan` says, as an ordinary module for this rank.

    A plan read from JSON has no graph: the model is traced again, with example_inputs as in
    make_plan. Raises PlanError where plan and model do not belong together.
    """
    refuse_wrapped(model)
    require_kind(plan, Plan, MAKE_ONE)
    require_parameters(plan, model)
    ranks, devices = join_mesh(plan.mesh)
    if not plan.is_traced:
        with untouched(model):
            args, kwargs = _example(model, example_inputs)
            plan = with_graphs(plan, trace_model(model, args, kwargs, plan.options))
        if plan.options.unknown_ops == "discover" and plan.world_size > 1:
            for graph in plan.graphs:
                learn(graph)
    return _apply(model, plan, ranks, devices, check_inputs)


def simulate(
    model: nn.Module,
    world_size: int | None = None,
    *,
    example_inputs: Any = None,
    plan: Plan | None = None,
    backward: Any = True,
    **options: Any,
) -> Simulation:
    """All ranks in this process: outputs and gradients put together, collectives counted.

    plan: one made before; else it is made with `options` (those of make_plan). backward: whether,
    or a function from the output to a loss. Needs no launcher; any world size.
    Raises PlanError for a model without weights, and for a plan beside what would make another.
    """
    refuse_wrapped(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError(
            "the model is on the meta device, and simulate computes with its weights",
            fix='model.to_empty(device="cpu") and initialize it, or make_plan, which needs none',
        )
    if plan is not None:
        require_kind(plan, Plan, MAKE_ONE)
    if plan is not None and (options or world_size not in (None, plan.world_size)):
        asked = [*options, *["world_size"] * (world_size not in (None, plan.world_size))]
        raise PlanError(
            f"{', '.join(asked)} beside a plan for {plan.world_size} ranks",
            why="a plan is followed as it is",
            fix="leave them out, or leave out the plan",
        )
    with untouched(model):
        args, kwargs = _example(model, example_inputs)
        if plan is None:
            plan = make_plan(model, world_size, example_inputs=kwargs or args, **options)
        require_parameters(plan, model)
        replanner = Replanner(plan.model, plan.mesh, plan.options)
        return simulate_plan(model, plan, args, kwargs, backward, replan=replanner)


def _plan_at_first_call(
    model: nn.Module, meshes: tuple[Mesh, ...], options: Options, check_inputs: int
) -> nn.Module:
    """The model, planned for the inputs of its first call."""
    ranks, devices = join_mesh(meshes[0])

    def make(plain: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
        with untouched(plain):
            traced = trace_model(plain, args, kwargs, options)
            plan = fastest_plan(plain, traced, meshes, options)
        joined = (ranks, devices) if plan.mesh == meshes[0] else join_mesh(plan.mesh)
        return _apply(plain, plan, *joined, check_inputs)

    return deferred(model, options.rng, ranks, devices, make)


def _apply(
    model: nn.Module, plan: Plan, ranks: Ranks, devices: DeviceMesh | None, check_inputs: int
) -> nn.Module:
    if plan.breaks:
        require_same_parts(plan, ranks.world)
    replanner = Replanner(plan.model, plan.mesh, plan.options)
    return parallel_module(model, plan, ranks, devices, replanner, check_inputs)
