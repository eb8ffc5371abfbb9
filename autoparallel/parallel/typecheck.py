"""Emitted programs are judged by the type system of `spmd_types`, without devices.

The checker knows the types of the collectives and of torch's ops, and nothing of our rules: a
conversion that is missing, or made to the wrong type, is a type error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.errors import PlanError
from autoparallel.placement import Layout, Shard, layout_gradient, whole_layout
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime.collectives import spmd_type
from autoparallel.runtime.groups import ProcessGroup
from autoparallel.runtime.ranks import Ranks, process_ranks
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.pytree import flatten

__all__ = ["typecheck_plan"]


def typecheck_plan(
    model: nn.Module,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    alter: Callable[[str], str] | None = None,
) -> None:
    """Run rank 0 of the plan's program on the default (fake) process group under the checker.

    model: with real weights. args, kwargs: those that the plan was made for. alter: a function that
    changes the program's text first, to see that a broken one is refused.
    Raises spmd_types.SpmdTypeError where types do not fit, PlanError for a plan without a graph.
    """
    import spmd_types
    from spmd_types import checker

    plan.refuse_stages("a check of types")
    captured = plan.captured
    if captured is None:
        raise PlanError("the plan has no graph", fix="plan again in this process")
    world: Any = dist.group.WORLD
    names, shape = zip(*plan.mesh.axes, strict=True)
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
    ranks = process_ranks(ProcessGroup(world), mesh)
    for group in (*ranks.groups, ranks.world):
        if isinstance(group, ProcessGroup):
            _exchange_with_equals(group)
    program = emit(captured.graph, plan, ranks, plan.model, alter)
    inputs, _ = flatten(dict(bind_inputs(model, args, kwargs).arguments))
    weights = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    leaves = []
    for path in program.parameters:
        whole, layout = weights[path].detach(), plan.storage[path]
        part = take_layout_part(whole, layout, ranks.sizes, ranks.coordinates)
        leaves.append(part.clone().requires_grad_())
    # A type is per mesh axis: R, I, V (varying, for parts) or P (a pending sum), as in JAX.
    with spmd_types.set_current_mesh(mesh), checker.typecheck(local=True):
        # The type of a leaf is what its gradient needs: a whole parameter that is read as R has a
        # gradient that is a pending sum, and one that is read as I has not.
        for leaf, back in zip(leaves, program.gradients, strict=True):
            spmd_types.assert_type(leaf, _types(layout_gradient(back), ranks))
        # Everything but the parameters is the same on all ranks, and has no gradient.
        same = _types(whole_layout(len(ranks.sizes)), ranks, spmd_types.R)
        for tensor in (*inputs, *buffers.values(), *captured.constants.values()):
            spmd_types.assert_type(tensor, same)
        outputs, _ = program.run(
            leaves,
            [buffers[path] for path in program.buffers],
            [captured.constants[path] for path in program.constants],
            inputs,
            torch.device("cpu"),
        )
        for output, layout in zip(outputs, plan.outputs, strict=True):
            if output.requires_grad:
                spmd_types.assert_type(output, _types(layout, ranks))


def _exchange_with_equals(group: ProcessGroup) -> None:
    """Let each other rank send what this one, the first, would send to itself.

    Types do not depend on values, but a program reads some: how many rows another rank will send. A
    fake group of torch 2.11 leaves there what was in memory.
    """

    def exchange(flat: torch.Tensor, received: list[int], sent: list[int], _: str) -> torch.Tensor:
        own = flat.split(sent)[0]
        return torch.cat([own if len(own) == n else flat.new_zeros(n) for n in received])

    group.ops.all_to_all_single = exchange


def _types(layout: Layout, ranks: Ranks, every: Any = None) -> dict[Any, Any]:
    """Return the type of a tensor for each mesh axis of several ranks, by the axis' group.

    every: the type on all axes, in place of what the layout says.
    """
    import spmd_types

    types: dict[Any, Any] = {}
    for placement, group in zip(layout, ranks.groups, strict=True):
        if isinstance(group, ProcessGroup):
            by_layout = spmd_types.V if isinstance(placement, Shard) else spmd_type(placement)
            types[group.process_group] = every or by_layout
    return types
