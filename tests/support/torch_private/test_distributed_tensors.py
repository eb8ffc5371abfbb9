"""DTensors have the parts and the pieces that the adapter says they have."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from autoparallel.support import torch_private


def gathered_blocks(_rank: int) -> list[bool]:
    """Check that dims that are split block by block, on one and two mesh axes, are put in order."""
    made = []
    # What one rank writes into the store, the others read.
    store = torch_private.default_store()
    if _rank == 0:
        store.set("a key of this test", "some words")
    store.wait(["a key of this test"])
    made.append(store.get("a key of this test") == b"some words")
    world, store = torch.distributed.group.WORLD, torch.distributed.PrefixStore("apart", store)
    apart = torch_private.gloo_ranks(store, _rank, 4, timedelta(seconds=60))
    ranks = [torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1)]
    apart.allgather([ranks], [torch.full((1,), float(_rank))]).wait()
    made.append([float(each) for each in ranks] == [0, 1, 2, 3])
    # That of all ranks waits for a quarter of an hour; see run_processes.
    for least, waits in ((1, 15), (30, 30)):
        torch_private.set_patience(apart, world, timedelta(minutes=least))
        made.append(apart.options._timeout == timedelta(minutes=waits))
    x = torch.arange(48.0).view(24, 2)
    cube = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("a", "b", "c"))
    for devices, size in ((cube, 4), (cube["b", "c"], 2)):
        group = torch_private.flattened_group(devices)
        made.append(torch.distributed.get_world_size(group) == size)
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    thrice, inner = torch_private.strided_shard(0, 3), torch_private.strided_shard(0, 6)
    for mesh, placements in (
        (line, [thrice]),
        (grid, [thrice, Replicate()]),
        (grid, [thrice, inner]),
        (grid, [Shard(1), thrice]),
    ):
        part = x
        for axis, placement in enumerate(placements):
            ranks, own = mesh.size(axis), mesh.get_local_rank(axis)
            if placement in (thrice, inner):
                blocks = part.split(part.shape[0] // 3)
                part = torch.cat([block.chunk(ranks)[own] for block in blocks])
            elif placement == Shard(1):
                part = part.chunk(ranks, 1)[own]
        split = DTensor.from_local(part.contiguous(), mesh, placements, run_check=False)
        made += [
            torch.equal(split.full_tensor(), x),
            torch.equal((split.detach() * 2).full_tensor(), x * 2),
            tuple(split.shape) == (24, 2),
        ]
    return made


def test_a_dim_that_is_split_block_by_block_is_gathered_in_order() -> None:
    """split_factor counts the blocks; each is split over the ranks by itself."""
    placement = torch_private.strided_shard(0, 3)
    assert placement == torch_private.strided_shard(0, 3)
    assert placement not in (Shard(0), torch_private.strided_shard(0, 2))
    assert torch_private.strided_split_factor(placement) == 3
    assert torch_private.strided_split_factor(Shard(0)) is None
    for made in run_processes(gathered_blocks, 4):
        assert all(made)


def cut_by_torch(rank: int, folder: Path) -> list[bool]:
    """Have torch broadcast, distribute and save a dim in two blocks, of one element and a half."""
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    mesh, rows = init_device_mesh("cpu", (2,)), [[0, 1, 3, 4], [2, 5]][rank]
    whole = torch.arange(6.0)
    asked = []

    def pieces_of(tensor: DTensor) -> object | None:
        asked.append(tensor.placements)
        return None

    def part_of(value: torch.Tensor, like: DTensor) -> torch.Tensor | None:
        return value[rows] if like.placements[0] != Shard(0) else None

    torch_private.describe_pieces(pieces_of, part_of)
    found = []
    for placement, expected in (
        (torch_private.strided_shard(0, 2), rows),
        (Shard(0), [[0, 1, 2], [3, 4, 5]][rank]),
    ):
        for broadcast in (True, False):
            part = torch.zeros(len(expected))
            held = DTensor.from_local(part, mesh, [placement], shape=(6,), stride=(1,))
            module = nn.Module()
            module.weight = nn.Parameter(held)
            given = {"weight": whole} if rank == 0 or not broadcast else {}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
            set_model_state_dict(module, given, options=options)
            found.append(torch.equal(module.weight.to_local(), whole[expected]))
    # Where there are no pieces, torch answers itself: here for a plain split.
    held = DTensor.from_local(whole[expected], mesh, [Shard(0)])
    chunk = ChunkStorageMetadata(torch.Size([3 * rank]), torch.Size([3]))
    found.append(held.__create_chunk_list__() == [chunk] and asked == [(Shard(0),)])
    save({"x": held}, checkpoint_id=folder)
    read = DTensor.from_local(torch.zeros(3), mesh, [Shard(0)])
    load({"x": read}, checkpoint_id=folder)
    return [*found, torch.equal(read.full_tensor(), whole)]


def test_torch_asks_for_the_pieces_of_a_dtensor(tmp_path: Path) -> None:
    """Its state dicts ask for the part, its checkpoints for the pieces; None leaves it to torch."""
    for found in run_processes(cut_by_torch, 2, tmp_path):
        assert all(found), found


def test_the_local_part_of_a_dtensor_is_what_it_holds(mesh_of_this_process) -> None:
    x = torch.arange(6.0)
    made = DTensor.from_local(x, mesh_of_this_process, [Replicate()], run_check=False)
    local = torch_private.local_part(made)
    assert list(torch_private.local_parts([made, made])) == [local, local]
    local.mul_(2)
    assert torch.equal(made.full_tensor(), torch.arange(6.0) * 2)
    assert local.data_ptr() == x.data_ptr()


def test_a_dtensor_keeps_its_identity_with_other_memory(mesh_of_this_process) -> None:
    """An optimizer goes on with the parameter that it knows."""
    parameter = nn.Parameter(
        DTensor.from_local(torch.zeros(6), mesh_of_this_process, [Replicate()])
    )
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    source = nn.Parameter(DTensor.from_local(torch.ones(6), mesh_of_this_process, [Shard(0)]))
    torch_private.share_local_part(parameter, source)
    assert parameter.placements == (Shard(0),)
    parameter.grad = torch_private.distributed_tensor_like(torch.ones(6) * 3, parameter)
    assert parameter.grad.placements == (Shard(0),)
    assert not parameter.grad.requires_grad
    optimizer.step()
    assert torch.equal(torch_private.local_part(source), torch.full((6,), -2.0))


def test_dtensors_that_are_placed_alike_are_known(mesh_of_this_process) -> None:
    """By the description that they share, or by what it says."""
    one, other = (
        DTensor.from_local(torch.zeros(6), mesh_of_this_process, [Shard(0)]) for _ in range(2)
    )
    like = torch_private.distributed_tensor_like(torch.ones(6), one, True)
    assert like.requires_grad
    assert torch_private.placed_alike(like, one)
    assert torch_private.placed_alike(one, other)
    whole = DTensor.from_local(torch.zeros(6), mesh_of_this_process, [Replicate()])
    assert not torch_private.placed_alike(one, whole)


def test_an_op_of_dtensor_can_be_handled(mesh_of_this_process) -> None:
    """The op's overload, its arguments and keyword arguments are given."""
    split = DTensor.from_local(torch.zeros(6), mesh_of_this_process, [Replicate()])
    handlers = DTensor._op_dispatcher._custom_op_handlers
    op = torch.ops.aten.hardswish.default
    try:
        seen: list[object] = []
        torch_private.handle_distributed({op: lambda *given: seen.append(given) or split})
        assert torch.ops.aten.hardswish(split) is split
        assert seen == [(op, (split,), {})]
    finally:
        del handlers[op]


def test_checkpoint_classes(tmp_path: Path) -> None:
    """They and the public ones are all that a checkpoint's table of contents names."""
    with pytest.warns(UserWarning, match=r"torch.distributed"):
        dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path)
    named: set[tuple[str, str]] = set()

    class Names(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    with (tmp_path / ".metadata").open("rb") as file:
        Names(file).load()
    private = {(module, name) for module, name in named if name.startswith("_")}
    assert private == set(torch_private.checkpoint_classes())
