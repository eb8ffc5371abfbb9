"""The public functions that plan, split and simulate a model: the road from model to module.

The road is model -> graph -> cost network -> plan -> program -> parallel module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoparallel.capture.example_inputs import example_call
from autoparallel.capture.global_reads import undisturbed
from autoparallel.capture.refused_models import refuse_wrapped
from autoparallel.errors import InputsNeededError, PlanError
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.parallel.deferred import deferred
from autoparallel.parallel.launch import join_mesh, join_stages, join_world, mesh_of
from autoparallel.parallel.local_inputs import LocalInputs
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.parameter_hooks import carry_gradient_hooks
from autoparallel.parallel.rank_agreement import require_same_parts
from autoparallel.parallel.simulate import Simulation, simulate_plan
from autoparallel.placement import Layout, Placement
from autoparallel.plan import Plan
from autoparallel.planning.pipelines import is_pipeline, meshes_of_pipeline, stages_of
from autoparallel.planning.plan_check import require_sound
from autoparallel.planning.plan_graphs import with_graphs
from autoparallel.planning.plan_model import fastest_plan, trace_model
from autoparallel.planning.replan import Replanner
from autoparallel.planning.request import make_options, possible_meshes, require_parameters
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.arguments import MAKE_ONE, require_kind

__all__ = [
    "apply_plan",
    "autoparallelize",
    "make_plan",
    "simulate",
    "traced_plan",
]

# The ranks compare their inputs in so many first calls: mistakes of a sampler show at once, and the
# comparison costs a collective.
CHECKED_CALLS = 2


def autoparallelize(
    model: nn.Module,
    world_size: int | None = None,
    *,
    mesh: Mesh | DeviceMesh | str | None = None,
    example_inputs: Any = None,
    local_inputs: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    sequence_parallel: bool = True,
    data_parallel: bool | None = None,
    hardware: str | PathLike[str] = "auto",
    unknown_ops: str = "discover",
    rng: str = "counter",
    strict_capture: bool = False,
    optimizer: str = "adam",
    memory_limit: int | str | None = None,
    recompute: str | None = None,
    constraints: Sequence[str] = (),
    layout: str | None = None,
    gap: float = 0.01,
    seconds: float | None = None,
    overlap: bool = True,
    microbatches: int | None = None,
    schedule: str | None = None,
    stages_per_rank: int | None = None,
    check_inputs: int = CHECKED_CALLS,
) -> nn.Module:
    """Return the model, split over `world_size` ranks, as an ordinary module for this rank.

    model: any module; it is left as it is. world_size: number of processes; 1 changes nothing.
    mesh: as in make_plan, or torch's DeviceMesh with named axes; a part of one, such as
    `devices["tp"]`, splits the model over the ranks of that part alone.
    local_inputs: the mesh axis, or axes, along which each rank brings a batch of its own, as with a
    DistributedSampler: "dp". The batches, which may differ in length, are put together along dim 0,
    and the loss and the gradients are those of all of them at once. A dict says it for some
    arguments of forward: {"labels": "dp"}. By default every rank brings the same, whole batch, and
    takes its part of it.
    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; without it the
    model's own (see make_plan), and where it has none, planning waits for the first call.
    check_inputs: number of first calls in which the ranks compare all numbers of their inputs. On
    CPUs they compare samples in every other call, too; 0 switches all of that off. Other arguments:
    see make_plan.
    On a mesh with stages, Mesh(pp=2, tp=2), each rank holds the parameters of its stage; others are
    there by name and shape, on the meta device. A call and `loss.backward()` are as ever; so is
    `model.step(...)`, which does both and sends nothing but the loss to the other stages. It takes
    example_inputs. Gradients are clipped by autoparallel.clip_grad_norm_, which knows all stages.
    The module has the class, the names and the tree of the user's. Its parameters are DTensors,
    and each rank holds its part of them. A collective call: under torchrun it starts the process
    group if there is none.
    Raises AutoParallelError or a child of it, among them WorldSizeError where other ranks run than
    were asked for, and the errors of make_plan.

    Example: `model = autoparallelize(model, world_size=2)` under `torchrun --nproc-per-node 2`.
    """
    refuse_wrapped(model)
    devices = mesh if isinstance(mesh, DeviceMesh) else None
    axes = mesh_of(mesh) if isinstance(mesh, DeviceMesh) else mesh
    options = make_options(
        axes,
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
        layout=layout,
        gap=gap,
        seconds=seconds,
        overlap=overlap,
        microbatches=microbatches,
        schedule=schedule,
        stages_per_rank=stages_per_rank,
    )
    meshes = possible_meshes(world_size, axes, options)
    inside = tuple(meshes_of_pipeline(each)[1] if is_pipeline(each) else each for each in meshes)
    local = LocalInputs.of(local_inputs, inside[0] if len(meshes) == 1 else None)
    # Planning takes a while; a wrong launch is told before.
    if devices is None:
        join_world(meshes[0].world_size)
    place = join_mesh(meshes[0], devices) if devices is not None or local is not None else None
    try:
        with undisturbed(model):
            args, kwargs = example_call(model, example_inputs)
            if local is not None and place is not None:
                inside_ranks = join_stages(*place)[0]
                args, kwargs = local.gather(signature(model.forward), args, kwargs, inside_ranks)
            traced = trace_model(model, args, kwargs, options)
            # Ranks bring inputs by their places on the mesh that is asked for.
            plan = fastest_plan(model, traced, meshes, options, stages=local is None)
    except InputsNeededError:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise
        if any(map(is_pipeline, meshes)):
            # Until the first call every rank would hold the whole model.
            raise
        return _plan_at_first_call(model, meshes, options, check_inputs, local, place)
    if place is None or (plan.pipeline is not None and plan.whole_mesh != meshes[0]):
        place = join_mesh(plan.whole_mesh, devices)
    return _apply(model, plan, *place, check_inputs, local)


def make_plan(
    model: nn.Module,
    world_size: int | None = None,
    *,
    mesh: Mesh | DeviceMesh | str | None = None,
    example_inputs: Any = None,
    sequence_parallel: bool = True,
    data_parallel: bool | None = None,
    hardware: str | PathLike[str] = "auto",
    unknown_ops: str = "discover",
    rng: str = "counter",
    strict_capture: bool = False,
    optimizer: str = "adam",
    memory_limit: int | str | None = None,
    recompute: str | None = None,
    constraints: Sequence[str] = (),
    layout: str | None = None,
    gap: float = 0.01,
    seconds: float | None = None,
    overlap: bool = True,
    microbatches: int | None = None,
    schedule: str | None = None,
    stages_per_rank: int | None = None,
    pins: Mapping[str, Layout | Placement] | None = None,
    product_weight: float | None = None,
    start: Plan | None = None,
) -> Plan:
    """Return the plan of least cost. It takes no devices, no processes and no weights.

    model: any module, also one on the meta device; it is left as it is. world_size: number of
    ranks; it may be left out where mesh says it.
    mesh: the arrangement of the ranks, `Mesh(dp=2, tp=4)`, outermost axis first, or torch's
    DeviceMesh, of which only the axes count; "auto" tries the ways to arrange world_size ranks on
    the nodes of the hardware, for a model of equal blocks with stages too, and takes the fastest
    plan; without it they are one axis, tp, and products are split by weights alone.
    A first axis pp is one of stages: the model's ops are cut into as many runs, and micro-batches
    go through them. microbatches: their number; by default that of the shortest step, and one where
    ops couple the whole batch. schedule, stages_per_rank: see Options.
    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; without it, the
    model's `example_inputs()` or Hugging Face `dummy_inputs` are used.
    data_parallel: whether products may be split along the inputs' dims, and parameters gathered
    where they are used; by default, if a mesh is given. memory_limit: the memory that a rank may
    use, "40GiB" or bytes, with inputs as large as the example inputs. recompute: "model",
    the default, for what the model itself checkpoints; "none", "selective", "full", or "auto", the
    default under a memory limit, for each repeated block's best.
    constraints: demands on the plan, as "fsdp on dp", "heads on tp", "*.q_proj is column on tp" or
    "blocks.*.weight on dp is whole" (see strategy/constraints.py). layout: the dims of the model
    that mesh axes split, and no others, in Mesh-TensorFlow's words: "batch:dp, heads:tp, vocab:tp";
    `autoparallel dims` prints the names, and axes that it leaves out are the planner's. pins:
    placements or layouts in which parameters, by path, are to be
    stored. product_weight: what a second of matrix
    products counts in the cost; by default 1, and more only for a model so small that leaving it
    whole would be the fastest. start: a plan to begin with, of the same model, inputs and mesh; it
    is taken where nothing better is found. Other arguments: see Options.

    Raises InputsNeededError where there are no example inputs, CaptureError for a model that cannot
    be traced in parts either, UnsupportedOpError for ops that have no rule (unknown_ops="error"),
    MemoryLimitError where no plan fits, and PlanError for contradictory demands.

    Example: `print(make_plan(model, 8))`, and `make_plan(model, mesh=Mesh(dp=2, tp=4)).to_json()`.
    """
    refuse_wrapped(model)
    axes = mesh_of(mesh) if isinstance(mesh, DeviceMesh) else mesh
    options = make_options(
        axes,
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
        layout=layout,
        gap=gap,
        seconds=seconds,
        overlap=overlap,
        microbatches=microbatches,
        schedule=schedule,
        stages_per_rank=stages_per_rank,
    )
    meshes = possible_meshes(world_size, axes, options)
    # Tracing runs the forward, which may write to buffers, attributes and random generators.
    with undisturbed(model):
        args, kwargs = example_call(model, example_inputs)
        traced = trace_model(model, args, kwargs, options)
        return fastest_plan(model, traced, meshes, options, pins, product_weight, start)


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    check_inputs: int = CHECKED_CALLS,
    mesh: DeviceMesh | None = None,
    local_inputs: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
) -> nn.Module:
    """Return the model, split as `plan` says, as an ordinary module for this rank.

    model: the one that was planned, or one like it with other weights. plan: of make_plan, or read
    from JSON; the latter has no graph, so that the model is traced again, with example_inputs as in
    make_plan. check_inputs, local_inputs: see autoparallelize. mesh: torch's, with the axes of the
    plan's, where the processes are on one already. A collective call.
    Raises PlanError where plan and model do not belong together, and where the plan is none by the
    rules of the model's ops, with the op's name and line; WorldSizeError where other
    ranks run than the plan is for.

    Example: `model = apply_plan(model, Plan.from_json(Path("plan.json").read_text()))`
    """
    refuse_wrapped(model)
    require_kind(plan, Plan, MAKE_ONE)
    require_parameters(plan, model)
    if mesh is not None and mesh_of(mesh) != plan.whole_mesh:
        raise PlanError(
            f"the plan is for {plan.whole_mesh}, and the DeviceMesh is {mesh_of(mesh)}",
            fix="plan for the axes of the DeviceMesh, or pass one with the axes of the plan",
        )
    if plan.is_traced:
        require_sound(plan, model)
    local = LocalInputs.of(local_inputs, plan.stage_mesh)
    ranks, devices = join_mesh(plan.whole_mesh, mesh)
    if not plan.is_traced:
        with undisturbed(model):
            args, kwargs = example_call(model, example_inputs)
            if local is not None:
                inside_ranks = join_stages(ranks, devices)[0]
                args, kwargs = local.gather(signature(model.forward), args, kwargs, inside_ranks)
            plan = with_graphs(plan, trace_model(model, args, kwargs, plan.options))
        # Discovered rules are not in the plan, but found in the cache or discovered again.
        require_sound(plan, model)
    return _apply(model, plan, ranks, devices, check_inputs, local)


def traced_plan(model: nn.Module, plan: Plan, *, example_inputs: Any = None) -> Plan:
    """Return the plan with its graph, which a plan that was read from JSON does not have.

    model: the one that was planned, or one like it, also on the meta device. example_inputs: as
    they were for make_plan. What shows the program needs it: timeline, closed_forms, write_svg,
    emitted_program, explain. Raises PlanError where plan and model do not belong together.

    Example: `timeline(traced_plan(model, Plan.from_json(text)))`
    """
    refuse_wrapped(model)
    require_kind(plan, Plan, MAKE_ONE)
    require_parameters(plan, model)
    if plan.is_traced:
        return plan
    with undisturbed(model):
        args, kwargs = example_call(model, example_inputs)
        plan = with_graphs(plan, trace_model(model, args, kwargs, plan.options))
    require_sound(plan, model)
    return plan


def simulate(
    model: nn.Module,
    world_size: int | None = None,
    *,
    example_inputs: Any = None,
    plan: Plan | None = None,
    backward: Any = True,
    **options: Any,
) -> Simulation:
    """Run all ranks in this process, and return outputs and gradients put together.

    model: any module with weights; it is left as it is. world_size: any number of ranks; it takes
    no launcher. example_inputs: the arguments of the one call, see make_plan. plan: one made
    before; else it is made with `options`, which are those of make_plan. backward: True for a
    backward pass from the returned loss, False for none, or a function from the output to a loss.
    The result also counts the collectives, and says how far ranks differ that should be equal.
    Hooks on parameters do not run: gradients are as the backward pass leaves them.
    Raises PlanError for a model on the meta device, and for a plan beside options that would make
    another one.

    Example: `simulate(model, 8).gradients["lm_head.weight"]`
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
    with undisturbed(model):
        args, kwargs = example_call(model, example_inputs)
        if plan is None:
            plan = make_plan(model, world_size, example_inputs=kwargs or args, **options)
        require_parameters(plan, model)
        if plan.is_traced:
            require_sound(plan, model)
        replanner = Replanner(plan.model, plan.whole_mesh, plan.options)
        return simulate_plan(model, plan, args, kwargs, backward, replan=replanner)


