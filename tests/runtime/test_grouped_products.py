"""Products of sorted rows with their groups' matrices, by torch's kernel and by the op of ours."""

from __future__ import annotations

import pytest
import torch

from autoparallel.graph.graph import Ref
from autoparallel.graph.row_program import RowProgram, RowStep
from autoparallel.runtime.grouped_products import grouped_product, multiply
from autoparallel.runtime.routed_experts import routed_experts


def rows_and_matrices(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 16, generator=generator).to(torch.bfloat16).requires_grad_()
    weight = torch.randn(3, 16, 8, generator=generator).to(torch.bfloat16).requires_grad_()
    return x, weight, torch.tensor([2, 2, rows], dtype=torch.int32)


@pytest.mark.parametrize("rows", [5, 8])
def test_torchs_kernel_gives_the_same(rows: int) -> None:
    """Whatever the number of rows is, and with a group without rows."""
    x, weight, ends = rows_and_matrices(rows)
    results = [multiply(x, weight, ends), grouped_product(x, weight, ends)]
    names = [type(result.grad_fn).__name__ for result in results]
    assert "Contiguous" in names[0]
    assert "Contiguous" not in names[1]
    gradients = [torch.autograd.grad(result.sum(), (x, weight)) for result in results]
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=0.02)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("wrong", ["rows", "values"])
def test_rows_and_choices_of_other_batches_are_refused(wrong: str) -> None:
    """Where there are fewer tokens than choices, or more, rows of other tokens would be read."""
    step = RowStep(("y",), "product", (Ref("row0"), Ref("table0")))
    rows, values = torch.ones(5, 2), torch.ones(5, 1)
    rows, values = (rows[:4], values) if wrong == "rows" else (rows, values[:4])
    chosen, table = torch.zeros(5, 1, dtype=torch.int64), torch.ones(3, 2, 2)
    with pytest.raises(ValueError, match="is not one for each of"):
        routed_experts([rows], chosen, [values], [table], [], RowProgram((step,), "y").text())
