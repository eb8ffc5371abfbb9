"""Masks that keep as many rows as something else has: other calls go as in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.errors import CaptureError

Tensor = torch.Tensor
ROWS = 30_000  # so many that it is quickest to split them


def by_mask(x: Tensor, kept: Tensor) -> Tensor:
    return x[kept]


def by_places(x: Tensor, kept: Tensor) -> Tensor:
    (places,) = torch.where(kept)
    return x[places]


def selected(x: Tensor, kept: Tensor) -> Tensor:
    return x.masked_select(kept)


class Net(nn.Module):
    """Adds rows that are kept to others, of which there are as many."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.pick = pick

    def forward(self, x: Tensor, kept: Tensor, other: Tensor) -> Tensor:
        y = self.pick(x, kept) + other
        for _ in range(6):
            y = (y * self.scale).sin().exp()
        return y.sum()


def given(kept: int, others: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kept)
    x = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    mask = torch.randperm(ROWS, generator=generator) < kept
    return x, mask, torch.randn(others, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("pick", [by_mask, by_places])
def test_other_numbers_of_rows_are_what_they_are_in_the_forward(
    pick: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """One row is that of all others, and three are no four, of which each rank would have two."""
    plan = autoparallel.make_plan(Net(pick), 2, example_inputs=given(20_000, 20_000))
    assert not plan.breaks
    for sizes in ((20_000, 20_000), (9, 9), (1, 2)):
        split = autoparallel.simulate(Net(pick), plan=plan, example_inputs=given(*sizes))
        torch.testing.assert_close(split.output, Net(pick)(*given(*sizes)))
    with pytest.raises(RuntimeError, match=r"tensor a \(3\) must match .* tensor b \(4\)"):
        autoparallel.simulate(Net(pick), plan=plan, example_inputs=given(3, 4))


def test_other_ops_of_such_results_stay_python() -> None:
    """And where there is nothing else, it is said."""
    with pytest.raises(CaptureError, match="depends on values, is taken for known"):
        autoparallel.make_plan(Net(selected), 2, example_inputs=given(20_000, 20_000))


def test_of_nothing_the_number_is_known() -> None:
    """There is no mask to count, also where an op returns several tensors of that number."""

    class Distinct(Net):
        def forward(self, x: Tensor) -> Tensor:
            found = torch.unique_consecutive(x.detach()[:, :0], return_inverse=True, dim=1)
            return (x * self.scale).sum() + sum(each.numel() for each in found)

    x = torch.randn(4, 3, dtype=torch.float64)
    plan = autoparallel.make_plan(Distinct(by_mask), 2, example_inputs=x)
    assert not plan.breaks
    split = autoparallel.simulate(Distinct(by_mask), plan=plan, example_inputs=x)
    torch.testing.assert_close(split.output, (x * 0.5).sum())
