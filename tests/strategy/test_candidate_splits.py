"""The splits that are considered of a value are splits of its own size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoparallel
from autoparallel.cost.hardware import find_hardware
from autoparallel.graph.graph import hint
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import divides_in_runs
from autoparallel.strategy.build_network import build_network

# From a weight of 8 columns to 9, or to 4, which are then cut into pieces of unequal sizes.
WINDOWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "convolution": lambda w: F.conv1d(w, torch.ones(3, 3, 2, dtype=w.dtype), padding=1),
    "transposed convolution": lambda w: F.conv_transpose1d(w, torch.ones(3, 3, 2, dtype=w.dtype)),
    "mean": lambda w: F.avg_pool1d(w, 2, 1, 1),
    "maximum": lambda w: F.max_pool1d(w, 2, 1, 1),
}


class Windows(nn.Module):
    """Windows over the columns of a weight."""

    def __init__(self, windows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 3, 8))
        self.windows = windows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.windows(self.weight * x.sum()).split((3, 6), dim=-1)
        return first.square().sum() + second.sum()


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_blocks_are_of_the_value_itself(name: str, ranks: int) -> None:
    """Windows join the columns of a weight and of a result that has one more: blocks of these are
    none of those.
    """
    plan = autoparallel.make_plan(Windows(WINDOWS[name]), 1, example_inputs=torch.ones(2))
    assert plan.captured is not None
    graph = plan.captured.graph
    options = Options(data_parallel=True)
    network = build_network(graph, Mesh(tp=ranks), find_hardware("cpu"), options, {})
    (splits,) = network.splits.values()
    cut = 0
    for value, shards in splits.shards.items():
        for shard in shards:
            size = hint(graph.values[value].shape[shard.dim])
            assert divides_in_runs(size, shard.blocks, shard.unit), (value, shard)
            cut += shard.blocks != 1
    assert cut  # the result itself is cut into blocks
