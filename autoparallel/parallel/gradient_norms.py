"""Clipping of gradients by their common norm, with one all-reduce for each axis of the mesh."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.pipeline_place import PipelinePlace
from autoparallel.parallel.pipelined_parameters import counts_here, pipelines_of
from autoparallel.parallel.split_tensor import GRADIENT
from autoparallel.support.torch_private import (
    local_part,
    multiply_all_,
    norms_of,
    without_function_overrides,
)

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale gradients in place so that their common norm is at most `max_norm`; return the norm.

    It does what `torch.nn.utils.clip_grad_norm_` does, which is right for a split module too, but
    reduces the norm of one parameter after the other. Here the ranks exchange one number for each
    mesh axis, and the parts are scaled as plain tensors. All ranks must call it.

    parameters: of any modules, split or not, with or without gradients. max_norm: above 0.
    norm_type: p of the p-norm, may be inf. error_if_nonfinite: raise RuntimeError where the norm is
    nan or infinite. foreach: as in torch's function. The norm is a plain tensor without dims, the
    same on every rank, of float32 at least.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> clip_grad_norm_(layer.parameters(), 1.0)
    tensor(5.)
    """
    listed = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if norm_type <= 0:
        if pipelines_of(listed):
            raise AutoParallelError(
                f"a norm of order {norm_type} of the gradients of a model with stages",
                why="it is no sum over the ranks",
                fix="take another order, such as 2.0",
            )
        # A lowest value or a count is no sum over parts; torch's way sees whole gradients.
        total = torch.nn.utils.clip_grad_norm_(
            listed, max_norm, norm_type, error_if_nonfinite, foreach
        )
        return total.full_tensor() if isinstance(total, DTensor) else total
    with without_function_overrides():
        pipelines = pipelines_of(listed)
        gradients = [
            gradient for item in listed if (gradient := GRADIENT.__get__(item)) is not None
        ]
        if not pipelines and not any(isinstance(gradient, DTensor) for gradient in gradients):
            return torch.nn.utils.clip_grad_norm_(
                listed, max_norm, norm_type, error_if_nonfinite, foreach
            )
        parts = _Parts(gradients)
        if pipelines:
            counted = [
                gradient
                for item in listed
                if (gradient := GRADIENT.__get__(item)) is not None and counts_here(item)
            ]
            total = _norm_of_stages(counted, float(norm_type), pipelines)
        else:
            total = parts.norm(float(norm_type))
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(
                f"the norm of order {norm_type} of the gradients is {float(total)}, so they cannot "
                "be clipped; pass error_if_nonfinite=False to scale them all the same"
            )
        parts.scale(max_norm, total)
    return total


def _norm_of_stages(
    gradients: list[Any], order: float, pipelines: list[PipelinePlace]
) -> torch.Tensor:
    """Return the norm of the gradients of all stages. A collective call.

    gradients: those of this rank's stage that no earlier stage has. Raises AutoParallelError for
    parameters of several models.
    """
    if len(pipelines) > 1:
        raise AutoParallelError(
            "parameters of several models with stages",
            why="the ranks of one pipeline exchange a norm, and those of another do not",
            fix="clip the gradients of each model by themselves",
        )
    place = pipelines[0]
    highest = order == float("inf")
    own = _Parts(gradients).norm(order) if gradients else None
    device = place.device if own is None else own.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    if own is not None:
        total += own.double() if highest else own.double() ** order
    reduction = distributed.ReduceOp.MAX if highest else distributed.ReduceOp.SUM
    distributed.all_reduce(total, reduction, place.group)
    return total if highest else total ** (1 / order)


class _Parts:
    """This rank's parts of gradients, by how they are split.

    gradients: split or not. Raises AutoParallelError for one that is a sum yet to be reduced.
    """

    def __init__(self, gradients: list[Any]) -> None:
        # By mesh and the axes that split them, in the order of the gradients: it is that of all
        # ranks. A mesh goes by its identity, as to ask for its hash takes long.
        self.groups: dict[tuple[int, tuple[int, ...]], list[torch.Tensor]] = defaultdict(list)
        self.meshes: dict[int, DeviceMesh] = {}
        for gradient in gradients:
            if not isinstance(gradient, DTensor):
                self.groups[0, ()].append(gradient)
                continue
            placements = gradient.placements
            if any(placement.is_partial() for placement in placements):
                raise AutoParallelError(
                    "a gradient is a sum that is not reduced yet",
                    why=f"its placements are {placements}",
                    fix="clip gradients after the backward pass has ended, the last one outside "
                    "of no_sync()",
                )
            axes = tuple(at for at, item in enumerate(placements) if not item.is_replicate())
            mesh = gradient.device_mesh
            self.meshes.setdefault(id(mesh), mesh)
            self.groups[id(mesh), axes].append(local_part(gradient))

    def norm(self, order: float) -> torch.Tensor:
        """Return the norm of all gradients, the same on every rank."""
        sums = {key: self._power(parts, order) for key, parts in self.groups.items()}
        highest = order == float("inf")
        reduction = distributed.ReduceOp.MAX if highest else distributed.ReduceOp.SUM
        for number, mesh in self.meshes.items():
            for axis in range(mesh.ndim):
                keys = [key for key in sums if key[0] == number and axis in key[1]]
                if keys:
                    together = torch.stack([sums[key] for key in keys])
                    distributed.all_reduce(together, reduction, mesh.get_group(axis))
                    sums.update(zip(keys, together.unbind(), strict=True))
        device = next(iter(sums.values())).device
        total = torch.stack([value.to(device) for value in sums.values()])
        return total.amax() if highest else total.sum() ** (1 / order)

    def _power(self, parts: list[torch.Tensor], order: float) -> torch.Tensor:
        """Return what a group of parts adds to the norm's power, or the highest of their norms."""
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        some = [part for part in parts if part.numel()]
        if not some:
            return parts[0].new_zeros((), dtype=dtype)
        norms = torch.stack(norms_of(some, order, dtype))
        return norms.amax() if order == float("inf") else norms.pow(order).sum()

    def scale(self, max_norm: float, total: torch.Tensor) -> None:
        """Multiply all parts by what brings a norm down to `max_norm`, as torch computes it."""
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for parts in self.groups.values():
            multiply_all_(parts, factor.to(parts[0].device))
