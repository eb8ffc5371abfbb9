"""State dicts of a parallel module hold the rank's parts; whole ones are loaded and made here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autoparallel.parallel.deferred import is_deferred
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.parameters import as_distributed
from autoparallel.parallel.whole_values import whole_value
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.module_paths import join_path

__all__ = ["full_state_dict", "split_loaded"]


def split_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace the whole tensors of a state dict by this rank's parts, as DTensors.

    This is the hook that every parallel module has on load_state_dict, so that a checkpoint of the
    unsplit model can be loaded. prefix: the path, with a dot at its end, that the module's names
    have in the state dict. Tensors that are DTensors already are taken for parts, and stay.
    """
    state = state_of(module)
    # While the user's Python runs, it sees whole parameters, and loads whole ones.
    if state.mesh is None or state.tree.depth:
        return
    sizes, coordinates = state.ranks.sizes, state.ranks.coordinates
    place = state.tree.pipeline
    for local_path, layouts in state.parameters.items():
        path = prefix + local_path
        if place is not None and not place.holds(join_path(state.path, local_path)):
            # The ranks of another stage load it; torch warns of copies to what has no memory.
            if isinstance(state_dict.get(path), torch.Tensor):
                state_dict[path] = state_dict[path].to("meta")
            continue
        value, layout = state_dict.get(path), layouts.state
        if not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
            continue
        # A tensor of another shape stays as it is: torch then says that it does not fit.
        if tuple(value.shape) == layouts.shape:
            part = take_layout_part(value, layout, sizes, coordinates).contiguous()
            # With assign=True it is to be the parameter's memory, and would keep the whole.
            if part.untyped_storage().nbytes() > part.nbytes:
                part = part.clone()
            state_dict[path] = as_distributed(part, layout, tuple(value.shape), state.mesh)


def full_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the unsplit model's state dict, under the original names, on every rank.

    A collective call: every rank must make it, and then has all parameters whole at once. module:
    one that autoparallelize() or apply_plan() returned, be it before its first call. For large
    models use save_checkpoint, which gathers nothing. Raises AutoParallelError for other modules.

    Example: `torch.save(full_state_dict(model), "model.pt")` on one rank, after all have called it.
    """
    if is_deferred(module):  # it holds whole tensors on every rank
        return {
            path: (value.to_local() if isinstance(value, DTensor) else value).clone()
            for path, value in module.state_dict().items()
        }
    state = state_of(module)
    whole: dict[str, torch.Tensor] = {}
    for path, value in module.state_dict().items():
        # Buffers have no layout: every rank has them whole.
        whole[path] = value if path not in state.layouts else whole_value(state, path, value)
    return whole
