"""Plans are made for a larger batch than tiny example inputs have, and for nothing impossible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoparallel.capture.export import capture
from autoparallel.graph.graph import hint
from autoparallel.graph.size_hints import with_larger_hints


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long)


class Positions(nn.Module):
    """A table of 64 positions, looked up along `dim`, counted by `count`."""

    def __init__(self, count: Callable[[Tensor, int], Tensor], dim: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(10, 4), nn.Embedding(64, 4)
        self.count, self.dim = count, dim

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: integers. The words at their places."""
        places: Tensor = self.positions(self.count(tokens, self.dim))
        words: Tensor = self.words(tokens)
        return words + places


def arange(tokens: Tensor, dim: int) -> Tensor:
    places = torch.arange(tokens.shape[dim])
    return places[:, None] if dim == 0 else places[None]


def running_sum(tokens: Tensor, dim: int) -> Tensor:
    return torch.ones_like(tokens).cumsum(dim) - 1


class Buffered(nn.Module):
    """Adds the first rows of a buffer of 64, which the tracer guards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, 4), 64 rows at most."""
        y: Tensor = x + self.table[: x.shape[0]]
        return y


class Two(nn.Module):
    """Reads two tensors."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The two must have a dim in common: (b, s) and (s, s), or (n, 3) and (n, n)."""
        if first.shape[1] == second.shape[0]:
            return first @ second
        return first + second @ first


def sizes(model: nn.Module, *inputs: Tensor, elements: int = 8192) -> list[tuple[int, ...]]:
    """The sizes of the inputs that are planned for."""
    graph = with_larger_hints(capture(model, inputs, {}), elements)
    values = [node.result for node in graph.nodes if node.kind == "input"]
    return [tuple(map(hint, value.shape)) for value in values]


@pytest.mark.parametrize("count", [arange, running_sum])
def test_the_batch_grows_and_the_sequence_does_not(count: Any) -> None:
    """8192 tokens are 128 sequences of 64, and not 8 of 1024, which has no position."""
    assert sizes(Positions(count, 1), ids(8, 64)) == [(128, 64)]
    assert sizes(Positions(count, 1), ids(3, 5)) == [(3 * 547, 5)]


@pytest.mark.parametrize("count", [arange, running_sum])
def test_no_table_is_read_past_its_end(count: Any) -> None:
    """Where the sequence comes first, it grows as far as there are positions."""
    ((sequence, batch),) = sizes(Positions(count, 0), ids(8, 4))
    assert batch == 4
    assert 32 < sequence <= 64


def test_what_the_tracer_took_for_granted_holds() -> None:
    """A buffer of 64 rows has no more."""
    ((rows, features),) = sizes(Buffered(), torch.zeros(5, 4))
    assert features == 4
    assert 32 < rows <= 64


def test_inputs_grow_alike() -> None:
    """A mask of (sequence, sequence) stays; nodes with their adjacency matrix are the batch."""
    assert sizes(Two(), torch.zeros(4, 16), torch.zeros(16, 16)) == [(512, 16), (16, 16)]
    ((nodes, _), adjacency) = sizes(Two(), torch.zeros(8, 3), torch.zeros(8, 8))
    assert nodes > 8
    assert adjacency == (nodes, nodes)


def test_large_inputs_stay() -> None:
    """As do those of one element, whose size the tracer fixes."""
    assert sizes(nn.Linear(4, 4), torch.zeros(5, 4), elements=5) == [(5, 4)]
    assert sizes(nn.Linear(4, 4), torch.zeros(1, 4)) == [(1, 4)]
