"""Collectives that the user calls on split tensors by hand are refused, and say what to do instead.

They would mix the parts of ranks that hold different ones. DTensor's error names an op alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.split_tensor import SplitTensor
from autoparallel.support.torch_private import handle_distributed, tree_leaves

__all__ = ["refuse_collectives"]

_NAMES = (
    "allreduce_ allreduce_coalesced_ broadcast_ reduce_ allgather_ _allgather_base_ "
    "allgather_coalesced_ allgather_into_tensor_coalesced_ gather_ scatter_ reduce_scatter_ "
    "_reduce_scatter_base_ reduce_scatter_tensor_coalesced_ alltoall_ alltoall_base_ send recv_ "
    "recv_any_source_"
).split()


@cache
def refuse_collectives() -> None:
    """Have torch raise our error; only the first of these calls does something."""
    overloads = [
        getattr(packet, name)
        for packet in (getattr(torch.ops.c10d, name, None) for name in _NAMES)
        if packet is not None
        for name in packet.overloads()
    ]
    handle_distributed(dict.fromkeys(overloads, _refuse))


def _refuse(operation: Any, args: Any, kwargs: Any) -> Any:
    """Raise AutoParallelError for a split tensor, and torch's own error for other DTensors."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DTensor)]
    name = operation.name().partition("::")[2].partition(".")[0].strip("_")
    if not any(isinstance(tensor, SplitTensor) for tensor in tensors):
        raise NotImplementedError(
            f"Operator {operation} does not have a sharding strategy registered."
        )
    raise AutoParallelError(
        f"{name} of a split tensor, by hand",
        where=f"a tensor of shape {tuple(tensors[0].shape)}, placed as {tensors[0].placements}",
        why="each rank holds another part of it, and a collective would mix these",
        fix="leave it out: parameters are the same on all ranks from the start, and their "
        "gradients are those of the whole batch; collect numbers of a log by tensor.full_tensor()",
    )
