"""Outputs of a program that stay split, as the DTensors that the user gets of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoparallel.parallel.gradient_return import as_distributed
from autoparallel.parallel.split_tensor import mark
from autoparallel.placement import Layout, Shard
from autoparallel.support.torch_private import (
    apply_directly,
    distributed_tensor_like,
    placed_alike,
)

__all__ = ["SplitOutputs"]

# Sizes of outputs that are remembered.
_MOST = 1024


class SplitOutputs:
    """Makes DTensors of a program's outputs.

    To make one from nothing takes as long as several small ops. So DTensors without elements are
    kept that are placed as outputs of a size were, and further ones are made like them.

    >>> SplitOutputs().outside(torch.ones(2), (), (), None)  # a single process has no mesh
    tensor([1., 1.])
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], tuple[Layout, DTensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return a state without what belongs to this process's mesh."""
        return {"known": {}}

    def outside(
        self, output: torch.Tensor, layout: Layout, shape: tuple[int, ...], mesh: DeviceMesh | None
    ) -> torch.Tensor:
        """Return what the user gets of an output: the tensor, or a DTensor where it stays split.

        shape: of the whole output. mesh: torch's; None for a single process.
        """
        if mesh is None:
            return output
        # A layout goes by its identity, as to ask for its hash takes long.
        key = (id(layout), shape, output.dtype, output.device)
        known = self.known.get(key)
        if known is not None and known[0] is layout:
            return mark(_apply_outside(output, known[1]))
        if not any(isinstance(placement, Shard) for placement in layout):
            return output
        made = as_distributed(output, layout, shape, mesh)
        if len(self.known) >= _MOST:
            self.known.clear()
        self.known[key] = (layout, distributed_tensor_like(output.detach().new_empty(0), made))
        return made


class _Outside(torch.autograd.Function):
    """`DTensor.from_local` for a part that lies as another DTensor says."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, like: DTensor) -> DTensor:
        """Return the DTensor of which this rank holds `part`."""
        ctx.set_materialize_grads(False)
        ctx.like = like
        # As there: autograd's facts about the result must not be written to the part's own tensor.
        return distributed_tensor_like(part.view_as(part), like, part.requires_grad)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Return this rank's part of the gradient, which may be placed otherwise."""
        if grad is None:
            return None, None
        if not placed_alike(grad, ctx.like):
            grad = grad.redistribute(ctx.like.device_mesh, ctx.like.placements)
        return grad.to_local(), None


_apply_outside = apply_directly(_Outside)
