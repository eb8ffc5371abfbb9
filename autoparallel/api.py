"""The road: model -> graph -> problem -> plan -> sharded module."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from autoparallel.capture.example_inputs import find_example_inputs, split_example
from autoparallel.capture.export import refuse_wrapped
from autoparallel.discovery.unknown_ops import learn
from autoparallel.errors import (
    InputMismatchError,
    InputsNeededError,
    PlanError,
    WorldSizeError,
)
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.parameters import as_distributed
from autoparallel.parallel.seeds import give_generator
from autoparallel.parallel.simulate import Simulation, simulate_plan
from autoparallel.placement import Layout, Placement, whole_layout
from autoparallel.plan import Plan
from autoparallel.planning.plan_model import (
    fastest_plan,
    make_options,
    possible_meshes,
    require_parameters,
    trace_model,
    with_graphs,
)
from autoparallel.planning.traced_parts import Planner
from autoparallel.runtime.groups import Group, ProcessGroup
from autoparallel.runtime.ranks import Ranks, process_ranks, single_rank
from autoparallel.support.model_snapshot import untouched
from autoparallel.support.module_copy import shallow_copy
from autoparallel.support.torch_private import share_local_part

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
        example_inputs is not None,
        sequence_parallel=sequence_parallel,
        hardware=hardware,
        unknown_ops=unknown_ops,
        rng=rng,
        strict_capture=strict_capture,
        optimizer=optimizer,
        constraints=constraints,
    )
    meshes = possible_meshes(world_size, mesh, options)
    _world(meshes[0].world_size)
    try:
        with untouched(model):
            args, kwargs = _example(model, example_inputs)
            plan = fastest_plan(model, trace_model(model, args, kwargs, options), meshes, options)
    except InputsNeededError:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise
        return _waiting_module(model, meshes, options, check_inputs)
    return _apply(model, plan, *_ranks(plan.mesh), check_inputs)


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
        example_inputs is not None,
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


def _example(model: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the example inputs: the given ones, else the model's own."""
    return split_example(find_example_inputs(model) if given is None else given)


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
    require_parameters(plan, model)
    ranks, devices = _ranks(plan.mesh)
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
        planner = Planner(plan.model, plan.mesh, plan.options)
        return simulate_plan(model, plan, args, kwargs, backward, replan=planner)


def _apply(
    model: nn.Module, plan: Plan, ranks: Ranks, devices: DeviceMesh | None, check_inputs: int
) -> nn.Module:
    if plan.breaks:
        _require_same(plan, ranks.world)
    planner = Planner(plan.model, plan.mesh, plan.options)
    return parallel_module(model, plan, ranks, devices, planner, check_inputs)


def _require_same(plan: Plan, group: Group) -> None:
    """Parts are found by running the example inputs, so that they depend on their values."""
    digest = hashlib.sha256(plan.to_json().encode()).digest()[:7]
    rows = group.all_gather(torch.tensor([int.from_bytes(digest)], device=_device()))
    if bool((rows != rows[0]).any()):
        raise InputMismatchError(
            "the ranks have found different parts of the model that can be split",
            why="the path through the model depends on the values of the example inputs",
            fix="pass the same example_inputs on every rank",
        )


