"""Judge an emitted module by the type system of `spmd_types`, without devices.

The checker knows the types of the collectives and of torch's ops, and nothing of our rules: a
conversion that is missing, or made to the wrong type, is a type error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autoparallel.errors import PlanError
from autoparallel.graph.capture import bind_inputs
from autoparallel.placement import Replicate, Shard
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime.collectives import spmd_type, take_part
from autoparallel.runtime.groups import ProcessGroup
from autoparallel.structure import flatten

__all__ = ["typecheck_plan"]


def typecheck_plan(
    model: nn.Module,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    alter: Callable[[str], str] | None = None,
) -> None:
    """Run rank 0 of the plan's program on the default (fake) process group under the checker.

    alter: changes the program's text first, to see that a broken one is refused.
    Raises spmd_types.SpmdTypeError where types do not fit, PlanError for a plan without a graph.
    """
    import spmd_types
    from spmd_types import checker

    captured = plan.captured
    if captured is None:
        raise PlanError("the plan has no graph", fix="plan again in this process")
    world: Any = dist.group.WORLD
    group = ProcessGroup(world)
    program = emit(captured.graph, plan, group, plan.model, alter)
    inputs, _ = flatten(dict(bind_inputs(model, args, kwargs).arguments))
    weights = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    mesh = dist.device_mesh.init_device_mesh(
        "cpu", (plan.world_size,), mesh_dim_names=(plan.mesh.axes[0][0],)
    )
    leaves = []
    for path in program.parameters:
        placed, part = plan.storage[path], weights[path].detach()
        if isinstance(placed, Shard):
            part = take_part(part, placed, group.world_size, group.rank)
        leaves.append(part.clone().requires_grad_())
    with spmd_types.set_current_mesh(mesh), checker.typecheck(local=True):
        for path, leaf in zip(program.parameters, leaves, strict=True):
            placed = plan.storage[path]
            if path in program.deferred:
                placed = Replicate()
            kind = spmd_types.V if isinstance(placed, Shard) else spmd_type(placed)
            spmd_types.assert_type(leaf, {world: kind})
        for tensor in (*inputs, *buffers.values(), *captured.constants.values()):
            spmd_types.assert_type(tensor, {world: spmd_types.R})
        outputs, _ = program.run(
            leaves,
            [buffers[path] for path in program.buffers],
            [captured.constants[path] for path in program.constants],
            inputs,
            torch.device("cpu"),
        )
        for output, placement in zip(outputs, plan.outputs, strict=True):
            kind = spmd_types.V if isinstance(placement, Shard) else spmd_type(placement)
            if output.requires_grad:
                spmd_types.assert_type(output, {world: kind})