def _plan_at_first_call(
    model: nn.Module,
    meshes: tuple[Mesh, ...],
    options: Options,
    check_inputs: int,
    local: LocalInputs | None,
    place: tuple[Ranks, DeviceMesh | None] | None,
) -> nn.Module:
    """Return a module that is planned for the inputs of its first call, and is whole until then.

    Which of several meshes is the best is known only then; until then it is on the first. local:
    the inputs that ranks bring each for itself. place: this rank's on the mesh, where it is known.
    """
    ranks, devices = place or join_mesh(meshes[0])

    def make(plain: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
        """Plan for the arguments of the first call, and apply the plan."""
        with undisturbed(plain):
            if local is not None:
                args, kwargs = local.gather(signature(plain.forward), args, kwargs, ranks)
            traced = trace_model(plain, args, kwargs, options)
            # Until now every rank has had the whole model.
            plan = fastest_plan(plain, traced, meshes, options, stages=False)
        joined = (ranks, devices) if plan.mesh == meshes[0] else join_mesh(plan.mesh)
        return _apply(plain, plan, *joined, check_inputs, local)

    return deferred(model, options.rng, ranks, devices, make)


def _apply(
    model: nn.Module,
    plan: Plan,
    ranks: Ranks,
    devices: DeviceMesh | None,
    check_inputs: int,
    local: LocalInputs | None,
) -> nn.Module:
    """Make the parallel module of a plan that has its graphs."""
    # Parts depend on the path that the example inputs took; graphs do not.
    if plan.breaks:
        require_same_parts(plan, ranks.world)
    ranks, devices, pipeline = join_stages(ranks, devices)
    replanner = Replanner(plan.model, plan.whole_mesh, plan.options, stages_of(plan))
    # What is made in inference mode could not be trained with later.
    with torch.inference_mode(False):
        module = parallel_module(
            model, plan, ranks, devices, replanner, check_inputs, local, pipeline
        )
    carry_gradient_hooks(model, module)
    return module
