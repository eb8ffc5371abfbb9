"""Whole values of parameters, gathered of the ranks of the stage that has them."""

from __future__ import annotations

import torch

from autoparallel.parallel.module_state import State
from autoparallel.parallel.parameters import whole_tensor

__all__ = ["whole_value"]


def whole_value(state: State, path: str, value: torch.Tensor) -> torch.Tensor:
    """Return the whole of a parameter on every rank, whichever stage has it. A collective call.

    state: of the model. path, value: of the parameter.
    """
    place = state.tree.pipeline
    if place is None:
        return whole_tensor(value, state.layouts[path], state.ranks)
    if value.is_meta:
        device = "cpu" if state.mesh is None else state.mesh.device_type
        whole = torch.empty(value.shape, dtype=value.dtype, device=device)
    else:
        whole = whole_tensor(value, state.layouts[path], state.ranks).contiguous()
    return place.from_holder(path, whole)
