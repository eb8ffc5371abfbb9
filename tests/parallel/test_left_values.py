"""Tensors that a forward makes once and keeps in an attribute: others may replace or fill them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from split_ranks import programs_of
from torch import nn

import autoparallel


class Lazy(nn.Module):
    """It makes a mask at its first call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4).double()
        self.mask: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            self.mask = torch.full((4,), 2.0, dtype=x.dtype)
        return (self.linear(x) * self.mask).square().sum()


class OfClass(Lazy):
    """The attribute is the class's at first."""

    mask = None

    def __init__(self) -> None:
        super().__init__()
        del self.mask


class Sized(Lazy):
    """It makes a mask anew where the length is another one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask is None or self.mask.size(0) != x.size(0):
            self.mask = torch.arange(1, x.size(0) + 1, dtype=x.dtype)
        return (self.linear(x) * self.mask[:, None]).square().sum()


def numbers(rows: int = 3) -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * rows, dtype=torch.float64).view(rows, 4)


def split(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    plain = copy.deepcopy(model)
    return autoparallel.autoparallelize(model, 1, example_inputs=numbers()), plain


def compare(module: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    torch.testing.assert_close(module(x), plain(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("model", [Lazy, OfClass])
def test_what_others_put_there_is_read(model: type[Lazy]) -> None:
    """Replaced, filled in place, and given up, between calls."""
    module, plain = split(model())
    for _ in range(3):
        compare(module, plain, numbers())
    assert programs_of(module) == 1
    for each in (module, plain):
        each.mask = torch.full((4,), 5.0, dtype=torch.float64)
    compare(module, plain, numbers())
    for each in (module, plain):
        each.mask.fill_(7)
    compare(module, plain, numbers())
    for each in (module, plain):
        each.mask = None
    compare(module, plain, numbers())
    compare(module, plain, numbers())


def test_what_a_program_left_is_filled() -> None:
    """The tensor is the program's own, and has another content now."""
    module, plain = split(Lazy())
    for _ in range(2):
        compare(module, plain, numbers())
    for each in (module, plain):
        each.mask.fill_(7)
    compare(module, plain, numbers())


def test_what_a_program_of_another_length_left_is_as_right() -> None:
    """No call traces again because the one before it was of another length."""
    module, plain = split(Sized())
    for rows in (3, 5, 3, 5, 3, 5):
        compare(module, plain, numbers(rows))
    made = programs_of(module)
    for rows in (3, 5, 3, 5):
        compare(module, plain, numbers(rows))
    assert programs_of(module) == made <= 2
