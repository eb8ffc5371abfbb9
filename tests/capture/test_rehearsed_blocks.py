"""Blocks that cannot be hidden, or are called as none before them, are no reason to trace again."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from block_stacks import LAYERS, WIDTH, Block, Stack, both, numbered, sample, stack
from torch import nn

from autoparallel.capture import export, rehearsed_blocks
from autoparallel.capture.export import capture


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many blocks were hidden in each trace that was begun."""
    counts: list[int] = []
    plain = export._exported

    def noted(wanted: Any, folding: Any, *others: Any) -> Any:
        """Trace as ever."""
        counts.append(-1)
        result = plain(wanted, folding, *others)
        counts[-1] = len(folding.calls)
        return result

    monkeypatch.setattr(export, "_exported", noted)
    return counts


class Shrinking(Stack):
    """A Shrinking stack halves the places behind its second block and behind its fourth."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, places, WIDTH)."""
        for number, block in enumerate(self.blocks):
            x = block(self.stem(x))
            x = x[:, ::2] if number % 2 else x
        return x


def test_blocks_of_other_sizes_are_copied_from_the_first_one(hidden: list[int]) -> None:
    model = Shrinking(Block() for _ in range(LAYERS))
    x = torch.randn(3, 16, WIDTH)
    captured = capture(model, (x,), {})
    assert hidden == [LAYERS - 2]
    assert captured.repeats == (("blocks.0", "blocks.1"),)
    assert both(model, x).graph == captured.graph


class Dropping(Block):
    """A Dropping block draws numbers, and runs a part of itself twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, places, WIDTH)."""
        x = nn.functional.dropout(self.norm(x), 0.5)
        return super().forward(self.norm(x)) + torch.tensor([0.5] * WIDTH, device=x.device)


def test_what_is_only_copied_leaves_nothing_in_the_graph() -> None:
    """Neither its random numbers, nor its names, nor the numbers of its modules' calls."""
    both(Shrinking(Dropping() for _ in range(LAYERS)), torch.randn(3, 16, WIDTH))


class Counting(Block):
    """A Counting block has numbers of its own that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, places, WIDTH)."""
        self.calls.add_(1)
        return super().forward(x)


class Numbered(Block):
    """A Numbered block reads its number."""

    layer_idx: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, places, WIDTH)."""
        return super().forward(x) * (1 + self.layer_idx)


@pytest.mark.parametrize("kind", ["writes", "reads its number"])
def test_blocks_that_do_more_than_compute_leave_others_hidden(hidden: list[int], kind: str) -> None:
    first = Stack(Counting() for _ in range(3)) if kind == "writes" else numbered(Numbered)
    model = nn.Sequential(first, stack())
    captured = capture(model, (sample(),), {})
    assert hidden == [LAYERS - 2]
    assert captured.repeats == (tuple(f"1.blocks.{number}" for number in range(LAYERS - 1)),)
    both(model, sample())


def with_a_default(forward: Any) -> Any:
    """Return a forward that is given `scale` by name in any case, as libraries decorate theirs."""

    @functools.wraps(forward)
    def decorated(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, scale=kwargs.pop("scale", 2.0), **kwargs)

    return decorated


class Decorated(nn.Module):
    """A Decorated model takes an argument by its name alone, though its signature says less."""

    def __init__(self) -> None:
        super().__init__()
        self.counting, self.others = Stack(Counting() for _ in range(3)), stack()

    @with_a_default
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """x: (batch, places, WIDTH)."""
        result: torch.Tensor = self.others(self.counting(x)) * scale
        return result


def test_the_run_makes_the_call_as_it_is_made(hidden: list[int]) -> None:
    capture(Decorated(), (sample(),), {"scale": 3.0})
    assert hidden == [LAYERS - 2]


class Asking(nn.Module):
    """An Asking model has no run on tensors without data: it looks for the device of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, places, WIDTH)."""
        if x.device.type == "meta":
            raise RuntimeError("no such device")
        result: torch.Tensor = self.inner(x)
        return result


def test_a_model_that_cannot_be_run_before_is_traced_as_ever(hidden: list[int]) -> None:
    capture(Asking(), (sample(),), {})
    assert hidden == [LAYERS - 2]


def test_blocks_that_hold_nothing_to_write_to_are_not_run_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run would tell nothing of them; with buffers, or with numbers of their own, it may."""
    ran: list[nn.Module] = []
    run = rehearsed_blocks.census_of

    def noting(model: nn.Module, *others: Any) -> Any:
        ran.append(model)
        return run(model, *others)

    monkeypatch.setattr(rehearsed_blocks, "census_of", noting)
    plain, counting, counted = (
        stack(),
        nn.Sequential(Stack(Counting() for _ in range(3)), stack()),
        nn.Sequential(numbered(Numbered), stack()),
    )
    for model in (plain, counting, counted):
        capture(model, (sample(),), {})
    assert ran == [counting, counted]
