"""Batch and heads merged, moved and divided again are seen as what they are: torch's own layers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from split_models import split_as_whole
from torch import nn
from torch.nn import functional as F

import autoparallel
from autoparallel.analysis.communication import transfers
from autoparallel.capture.export import capture
from autoparallel.graph.passes.merged_dims import see_through_merges
from autoparallel.graph.passes.run_passes import run_passes

BATCH, SEQUENCE, HEADS, WIDTH = 3, 5, 4, 24
Tensor = torch.Tensor


class Moves(nn.Module):
    """(s, b, heads * 6): as (s, b * heads, 6), and moved as that, before it is taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        sequence, batch, _ = x.shape
        y = self.first(x).reshape(sequence, batch * HEADS, 6).transpose(0, 1)
        y = y.reshape(batch, HEADS, sequence, 6).softmax(2)
        y = y.permute(2, 0, 1, 3).reshape(sequence * batch, WIDTH)
        return self.last(y).reshape(sequence, batch, WIDTH).square().sum()


def test_what_is_merged_is_read_apart() -> None:
    """No merged value is left, nor a product of flattened rows; a second run changes nothing."""
    graph = run_passes(capture(Moves(), (torch.zeros(SEQUENCE, BATCH, WIDTH),), {}).graph)
    symbols = [len(size.free_symbols) for size in _expressions(graph)]
    assert max(symbols) == 1
    ranks = [len(node.result.shape) for node in graph.calls if "linear" in node.target]
    assert ranks == [3, 3]
    assert str(see_through_merges(graph)) == str(graph)


def _expressions(graph):
    return [
        size.expr
        for value in graph.values.values()
        for size in value.shape
        if not isinstance(size, int)
    ]


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("data_parallel", [False, True])
def test_the_split_model_is_the_model(world_size: int, data_parallel: bool) -> None:
    """Loss and every gradient."""
    torch.manual_seed(0)
    model = Moves().double()
    x = torch.randn(SEQUENCE, BATCH, WIDTH, dtype=torch.float64)
    split_as_whole(model, world_size, x, data_parallel=data_parallel)


class Encoder(nn.Module):
    """torch's own transformer layers, of real width, between an embedding and a loss."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(2048, 16, 8192, dropout=0.1)
        self.table = nn.Embedding(32000, 2048)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(2048, 32000)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.body(self.table(tokens).transpose(0, 1)).transpose(0, 1)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def test_layers_of_torch_are_split_as_megatron_does() -> None:
    """Two all-reduces of (s, b, h) forward and two backward for every layer, and no more."""
    tokens = torch.zeros(4, 2048, dtype=torch.long)
    counts = []
    for layers in (2, 3):
        with torch.device("meta"):
            model = Encoder(layers).to(torch.bfloat16)
        plan = autoparallel.make_plan(
            model,
            8,
            example_inputs=(tokens, tokens),
            sequence_parallel=False,
            hardware="dgx-a100",
        )
        assert plan.split_flops > 0.99
        counts.append(
            Counter(
                (sent.phase, sent.collective.value) for sent in transfers(plan) if not sent.together
            )
        )
    counts[1].subtract(counts[0])
    assert {key: count for key, count in counts[1].items() if count} == {
        ("forward", "all_reduce"): 2,
        ("backward", "all_reduce"): 2,
    }
