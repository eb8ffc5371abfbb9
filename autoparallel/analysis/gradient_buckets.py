"""The memory that it takes to reduce gradients together, beside the gradients themselves."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from autoparallel.graph.part_sizes import local_shape
from autoparallel.parallel.parameters import ParameterLayouts
from autoparallel.placement import Invariant, Movement, Partial, Shard
from autoparallel.plan import ParameterChoice, Plan
from autoparallel.runtime.joint_moves import bucket_nbytes

__all__ = ["reducing_nbytes"]


def reducing_nbytes(plan: Plan, parameters: Sequence[ParameterChoice]) -> int:
    """Return the bytes that reductions of a backward pass take beside the gradients.

    parameters: those of the plan whose gradients a rank has, in the order in which they are read.
    The gradients of a bucket are copied into one tensor, which is summed in place, and are let go
    of then. Where a rank keeps a part of the sum alone, what goes to each rank is copied first, and
    the parts of all buckets are there until the pass ends.

    Example: `reducing_nbytes(plan, plan.parameters)`
    """
    sizes = tuple(size for _, size in plan.mesh.axes)
    pending: dict[str, set[int]] = {}
    for row in plan.conversions:
        back = [step.axis for step in row.steps if step.forward is Movement.NONE]
        if row.requires_grad and back:
            pending.setdefault(row.value, set()).update(back)
    most = bucket_nbytes(sum(row.nbytes for row in plan.parameters))
    waiting = copied = largest = parts = 0
    for parameter in reversed(parameters):
        axes = pending.get(parameter.name, ())
        produced = tuple(
            Partial() if axis in axes and placement == Invariant() else placement
            for axis, placement in enumerate(parameter.storage)
        )
        layouts = ParameterLayouts(
            parameter.shape, parameter.storage, parameter.gradient, parameter.state
        )
        first = layouts.reduced_first(produced)
        if Partial() not in first:
            continue
        itemsize = parameter.nbytes // max(prod(parameter.shape), 1)
        is_scattered = any(
            early == Partial() and isinstance(late, Shard)
            for early, late in zip(first, parameter.state, strict=True)
        )
        waiting += parameter.nbytes
        copied += itemsize * prod(local_shape(parameter.shape, first, sizes)) * (1 + is_scattered)
        if is_scattered:
            parts += itemsize * prod(local_shape(parameter.shape, parameter.state, sizes))
        largest = max(largest, copied)
        if waiting >= most and plan.options.overlap:
            waiting = copied = 0
    return largest + parts
