"""Redistribution between placements, forward and backward by one rule.

Redistributing a value from A to B moves its gradient from gradient(B) to gradient(A), so that one
autograd function and one table of moves (`placement.movement`) are all the differentiable
collectives there are. Megatron's f is I -> R, its g is P -> I (arXiv:1909.08053). The gradient of a
gradient's placement is the placement itself, so the backward of a conversion is a conversion too,
and derivatives of any order follow.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from autoparallel.placement import (
    Invariant,
    Movement,
    Partial,
    Placement,
    Replicate,
    Shard,
    gradient,
    movement,
)
from autoparallel.runtime.faults import place_of_caller
from autoparallel.runtime.groups import Group
from autoparallel.runtime.moves import (
    move,
)

__all__ = [
    "common_sum",
    "convert",
    "convert_fixed",
    "for_parts",
    "is_type_checked",
    "pending_sum",
    "same_sum",
    "spmd_type",
]


class Convert(torch.autograd.Function):
    """The differentiable `move`: its backward is the move between the gradients' placements."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int
    ) -> torch.Tensor:
        """Move x, and remember the size along the split dim that the backward move starts from."""
        ctx.group, ctx.source, ctx.target = group, source, target
        if not torch.compiler.is_compiling():
            # Of `convert`'s caller, an emitted program: an error of the backward pass names its op.
            ctx.place = place_of_caller(2)
        # The backward move starts from gradient(target). Where that is split, x is whole along the
        # dim, except where the source splits the same dim: then the caller's size is the whole one.
        ctx.size = x.size(target.dim) if isinstance(target, Shard) else 0
        if isinstance(target, Shard) and isinstance(source, Shard) and source.dim == target.dim:
            ctx.size = size
        moved = move(x, group, source, target, size)
        # view_as may give dims of size 1 other strides, and torch's batch norm of a tensor with
        # such strides has a wrong gradient.
        return torch.ops.aten.alias(x) if moved is x else moved

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Move the gradient from gradient(target) to gradient(source).

        Where the gradient is to be differentiated in turn, the move is a conversion itself.
        """
        step = Convert.apply if torch.is_grad_enabled() else move
        back = step(grad, ctx.group, gradient(ctx.target), gradient(ctx.source), ctx.size)
        return back, None, None, None, None

    @staticmethod
    def spmd_typecheck(
        *, x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int
    ) -> Any:
        """Return the type of the result, for the checker of `spmd_types`; its arguments are
        `forward`'s.
        """
        from spmd_types import rules

        axis = group.process_group  # type: ignore[attr-defined]
        step = movement(source, target)
        source_type, target_type = spmd_type(source), spmd_type(target)
        if step is Movement.ALL_REDUCE:
            return rules.all_reduce(x, axis, src=source_type, dst=target_type)
        if step is Movement.ALL_GATHER:
            return rules.all_gather(x, axis, src=source_type, dst=target_type)
        if step is Movement.REDUCE_SCATTER:
            return rules.reduce_scatter(x, axis, src=source_type, dst=target_type)
        if step is Movement.ALL_TO_ALL:
            return rules.all_to_all(x, axis, src=source_type, dst=target_type)
        return rules.convert(x, axis, src=source_type, dst=target_type)


def spmd_type(placement: Placement) -> Any:
    """Return the name that `spmd_types` has for a placement: I, R, P, or S of the dim."""
    import spmd_types

    if isinstance(placement, Shard):
        return spmd_types.S(placement.dim)
    letters: dict[type, Any] = {
        Invariant: spmd_types.I,
        Replicate: spmd_types.R,
        Partial: spmd_types.P,
    }
    return letters[type(placement)]


def convert(
    x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> torch.Tensor:
    """Redistribute `x` from `source` to `target`; the backward pass brings its gradient back.
    Collective.

    x: of this rank, as `source` says it lies. size: of the whole along the source's split dim; it
    is not read for other sources. This is the differentiable `move`.

    Example: `convert(x, group, Shard(0), Replicate(), 12)` all-gathers a tensor that has 12 rows in
    all, and reduce-scatters the gradient.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> convert(torch.ones(2), SingleGroup(), Partial(), Invariant())
    tensor([1., 1.])
    """
    return Convert.apply(x, group, source, target, size)


def convert_fixed(
    x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> torch.Tensor:
    """Redistribute a tensor without a gradient, as `move` does, and tell the type checker of it.

    size: of the whole along the source's split dim; it is not read for other sources. The checker
    is `spmd_types`, and only where it is at work does this differ from `move`.
    """
    moved = move(x, group, source, target, size)
    checker = _type_checker()
    # Among moves without a gradient the checker cannot see that a slice makes the ranks differ.
    if checker is not None and movement(source, target) is Movement.SLICE:
        axis = group.process_group  # type: ignore[attr-defined]
        return checker.reinterpret(moved, axis, src=checker.R, dst=checker.V, expert_mode=True)
    return moved


def _type_checker() -> Any:
    """Return the module `spmd_types` while it checks types, else None.

    It is looked up where it was imported by whoever checks, so that running needs no import of it.
    """
    checker = sys.modules.get("spmd_types")
    return checker if checker is not None and checker.is_type_checking() else None


def is_type_checked() -> bool:
    """Say whether `spmd_types` checks what runs now."""
    return _type_checker() is not None


def common_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the sum over ranks of a value that differs among them, for use by each rank on its
    own part: P -> R. Collective.

    It is differentiable where gradients are recorded, so that a backward pass that communicates can
    be differentiated in turn.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> common_sum(torch.ones(2), SingleGroup())
    tensor([1., 1.])
    """
    if torch.is_grad_enabled():
        return convert(x, group, Partial(), Replicate())
    return group.all_reduce(x)


def for_parts(grad: torch.Tensor, group: Group) -> torch.Tensor:
    """Return a gradient that all ranks hold alike, for use by each rank on its own part: I -> R.

    Nothing moves. In the derivative of the backward pass that uses it so, the ranks' shares are
    added up.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> for_parts(torch.ones(2), SingleGroup())
    tensor([1., 1.])
    """
    if torch.is_grad_enabled():
        return convert(grad, group, Invariant(), Replicate())
    return grad


def same_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the sum over ranks of a value that differs among them, the same on every rank.

    x: without a gradient, such as a count. The type checker, if one is at work, then knows that the
    result is the same on all ranks.
    """
    total = group.all_reduce(x)
    checker = _type_checker()
    if checker is not None:
        axis = group.process_group  # type: ignore[attr-defined]
        checker.mutate_type(total, axis, src=checker.V, dst=checker.R)
    return total


def pending_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return `x` itself, as this rank's term of a sum over the ranks: its placement is Partial.

    A kernel that splits a summed loop leaves such terms. The type checker, if one is at work, is
    told that the ranks' values are still to be added.
    """
    checker = _type_checker()
    if checker is not None:
        axis = group.process_group  # type: ignore[attr-defined]
        return checker.reinterpret(x, axis, src=checker.V, dst=checker.P)
    return x
