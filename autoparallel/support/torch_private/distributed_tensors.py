"""DTensors: their parts, their placements, and what torch's state dicts ask of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

__all__ = [
    "checkpoint_classes",
    "describe_pieces",
    "distributed_tensor_like",
    "handle_distributed",
    "local_part",
    "local_parts",
    "placed_alike",
    "share_local_part",
    "strided_shard",
    "strided_split_factor",
]


@cache
def checkpoint_classes() -> dict[tuple[str, str], Any]:
    """Return the private names in a checkpoint's table of contents: classes of plain data, and the
    function that finds a tensor's layout by its name.
    """
    from torch import serialization
    from torch.distributed.checkpoint import filesystem, metadata

    return {
        (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        (metadata.__name__, "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
        (serialization.__name__, "_get_layout"): serialization._get_layout,
    }


def local_part(tensor: DTensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, the tensor itself; `to_local` makes a view of it."""
    return tensor._local_tensor


def local_parts(tensors: Iterable[DTensor]) -> Iterator[torch.Tensor]:
    """Return `local_part` of each of many DTensors, by a loop that runs in C."""
    return map(_LOCAL_PART, tensors)


_LOCAL_PART = operator.attrgetter("_local_tensor")


def placed_alike(one: DTensor, other: DTensor) -> bool:
    """Return whether two DTensors of one mesh have the same placements.

    One that was made like the other shares its description of these, which is seen at once.
    """
    return one._spec is other._spec or one.placements == other.placements


def share_local_part(target: DTensor, source: DTensor) -> None:
    """Give `target` the memory and the placements of `source`, and leave it the same object."""
    target._local_tensor, target._spec = source._local_tensor, source._spec


def distributed_tensor_like(
    local: torch.Tensor, like: DTensor, requires_grad: bool = False
) -> DTensor:
    """Return a DTensor that holds `local` and is placed as another.

    It is asked for at each gradient. DTensor's `__init__` only tells torch.export of the new
    tensor, and takes longer than all the rest.
    """
    kind = _distributed_class()
    return kind.__new__(kind, local, like._spec, requires_grad=requires_grad)


@cache
def _distributed_class() -> type[DTensor]:
    """Return DTensor, which takes long to import, and is asked for in every backward pass."""
    from torch.distributed.tensor import DTensor

    return DTensor


def handle_distributed(handlers: dict[Any, Callable[..., Any]]) -> None:
    """Have DTensor call a function in place of an op: function(op, arguments, keyword arguments).

    handlers: the functions, by the ops' overloads.
    """
    _distributed_class()._op_dispatcher._custom_op_handlers.update(handlers)


def strided_shard(dim: int, split_factor: int) -> Placement:
    """Return DTensor's placement of a dim whose `split_factor` blocks are each split by itself."""
    from torch.distributed.tensor.placement_types import _StridedShard

    _redistribute_blocks()
    return _StridedShard(dim, split_factor=split_factor)


def strided_split_factor(placement: Placement) -> int | None:
    """Return the number of blocks of a placement that `strided_shard` makes, None for others."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return int(placement.split_factor) if isinstance(placement, _StridedShard) else None


@cache
def _redistribute_blocks() -> None:
    """Let torch 2.11 redistribute such a dim one mesh axis after the other, as later releases do.

    It takes every such placement for the order in which mesh axes split a dim, and raises
    ValueError for what cannot be one. Later releases have an error of its own kind for that, and
    then go the way of all other placements, from the innermost axis outwards. On that way 2.11
    does not count such placements as shards, and begins at the outermost axis where it sees none.
    """
    from torch.distributed.tensor import _dtensor_spec, _redistribute

    if hasattr(_dtensor_spec, "_StridedShardNotDecodableError"):
        return
    decoded = _redistribute._gen_transform_infos_non_cached

    def gen_transform_infos(source: Any, target: Any, *options: Any) -> list[Any]:
        try:
            return decoded(source, target, *options)
        except ValueError as error:
            if "use_strided_shard_as_shard_order" not in str(error):
                raise
        planner = _redistribute.get_redistribute_planner(source.device_mesh, source.tensor_meta)
        steps = planner.generate_greedy_transform_infos(source, target)
        return steps if source.num_shards > 1 else steps[::-1]

    vars(_redistribute)["_gen_transform_infos_non_cached"] = gen_transform_infos


def describe_pieces(
    pieces_of: Callable[[DTensor], Any], part_of: Callable[[torch.Tensor, DTensor], Any]
) -> None:
    """Have torch's state dicts and checkpoints ask which pieces of the whole a DTensor holds.

    They take every local part for one rectangle. That is wrong of a dim whose blocks are each split
    by itself: a full state dict was cut elsewhere, and a checkpoint would hold other rows.
    pieces_of: a function that describes a DTensor by torch.distributed.checkpoint's protocol for
    tensors in pieces, or returns None where torch is right. part_of: a function that returns the
    part that this rank holds of a whole tensor if it is split like a DTensor, or likewise None.
    """
    from torch.distributed import _state_dict_utils
    from torch.distributed.tensor import DTensor

    for name in ("__create_write_items__", "__create_chunk_list__", "__get_tensor_shard__"):
        setattr(DTensor, name, _asking(getattr(DTensor, name), name, pieces_of))
    distribute_all = _state_dict_utils._distribute_tensors
    distribute = _state_dict_utils.distribute_tensor

    def distribute_tensors(held: dict[str, Any], keys: list[str], *others: Any) -> None:
        """Cut the tensors that rank 0 has broadcast: (the DTensor to be filled, the whole)."""
        left = []
        for key in keys:
            state = held.get(key)
            target, whole = state if isinstance(state, tuple) else (None, None)
            part = None if target is None else part_of(whole, target)
            if target is None or part is None:
                left.append(key)
            elif target.is_meta:
                held[key] = DTensor(part.detach().clone(), target._spec, requires_grad=False)
            else:
                target.to_local().copy_(part)
                held[key] = target
        distribute_all(held, left, *others)

    def distribute_tensor(whole: torch.Tensor, mesh: Any, placements: Any) -> DTensor:
        """Cut one tensor, of which the first rank's value counts."""
        from torch.distributed.tensor import Replicate

        like = DTensor.from_local(
            whole.new_empty(0).to("meta"), mesh, placements, run_check=False,
            shape=whole.shape, stride=whole.contiguous().stride(),
        )  # fmt: skip
        if part_of(whole, like) is None:
            return distribute(whole, mesh, placements)
        everywhere = distribute(whole, mesh, [Replicate()] * mesh.ndim)
        part = part_of(everywhere.to_local(), like)
        # A part that is a view would keep the whole in memory.
        local = part.clone(memory_format=torch.contiguous_format)
        return DTensor(local, like._spec, requires_grad=False)

    names = vars(_state_dict_utils)
    names["_distribute_tensors"] = distribute_tensors
    names["distribute_tensor"] = distribute_tensor


def _asking(
    method: Callable[..., Any], name: str, pieces_of: Callable[[DTensor], Any]
) -> Callable[..., Any]:
    """Return a method of DTensor that leaves the answer to the DTensor's pieces, if it has such."""

    def asking(tensor: DTensor, *arguments: Any) -> Any:
        pieces = pieces_of(tensor)
        return method(tensor, *arguments) if pieces is None else getattr(pieces, name)(*arguments)

    return asking
