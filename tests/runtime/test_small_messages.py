"""Whole numbers of all ranks reach each of them, in the order of the ranks, or say who is gone."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from processes import run_processes

from autoparallel.errors import AutoParallelError
from autoparallel.runtime.groups import ProcessGroup
from autoparallel.runtime.small_messages import gather_numbers


def gathered(rank: int, world_size: int) -> tuple[list[list[int]], ...]:
    """Return what is gathered of all ranks, twice, and of all but the first by themselves."""
    world = ProcessGroup(dist.group.WORLD)
    some = dist.new_group(list(range(1, world_size)))
    rows = [gather_numbers(world, [rank, 2**62 + turn, -rank]) for turn in range(2)]
    return (*rows, gather_numbers(ProcessGroup(some), [rank]) if rank else [])


def left(rank: int, world_size: int) -> str:
    """Return what is said of the last rank, which closes its connections."""
    world = ProcessGroup(dist.group.WORLD)
    gather_numbers(world, [rank])
    dist.barrier()
    if rank == world_size - 1:
        del world
        dist.destroy_process_group()
        return ""
    try:
        gather_numbers(world, [rank])
    except AutoParallelError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("world_size", [2, 5])
def test_rows_are_those_of_all_ranks(world_size: int) -> None:
    ranks = range(world_size)
    for rank, (*rows, some) in enumerate(run_processes(gathered, world_size, world_size)):
        assert rows == [[[other, 2**62 + turn, -other] for other in ranks] for turn in range(2)]
        assert some == ([[other] for other in ranks[1:]] if rank else [])


def test_a_rank_that_is_gone_is_named() -> None:
    for said in run_processes(left, 3, 3)[:-1]:
        assert "2 did not answer" in said.splitlines()[0]
        assert "all_gather of ranks 0, 1, 2" in said
