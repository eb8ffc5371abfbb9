"""Sizes that are too intricate to follow fix the dims that they come from, and no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import autoparallel
from autoparallel.capture.export import capture
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Sym
from autoparallel.parallel.module_state import state_of


class Windows(nn.Module):
    """Pads images to whole windows and merges four pixels into one; and once more, which is too
    much.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, h, w, 8)."""
        for mix in self.mix:
            batch, height, width, _ = x.shape
            x = F.pad(x, (0, 0, 0, -width % 3, 0, -height % 3))
            high, wide = x.shape[1] // 3, x.shape[2] // 3
            x = x.view(batch, high, 3, wide, 3, 8).transpose(2, 3).reshape(-1, 9, 8)
            x = mix(x).view(-1, high, wide, 3, 3, 8).transpose(2, 3)
            x = x.reshape(-1, high * 3, wide * 3, 8)[:, :height:2, :width:2]
        return x.square().sum()


class Strides(nn.Module):
    """Many convolutions with strides, on images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 4, 3, 2) for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).sum()


class Halves(nn.Module):
    """Blocks of two rows, by their number and what it leaves for each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, n, 8)."""
        count = x.shape[1] // 2
        rows = x.shape[1] // count
        x = self.layer(x[:, : count * rows].reshape(-1, count, rows, 8))
        return torch.softmax(x, 2).sum()


def free_dims(captured: Captured) -> list[bool]:
    node = next(node for node in captured.graph.nodes if node.kind == "input")
    return [isinstance(size, Sym) for size in node.result.shape]


def test_convolutions_fix_nothing() -> None:
    """Their sizes simplify."""
    captured = capture(Strides(), (torch.randn(2, 3, 900, 800),), {})
    assert free_dims(captured) == [True, False, True, True]


def test_a_quotient_by_a_quotient_is_fixed() -> None:
    """It has few operations, and what follows from it cannot be compared with anything."""
    captured = capture(Halves(), (torch.randn(3, 12, 8),), {})
    assert free_dims(captured) == [True, False, False]


def test_only_what_is_intricate_is_fixed() -> None:
    """Height and width of padded windows are, and the batch stays free: one module for images of
    two sizes and batches of three, planned anew where a size is another.
    """
    model = Windows().double()
    first = torch.randn(3, 13, 17, 8, dtype=torch.float64)
    split: Any = autoparallel.autoparallelize(model, 1, example_inputs=first)
    assert free_dims(split.plan.captured) == [True, False, False, False]
    for shape in ((3, 13, 17, 8), (2, 13, 17, 8), (4, 20, 9, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.allclose(split(x), model(x), rtol=1e-12)
    assert sum(map(len, state_of(split).entries.values())) == 2


class ShortWindows(nn.Module):
    """Windows of four on rows of four to seven numbers: there is one, and no size says so."""

    def __init__(self) -> None:
        super().__init__()
        self.windows, self.head = nn.Conv1d(3, 8, 4, 4), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, 3, n)."""
        assert 4 <= x.shape[2] < 8
        h = self.windows(x).transpose(1, 2)
        return (h + self.head(h).mean(1, keepdim=True)).square().sum()


def test_a_size_that_the_tracer_knows_is_a_number() -> None:
    """The sum has one window where an operand of it has n // 4, which are the same for these n."""
    torch.manual_seed(0)
    model, x = ShortWindows().double(), torch.randn(5, 3, 6, dtype=torch.float64)
    expected = model(x)
    expected.backward()
    result = autoparallel.simulate(model, 2, example_inputs=x)
    torch.testing.assert_close(result.output, expected.detach())
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(result.gradients[path], parameter.grad)


class Halved(nn.Module):
    """Asks for a remainder of a fraction, which torch's symbolic sizes cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if x.shape[1] % 0.5 != 0:
            raise ValueError("not in halves")
        return (self.mix(x).mean(1) + ids.sum(1, keepdim=True)).square().sum()


def test_sizes_that_torch_cannot_compute_with_are_fixed() -> None:
    """The batch and the length of a text stay free."""
    captured = capture(Halved(), (torch.randn(2, 6, 8), torch.ones(2, 5, dtype=torch.long)), {})
    image, ids = [node for node in captured.graph.nodes if node.kind == "input"]
    assert [isinstance(size, Sym) for size in image.result.shape] == [True, False, False]
    assert [isinstance(size, Sym) for size in ids.result.shape] == [True, True]
