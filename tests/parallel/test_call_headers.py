"""Ranks that are called differently say so, in any call, and are not ended by what communicates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.parallel.call_headers import checksum


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(6, 12), nn.Linear(12, 6), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))) * self.scale


def calls(rank: int, world_size: int) -> dict[str, str]:
    """Return the errors of calls in which the last rank differs, after four in which none does."""
    torch.manual_seed(0)
    x, last = torch.randn(4, 6), rank == world_size - 1
    model: Any = autoparallel.autoparallelize(Scores(), world_size, example_inputs=(x,))
    for _ in range(2):
        model.eval()(x)
        model.train()(x)
    said = {}

    def tried(name: str, *args: Any) -> None:
        try:
            model(*args)
            said[name] = ""
        except AutoParallelError as error:
            said[name] = str(error)

    tried("values", x + last)
    tried("one value", x.index_fill(1, torch.tensor(2), 0) if last else x)
    tried("sizes", x[: 3 if last else 4])
    model.train(not last)
    tried("modes", x)
    model.train()
    model.up.weight.requires_grad_(not last)
    tried("frozen", x)
    model.up.weight.requires_grad_()
    model.scale = 2.0 if last else 1.0
    tried("attributes", x)
    model.scale = 1.0
    with torch.set_grad_enabled(not last):
        tried("gradients", x)
    tried("none", x)
    return said


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_differs_is_said_on_all_ranks(world_size: int) -> None:
    results = run_processes(calls, world_size, world_size, timeout_seconds=60.0)
    words = {
        "values": "were given different inputs: x",
        "one value": "were given different inputs: x",
        "sizes": "the sizes, types or number of the inputs",
        "modes": "the modes of modules",
        "frozen": "the parameters that are trained",
        "attributes": "the program that fits the call",
        "gradients": "whether gradients are recorded",
    }
    for rank, said in enumerate(results):
        for name, text in words.items():
            assert text in said[name], (rank, name, said[name])
            assert (
                f"rank {rank}, call of Scores: rank {world_size - 1} and rank 0 differ"
                in (said[name])
            )
        assert said["none"] == ""


def test_samples_tell_of_the_end_of_a_large_input() -> None:
    x = torch.zeros(1000, 100)
    other = x.clone()
    other[-20:] = 1
    assert checksum(x) != checksum(other)
    assert checksum(x.T) == checksum(x.T.contiguous()[:64]) != checksum(other.T)
    assert checksum(x.to("meta")) == 0
    assert checksum(torch.tensor(True)) != checksum(torch.tensor(False))
    assert checksum(torch.ones(3, dtype=torch.bfloat16)) != 0
