"""Between whole values and parts with gradients: each way is the other's backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autoparallel.parallel.cut_values import cut_value, gathered_value, without_sums

__all__ = ["recorded_part", "recorded_whole"]


def recorded_whole(tensor: DTensor, kind: type[DTensor]) -> torch.Tensor:
    """Return the whole value, in memory of its own, through which gradients flow to the parts.

    kind: the class of DTensor that the gradients are of. A collective call.
    """
    # A value that is no result of a Function may be written to in place.
    if not torch.is_grad_enabled() or not tensor.requires_grad:
        return gathered_value(tensor)
    value: torch.Tensor = _Whole.apply(tensor, kind)
    return value


def recorded_part(value: torch.Tensor, mesh: Any, placements: Any, kind: type[DTensor]) -> Any:
    """Return the rank's part of a whole tensor, through which gradients flow to the whole.

    kind: the class of DTensor that the part, and gradients of it, are of.
    """
    part: Any = _Part.apply(value, mesh, tuple(placements), kind)
    part.__class__ = kind
    return part


class _Whole(torch.autograd.Function):
    """The whole value of a split tensor; its gradient is cut as the tensor is."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, kind: type[DTensor]) -> torch.Tensor:
        """Gather the parts."""
        ctx.set_materialize_grads(False)
        ctx.mesh, ctx.placements = tensor.device_mesh, without_sums(tensor.placements)
        ctx.kind = kind
        return gathered_value(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        """Cut the gradient, which is whole and the same on all ranks."""
        if grad is None:
            return None, None
        return recorded_part(grad, ctx.mesh, ctx.placements, ctx.kind), None


class _Part(torch.autograd.Function):
    """The rank's part of a whole value, as a split tensor; its gradient is gathered."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, mesh: Any, placements: Any, kind: type[DTensor]
    ) -> DTensor:
        """Cut the value."""
        ctx.set_materialize_grads(False)
        ctx.kind = kind
        return cut_value(value.detach(), mesh, placements)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Gather the gradient of the part."""
        whole = None if grad is None else _Whole.apply(grad, ctx.kind)
        return whole, None, None, None
