"""Gradients whose sum over the ranks is put off: they lie in `grad` of their parameters.

They are DTensors there, with the placement Partial. So what a user does with gradients is done with
these, too: `zero_grad` clears them, an optimizer's step takes the sum that they stand for, and
`clip_grad_norm_` refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Partial as DTensorPartial

from autoparallel.parallel.split_tensor import GRADIENT
from autoparallel.placement import Layout, Partial
from autoparallel.support.torch_private import local_part

__all__ = ["add_pending", "pending_layout", "take_pending"]


def pending_layout(parameter: Any, state: Layout) -> Layout | None:
    """Return the layout of a parameter's `grad` if that is a sum yet to be taken, else None.

    state: the layout of the parameter's finished gradients.
    """
    gradient = GRADIENT.__get__(parameter)
    if not isinstance(gradient, DTensor) or not any(p.is_partial() for p in gradient.placements):
        return None
    return tuple(
        Partial() if placement.is_partial() else kept
        for placement, kept in zip(gradient.placements, state, strict=True)
    )


def take_pending(parameter: Any) -> torch.Tensor:
    """Return this rank's summand of a pending `grad`, and clear that."""
    summand = local_part(GRADIENT.__get__(parameter))
    GRADIENT.__set__(parameter, None)
    return summand


def add_pending(
    parameter: DTensor,
    grad: torch.Tensor,
    layout: Layout,
    state: Layout,
    coordinates: Sequence[int],
) -> None:
    """Add a local gradient in a layout to `grad`, whose sum over the ranks is then to be taken.

    grad: its memory becomes that of the parameter's gradient. state: the layout of finished
    gradients. coordinates: the rank's place on the mesh.
    """
    summands = [(grad, layout)]
    held = GRADIENT.__get__(parameter)
    if held is not None:
        summands.append((local_part(held), pending_layout(parameter, state) or state))
    axes = [
        axis
        for axis in range(len(state))
        if any(isinstance(own[axis], Partial) for _, own in summands)
    ]
    total: torch.Tensor | None = None
    for summand, own in summands:
        # What is the same on all ranks of an axis counts once in their sum.
        if all(isinstance(own[axis], Partial) or coordinates[axis] == 0 for axis in axes):
            total = summand if total is None else total + summand
    placements = [
        DTensorPartial() if axis in axes else placement
        for axis, placement in enumerate(parameter.placements)
    ]
    GRADIENT.__set__(
        parameter,
        DTensor.from_local(
            torch.zeros_like(grad) if total is None else total,
            parameter.device_mesh,
            placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        ),
    )
