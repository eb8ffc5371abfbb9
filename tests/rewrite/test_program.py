"""Emitted programs are ordinary Python to tracebacks."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoparallel


class Lookup(nn.Module):
    """Dropout comes before the look-up, so that its line is another one in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(4, 4)
        self.table = nn.Embedding(5, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.dropout(torch.tanh(self.dropout(self.scale(x)))))
        return (x + self.table(places)).sum()


def test_tracebacks_show_the_failing_line_in_both_modes() -> None:
    """The programs of two modes do not share the text that tracebacks read."""
    torch.manual_seed(0)
    x, places = torch.randn(3, 4), torch.tensor([0, 1, 2])
    model = Lookup()
    parallel = autoparallel.autoparallelize(model, 1, example_inputs=(x, places))
    sources = {}
    for training in (True, False):
        parallel.train(training)
        parallel(x, places)
        sources[training] = parallel.emitted_program
    assert sources[True] != sources[False]
    for training in (True, False, True):
        parallel.train(training)
        with pytest.raises(IndexError) as caught:
            parallel(x, torch.tensor([0, 1, 9]))
        frames = traceback.extract_tb(caught.value.__traceback__)
        frame = next(frame for frame in frames if frame.filename.startswith("<autoparallel"))
        own = sources[training].splitlines()[frame.lineno - 1].strip()
        assert "embedding(" in own
        assert frame.line == own
