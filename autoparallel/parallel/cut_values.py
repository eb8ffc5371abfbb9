"""From a whole value that is the same on all ranks to a DTensor of it, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from autoparallel.parallel.distributed_layouts import layout_of
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.torch_private import (
    distributed_tensor_like,
    local_part,
    storage_key,
)

__all__ = ["at_start_of_memory", "cut_value", "gathered_value", "without_sums"]


def at_start_of_memory(tensor: Any) -> DTensor:
    """Return a DTensor whose part lies at the start of its memory, as torch copies and writes it.

    Gradients that were reduced together lie one behind the other. From such a part a DTensor has
    an offset in memory that it has not, so that torch takes it for a tensor with data of its own.
    """
    local = local_part(tensor)
    return distributed_tensor_like(local.clone() if local.storage_offset() else local, tensor)


def without_sums(placements: Any) -> Any:
    """Return placements with every pending sum made."""
    return tuple(Replicate() if isinstance(one, Partial) else one for one in placements)


def cut_value(value: torch.Tensor, mesh: Any, placements: Any) -> DTensor:
    """Return the rank's part of a whole tensor that is the same on all ranks, as a DTensor."""
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # Torch takes the shape of a single number, which is empty, for none that is told.
    whole = torch.empty(value.shape, device="meta", dtype=value.dtype)
    like = DTensor.from_local(
        whole, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    layout, here = layout_of(like), mesh.get_coordinate()
    if layout is None or here is None:
        return everywhere.redistribute(mesh, placements)
    part = take_layout_part(value, layout, tuple(mesh.shape), tuple(here))
    # A part that is a view would keep the whole in memory.
    local = part.clone(memory_format=torch.contiguous_format)
    cut: DTensor = distributed_tensor_like(local, like)
    return cut


@torch.no_grad()
def gathered_value(tensor: DTensor) -> torch.Tensor:
    """Gather the parts, and make the sums that are pending; the result is a view of nothing."""
    local = local_part(tensor)
    if local.layout is not torch.strided:
        return local.detach().clone()  # a sparse gradient, which every rank has whole
    whole: torch.Tensor = distributed_tensor_like(local.detach(), tensor).full_tensor()
    return whole.clone() if storage_key(whole) == storage_key(local) else whole.data
