"""What each rank computes of attention whose sequence is split."""

from __future__ import annotations

import pytest
import torch

from autoparallel.runtime.groups import AbsentGroup
from autoparallel.runtime.split_attention import _deal, _Work


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_causal_mask_leaves_all_ranks_the_same_work(world_size: int, passes: bool) -> None:
    """With contiguous parts the last rank would have twice the mean. Nothing that is hidden is
    computed.
    """
    length = 24
    deal = _deal(length, world_size, True)
    works = []
    for rank in range(world_size):
        work = _Work(AbsentGroup(rank, world_size), True, 1.0, deal, deal, passes)
        seen = 0
        for step in range(work.steps):
            for _, rows, _, sight in work.blocks(step, None, torch.device("cpu")):
                queries = rows.stop - rows.start
                assert sight.mask is None
                assert not sight.causal or queries == sight.keys
                seen += queries * (queries + 1) // 2 if sight.causal else queries * sight.keys
        works.append(seen)
    assert works == [length * (length + 1) // 2 // world_size] * world_size
