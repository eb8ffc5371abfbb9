"""Ranks that are started again meet each other, and nobody of the starts before."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.meeting import meet

PATIENCE = timedelta(seconds=60)


def require_new_place(stores: list[dist.Store]) -> None:
    """Nothing is where the ranks have met, and what one writes all read."""
    assert not any(store.check(["mark"]) for store in stores)
    stores[0].set("mark", "here")
    assert all(store.check(["mark"]) for store in stores)


def met(store: dist.Store, ranks: list[int], world_size: int) -> list[dist.Store]:
    """Let ranks come in an order, each in a thread."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(meet, store, rank, world_size, PATIENCE) for rank in ranks]
        return [future.result() for future in futures]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_each_start_has_a_place_of_its_own(order: list[int]) -> None:
    store = dist.HashStore()
    for _ in range(3):
        require_new_place(met(store, order, 3))


def test_a_start_that_ended_half_way_is_passed_over() -> None:
    """Of the start before, rank 0 showed its name, rank 1 answered, and rank 2 never came."""
    store = dist.HashStore()
    left = dist.PrefixStore("autoparallel/meeting", store)
    left.set("leader", "gone")
    left.set("gone/1", "also gone")
    require_new_place(met(store, [1, 2, 0], 3))
    # Of this one, a rank dies as soon as all have met.
    left.set("leader", "gone again")
    left.set("gone again/all", json.dumps({"1": "dead", "2": "dead"}))
    require_new_place(met(store, [2, 1, 0], 3))


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    with pytest.raises(AutoParallelError, match=r"2 of 3 ranks have not come: 1, 2"):
        meet(store, 0, 3, timedelta(seconds=0.2))
    with pytest.raises(AutoParallelError, match="rank 2 has not met the others"):
        meet(store, 2, 3, timedelta(seconds=0.2))
