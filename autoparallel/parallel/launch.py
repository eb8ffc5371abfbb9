"""The processes of a launched job: the process group, and this process's place on the mesh."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autoparallel.errors import PlanError, WorldSizeError
from autoparallel.mesh import PIPELINE, Mesh
from autoparallel.parallel.meeting import start_process_group
from autoparallel.runtime.faults import note_uncaught
from autoparallel.runtime.groups import ProcessGroup
from autoparallel.runtime.ranks import Ranks, process_ranks, single_rank
from autoparallel.support.torch_private import flattened_group, let_gloo_end

__all__ = [
    "communication_device",
    "join_devices",
    "join_mesh",
    "join_stages",
    "join_world",
    "mesh_of",
]


def join_world(world_size: int) -> ProcessGroup | None:
    """Return the group of all ranks, None for a single process.

    world_size: the number of ranks that must be running. Where torchrun has started this process
    and there is no process group yet, one is initialized, on NCCL where there are GPUs and on gloo
    otherwise. Raises WorldSizeError where the ranks that run are not those asked for.

    >>> join_world(1) is None
    True
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
            # NCCL takes the current device, which would be the first one on every rank.
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        start_process_group("nccl" if cuda else "gloo")
    if dist.get_world_size() != world_size:
        raise _other_size(world_size, dist.get_world_size())
    _watch_the_end()
    return ProcessGroup(dist.group.WORLD)


def mesh_of(devices: DeviceMesh) -> Mesh:
    """Return the axes of torch's mesh, or of a part of one, by their names.

    Raises PlanError where it has no names.

    Example: `mesh_of(init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))["tp"])` is
    `Mesh(tp=4)`.
    """
    names = devices.mesh_dim_names
    if names is None:
        raise PlanError(
            "the DeviceMesh has no names of its axes",
            why="plans, constraints and emitted programs call the axes by name",
            fix='init_device_mesh(device, (2, 4), mesh_dim_names=("dp", "tp"))',
        )
    return Mesh(**{name: devices.size(axis) for axis, name in enumerate(names)})


def join_devices(devices: DeviceMesh) -> Ranks:
    """Return this process's place on a mesh of torch's, which may be a part of a larger one.

    The ranks of the mesh work together; those outside of it go on by themselves. A collective call
    of all ranks of the mesh, and the first time of all that run where it is a part of several axes.
    Raises WorldSizeError for a process that is not on the mesh, and PlanError for a mesh whose
    processes are not numbered in its own order.
    """
    mesh = mesh_of(devices)
    place = devices.get_coordinate()
    if place is None:
        raise WorldSizeError(
            f"rank {dist.get_rank()} is not on the DeviceMesh, {mesh}",
            why="only the ranks on the mesh hold a part of the model",
            fix="call autoparallelize on the ranks of the mesh, each with its own part of a "
            'larger mesh: mesh["tp"]',
        )
    if mesh.world_size == 1:
        return single_rank(mesh)
    _watch_the_end()
    world = ProcessGroup(devices.get_group() if len(mesh.axes) == 1 else flattened_group(devices))
    number = 0
    for (_, size), coordinate in zip(mesh.axes, place, strict=True):
        number = number * size + coordinate
    if number != world.rank:
        raise PlanError(
            f"the processes of the DeviceMesh are not in its order: {devices.mesh.tolist()}",
            why="ranks are numbered with the last axis innermost",
            fix="make the mesh by init_device_mesh, or of process numbers that grow",
        )
    return process_ranks(world, devices)


def join_mesh(mesh: Mesh, devices: DeviceMesh | None = None) -> tuple[Ranks, DeviceMesh | None]:
    """Return this process's place on a mesh, and torch's DeviceMesh, None for a single process.

    devices: torch's mesh, where there is one already; else it is made, with a process group for
    each mesh axis. A collective call. Raises WorldSizeError where the ranks that run are not those
    of the mesh.

    >>> ranks, devices = join_mesh(Mesh(tp=1))
    >>> ranks.world_size, devices
    (1, None)
    """
    if devices is not None:
        ranks = join_devices(devices)
        return ranks, devices if ranks.world_size > 1 else None
    world = join_world(mesh.world_size)
    if world is None:
        return single_rank(mesh), None
    names, sizes = tuple(zip(*mesh.axes, strict=True))
    device = communication_device()
    if len(names) == 1:
        # One axis has all ranks: their group is there already, and need not be made once more.
        joined = DeviceMesh.from_group(world.process_group, device, mesh_dim_names=names)
    else:
        joined = init_device_mesh(device, sizes, mesh_dim_names=names)
    return process_ranks(world, joined), joined


def join_stages(
    ranks: Ranks, devices: DeviceMesh | None
) -> tuple[Ranks, DeviceMesh | None, tuple[Any, int] | None]:
    """Return this process's place among the ranks of its stage, their mesh, and its pipeline.

    ranks, devices: of `join_mesh`. The pipeline is torch's process group of the ranks that are
    alike in all but their stage, and the number of this rank's stage; None without an axis of
    stages. The world of the ranks of a stage is that of all ranks, which agree on plans and inputs.
    Raises PlanError for a mesh of stages alone.
    """
    if PIPELINE not in ranks.names or devices is None or devices.size(0) == 1:
        return ranks, devices, None
    names = tuple(name for name in ranks.names if name != PIPELINE)
    if not names:
        raise PlanError(
            f"the DeviceMesh has no axis but {PIPELINE}",
            why="a stage has a mesh of its own, if only of one rank",
            fix=f'init_device_mesh(device, (n, 1), mesh_dim_names=("{PIPELINE}", "tp"))',
        )
    inside = devices[names if len(names) > 1 else names[0]]
    pipeline = (devices[PIPELINE].get_group(), devices.get_local_rank(PIPELINE))
    groups = tuple(
        group for name, group in zip(ranks.names, ranks.groups, strict=True) if name != PIPELINE
    )
    return Ranks(names, groups, ranks.world), inside, pipeline


def communication_device() -> str:
    """Return the type of the device, "cpu" or "cuda", on which the process group communicates."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return "cuda" if nccl and torch.cuda.is_available() else "cpu"


def _watch_the_end() -> None:
    """Have the end of this process be told to the other ranks if an error is the reason, and come
    after gloo's threads have ended what they do.
    """
    note_uncaught()
    # Once, however often this is called.
    atexit.unregister(let_gloo_end)
    atexit.register(let_gloo_end)


def _other_size(asked: int, launched: int) -> WorldSizeError:
    """Return the error for a world size that is not the number of ranks that were launched."""
    return WorldSizeError(
        f"{asked} ranks were asked for, {launched} are running",
        why="every rank holds one part of the model",
        fix=f"pass world_size={launched}, or torchrun --nproc-per-node {asked}; to split a model "
        'over some of the ranks, pass a part of a DeviceMesh: mesh=devices["tp"]',
    )