def _device() -> str:
    """Where the process group communicates."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return "cuda" if nccl and torch.cuda.is_available() else "cpu"


def _ranks(mesh: Mesh) -> tuple[Ranks, DeviceMesh | None]:
    """This process's place on a mesh, and the ranks as DTensor wants them; None for one process.

    A collective call. Raises WorldSizeError where the ranks that run are not those of the mesh.
    """
    world = _world(mesh.world_size)
    if world is None:
        return single_rank(mesh), None
    names, sizes = tuple(zip(*mesh.axes, strict=True))
    if len(names) == 1:
        devices = DeviceMesh.from_group(world.process_group, _device(), mesh_dim_names=names)
    else:
        devices = init_device_mesh(_device(), sizes, mesh_dim_names=names)
    return process_ranks(world, devices), devices


def _world(world_size: int) -> ProcessGroup | None:
    """All ranks; under torchrun, starts the process group. None for a single process.

    Raises WorldSizeError where the ranks that run are not those asked for.
    """
    if world_size == 1 and not dist.is_initialized():
        return None
    if not dist.is_initialized():
        launched = os.environ.get("WORLD_SIZE")
        if launched is None or "RANK" not in os.environ:
            raise WorldSizeError(
                f"{world_size} ranks were asked for, and this is a single process",
                why="no process group is initialized, and torchrun did not start this process",
                fix=f"torchrun --standalone --nproc-per-node {world_size} your_script.py\n"
                f"(or try it in one process: autoparallel.simulate(model, {world_size}))",
            )
        if int(launched) != world_size:
            raise _other_size(world_size, int(launched))
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
    if dist.get_world_size() != world_size:
        raise _other_size(world_size, dist.get_world_size())
    return ProcessGroup(dist.group.WORLD)


def _other_size(asked: int, launched: int) -> WorldSizeError:
    return WorldSizeError(
        f"{asked} ranks were asked for, {launched} are running",
        why="every rank holds one part of the model",
        fix=f"pass world_size={launched}, or torchrun --nproc-per-node {asked}",
    )


class _Waiting:
    """Mixed into the user's class until the first call shows what the inputs are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model, meshes, ranks, devices, options, check_inputs = self.__dict__["_waiting"]
        source = _with_weights_of(model, self)  # type: ignore[arg-type]
        if options.memory_limit is not None:
            options = replace(options, tokens=1)
        with untouched(source):
            traced = trace_model(source, args, kwargs, options)
            plan = fastest_plan(source, traced, meshes, options)
        if plan.mesh != meshes[0]:
            ranks, devices = _ranks(plan.mesh)
        made = _apply(source, plan, ranks, devices, check_inputs)
        _keep_identity(self, made)  # type: ignore[arg-type]
        made.__dict__["_generator"] = self.__dict__["_generator"]
        self.__class__ = made.__class__  # type: ignore[assignment]
        self.__dict__ = made.__dict__
        return self(*args, **kwargs)  # type: ignore[operator]


def _waiting_module(
    model: nn.Module, meshes: tuple[Mesh, ...], options: Options, check_inputs: int
) -> nn.Module:
    """A copy of the model that plans itself when it is first called.

    Its parameters are objects of its own from the start, so that an optimizer may take them now.
    """
    made = shallow_copy(model)
    kind = type(model)
    made.__class__ = type(f"Parallel{kind.__name__}", (_Waiting, kind), {})
    ranks, devices = _ranks(meshes[0])
    made.__dict__["_waiting"] = (model, meshes, ranks, devices, options, check_inputs)
    give_generator(made, options.rng, ranks, devices)
    twins: dict[int, nn.Parameter] = {}
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                data: torch.Tensor = parameter.detach().clone()
                if devices is not None:
                    layout = whole_layout(len(meshes[0].axes))
                    data = as_distributed(data, layout, tuple(data.shape), devices)
                own = nn.Parameter(data, parameter.requires_grad)
                module._parameters[name] = twins.setdefault(id(parameter), own)
    return made


def _with_weights_of(model: nn.Module, waiting: nn.Module) -> nn.Module:
    """The plain model with the waiting module's weights, which may have been loaded since, and in
    its modes."""
    made = shallow_copy(model)
    held = dict(waiting.named_parameters(remove_duplicate=False))
    twins: dict[int, nn.Parameter] = {}
    for path, module in made.named_modules():
        module.training = waiting.get_submodule(path).training
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = held[f"{path}.{name}" if path else name]
                local = own.to_local() if isinstance(own, DTensor) else own
                plain = nn.Parameter(local.detach(), own.requires_grad)
                module._parameters[name] = twins.setdefault(id(parameter), plain)
    return made


def _keep_identity(waiting: nn.Module, made: nn.Module) -> None:
    """Give the waiting module's parameter objects the parts that were made for them."""
    before = dict(waiting.named_parameters(remove_duplicate=False))
    filled: set[int] = set()
    for path, module in made.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            known = before[f"{path}.{name}" if path else name]
            if id(known) not in filled:
                filled.add(id(known))
                if isinstance(known, DTensor):
                    share_local_part(known, parameter)
                else:
                    known.data = parameter.data
            module._parameters[name] = known
