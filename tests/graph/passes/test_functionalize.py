"""Programs that write in place, also through views: split, they give what the original gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from broad_cases import broad
from split_models import split_as_whole
from torch import nn

from autoparallel.capture.export import capture
from autoparallel.errors import CaptureError
from autoparallel.graph.passes.functionalize import functional

BATCH, SIZE = 3, 12
Tensor = torch.Tensor


def two_slices(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    y[:, :5] = x[:, 7:]
    y[:, 5:] = x[:, :7] * 2
    return y + 1


def a_view_read_after_its_owner_was_written(x: Tensor) -> Tensor:
    y = x * 1.5
    left, row = y[:, :4], y[0]
    y.mul_(2)
    left.add_(row[5:9])
    return y * row + left.sum()


def an_owner_written_through_a_view_of_a_view(x: Tensor) -> Tensor:
    y = x.sin()
    y.view(BATCH, 3, 4).transpose(0, 1)[1].unsqueeze(-1).mul_(3)
    y.unflatten(1, (4, 3)).permute(2, 0, 1)[0, :, ::2].zero_()
    return y


def parts_of_a_split(x: Tensor) -> Tensor:
    y = x.cos()
    weights = torch.arange(SIZE, dtype=x.dtype).mul(0.1).expand(BATCH, SIZE).clone()
    one, two, three = weights.split([3, 4, 5], dim=1)
    first, _ = weights.chunk(2, dim=1)
    two.exp_()
    first.add_(1)
    rows = weights.unbind(0)
    rows[1].copy_(rows[0] + one.sum())
    y.narrow(1, 2, 5).mul_(three)
    return torch.cat([three, two, one], dim=1) * y * weights


def what_it_returns_is_the_operand(x: Tensor) -> Tensor:
    y = x + 1
    z = y.add_(2)
    z.mul_(0.5)
    return y + z


def another_type(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float32)
    y[:, :6] = x[:, :6]
    y += x
    count = torch.arange(SIZE)
    count[2:5] += 3
    count.mul_(2)
    return y.double() * count


def a_broadcast_copy(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:, 2] = 7.0
    y[:, 3:5] = x[:1, :2]
    y[0].fill_(0.5)
    return y.tanh() * x


def truths(x: Tensor) -> Tensor:
    mask = x > 0
    mask &= x < 1
    mask[0] |= True
    return x.masked_fill(mask, 0.25)


def without_gradient(x: Tensor) -> Tensor:
    y = x * 2
    z = torch.zeros_like(x)
    with torch.no_grad():
        y[:, 0] += 1
        y[:, 1] = 3.0
        y.mul_(1.5)
        z[:, 2:] = x[:, 2:]
    return y * y + x * z


def infinite_numbers_without_gradient(x: Tensor) -> Tensor:
    y = x.masked_fill(x > 0.1, float("-inf"))
    with torch.no_grad():
        y.clamp_(-5, 5)
    return y * 2


def stopped_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax(1, keepdim=True)
        centre = (x * scale).mean(1, keepdim=True)
    return (x - centre) / scale + x.detach() * x


PROGRAMS = [
    two_slices,
    a_view_read_after_its_owner_was_written,
    an_owner_written_through_a_view_of_a_view,
    parts_of_a_split,
    what_it_returns_is_the_operand,
    another_type,
    a_broadcast_copy,
    truths,
    without_gradient,
    infinite_numbers_without_gradient,
    stopped_gradients,
]


class Runs(nn.Module):
    """A program between two products."""

    def __init__(self, program: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.program = program
        self.first = nn.Linear(8, SIZE)
        self.last = nn.Linear(SIZE, 8)

    def forward(self, x: Tensor) -> Tensor:
        """x: (BATCH, 8). Returns a loss."""
        return self.last(self.program(self.first(x))).square().sum()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("world_size", [*broad(2), 3])
def test_split_programs_give_what_the_original_gives(
    program: Callable[[Tensor], Tensor], world_size: int
) -> None:
    torch.manual_seed(0)
    model = Runs(program).double()
    x = torch.randn(BATCH, 8, dtype=torch.float64)
    split_as_whole(model, world_size, x)


def test_no_op_writes_in_place_afterwards() -> None:
    """And a second run changes nothing."""
    graph = functional(capture(Runs(parts_of_a_split), (torch.zeros(BATCH, 8),), {}).graph)
    names = [node.target.split(".")[1] for node in graph.calls]
    assert not [name for name in names if name.endswith("_")]
    assert str(functional(graph)) == str(graph)


def test_what_may_be_a_copy_is_not_written_through() -> None:
    """A reshape of a transposed tensor is a copy, of another one a view."""

    def unclear(x: Tensor) -> Tensor:
        y = x * 2
        y.reshape(-1)[0] += 1
        return y

    with pytest.raises(CaptureError, match=r"may be a view or a copy"):
        functional(capture(Runs(unclear), (torch.zeros(BATCH, 8),), {}).graph)


def test_an_expanded_view_is_not_written_through() -> None:
    """It sees one element many times."""

    def twice(x: Tensor) -> Tensor:
        y = x.sum(0, keepdim=True)
        y.expand(BATCH, SIZE)[0].mul_(2)
        return y + x

    with pytest.raises(CaptureError, match=r"aten.expand.default lies between them"):
        functional(capture(Runs(twice), (torch.zeros(BATCH, 8),), {}).graph)
