"""The rectangles that a rank holds of a whole tensor, in torch.distributed.checkpoint's words.

A DTensor cannot say where the parts of a dim lie that is split block by block, and torch takes each
local part for one rectangle. `in_pieces` says it, and `teach_torch` has torch's own state dicts and
checkpoints use it for every DTensor that this package makes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from autoparallel.parallel.distributed_layouts import layout_in_blocks
from autoparallel.placement import Layout
from autoparallel.runtime.tensor_parts import layout_pieces, take_layout_part
from autoparallel.support.torch_private import describe_pieces, local_part, wrapper_tensor

__all__ = ["Pieces", "in_pieces", "teach_torch"]


class Pieces(torch.Tensor):
    """A whole tensor of which this rank holds some rectangles, each with its true offset.

    It answers what torch.distributed.checkpoint asks of its items (its protocol `_Checkpointable`),
    and does nothing else.
    pieces: the rectangles by their offsets in the whole, in elements per dim; they share memory
    with the local part, so that loading fills it in place.
    """

    pieces: dict[torch.Size, torch.Tensor]

    @staticmethod
    def __new__(
        cls, whole: torch.Size, pieces: dict[torch.Size, torch.Tensor], local: torch.Tensor
    ) -> Pieces:
        described: Pieces = wrapper_tensor(cls, whole, local.dtype, local.device)
        described.pieces = pieces
        return described

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a tensor that only describes a checkpoint")

    # The three methods that torch.distributed.checkpoint looks for.

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(at, piece.size()) for at, piece in self.pieces.items()]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.pieces[index.offset]


def in_pieces(
    local: torch.Tensor,
    whole: torch.Size,
    layout: Layout,
    sizes: tuple[int, ...],
    coordinates: tuple[int, ...],
) -> Pieces:
    """Return the rectangles that this rank holds of a tensor of size `whole`.

    local: the rank's part, whose memory they share. layout: how the tensor is split over mesh axes
    of these sizes, on which the rank has these coordinates. A dim that is split in k blocks gives k
    pieces. An unsharded tensor is one piece, the same on every rank, and torch writes only one of
    those that are the same.
    """
    pieces = {}
    for start, at, lengths in layout_pieces(whole, layout, sizes, coordinates):
        part = local
        for dim, (first, length) in enumerate(zip(at, lengths, strict=True)):
            part = part.narrow(dim, first, length)
        pieces[torch.Size(start)] = part
    return Pieces(whole, pieces, local)


@cache
def teach_torch() -> None:
    """Have torch's state dicts and checkpoints cut DTensors that are split block by block rightly.

    Only the first of these calls does something.
    """
    describe_pieces(_pieces_of, _part_of)


def _pieces_of(tensor: DTensor) -> Pieces | None:
    """Return the pieces of a DTensor in blocks, None for one whose part is one rectangle."""
    layout, here = layout_in_blocks(tensor), tensor.device_mesh.get_coordinate()
    if layout is None or here is None:
        return None
    sizes = tuple(tensor.device_mesh.shape)
    return in_pieces(local_part(tensor).detach(), tensor.size(), layout, sizes, tuple(here))


def _part_of(whole: torch.Tensor, like: DTensor) -> torch.Tensor | None:
    """Return the part of a whole tensor that this rank holds if it is split like `like`.

    It is None for a DTensor whose part is one rectangle.
    """
    layout, here = layout_in_blocks(like), like.device_mesh.get_coordinate()
    if layout is None or here is None:
        return None
    return take_layout_part(whole, layout, tuple(like.device_mesh.shape), tuple(here))
