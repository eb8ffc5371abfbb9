"""Rules are matched with calls; a call whose shapes contradict its op is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autoparallel.capture.export import capture
from autoparallel.errors import UnsupportedOpError
from autoparallel.graph.graph import Graph
from autoparallel.options import Options
from autoparallel.strategy.rule_matching import match_rules


def test_shapes_that_the_op_cannot_have() -> None:
    """Torch 2.11 traces the last state of an LSTM with four dims, not three."""
    graph = capture(nn.LSTM(4, 6, proj_size=3), (torch.ones(5, 2, 4),), {}).graph
    (node,) = (node for node in graph.calls if "lstm" in node.target)
    first, second, third = node.results
    wrong = replace(second, shape=(1, *second.shape[-3:]))
    nodes = [replace(n, results=(first, wrong, third)) if n is node else n for n in graph.nodes]
    with pytest.raises(UnsupportedOpError, match="4 dims in place of 3") as caught:
        match_rules(Graph(tuple(nodes), graph.outputs, ()), set(), Options(), 2)
    # What nobody reads does no harm.
    match_rules(Graph(tuple(nodes), graph.outputs[:1], ()), set(), Options(), 2)
    assert torch.__version__ in caught.value.why
