"""Losses of flattened rows are computed on rows that are not, with equal results."""

from __future__ import annotations

import pytest
from graph_text import graph_of_text, run_graph
from test_golden import compare

from autoparallel.graph.passes.flattened_rows import unflatten_rows

SIZES = {"s0": 3, "s1": 4}
BEFORE = """
%x: float64[s0, s1, 5] = input 0()
%y: int64[s0, s1], no grad = input 1()
%m: float64[s0, s1], no grad = input 2()
%rows: float64[s0*s1, 5] = call aten.reshape.default(%x, (s0*s1, 5))
%labels: int64[s0*s1], no grad = call aten.reshape.default(%y, (s0*s1,))
%mask: float64[s0*s1], no grad = call aten.reshape.default(%m, (s0*s1,))
"""
# What is done with flattened rows, and whether a flattened value is left that something reads.
KINDS = {
    "masked losses": (
        """
%loss: float64[s0*s1] = call aten.cross_entropy_loss.default(%rows, %labels, None, 0)
%kept: float64[s0*s1] = call aten.mul.Tensor(%loss, %mask)
%end: float64[] = call aten.sum.dim_IntList(%kept, (0,), False)
""",
        False,
    ),
    "likelihoods": (
        """
%likely: float64[s0*s1, 5] = call aten.log_softmax.int(%rows, -1)
%end: float64[] = call aten.nll_loss.default(%likely, %labels, None, 2)
""",
        False,
    ),
    "sums of rows": (
        """
%each: float64[s0*s1] = call aten.sum.dim_IntList(%rows, (1,), False)
%end: float64[s0, s1] = call aten.reshape.default(%each, (s0, s1))
""",
        False,
    ),
    "sums of columns": (
        """
%end: float64[5] = call aten.sum.dim_IntList(%rows, (-2,), False)
""",
        False,
    ),
    "squares": (
        """
%other: float64[s0*s1, 5] = call aten.cos.default(%rows)
%end: float64[] = call aten.mse_loss.default(%rows, %other, 2)
""",
        False,
    ),
    "a broadcast row": (
        """
%first: float64[1, 5] = call aten.slice.Tensor(%rows, 0, 0, 1)
%both: float64[s0*s1, 5] = call aten.add.Tensor(%rows, %first)
%end: float64[] = call aten.sum.default(%both)
""",
        True,
    ),
    "a gathered column": (
        """
%place: int64[s0*s1, 1], no grad = call aten.unsqueeze.default(%labels, 1)
%one: float64[s0*s1, 1] = call aten.gather.default(%rows, 1, %place)
%end: float64[] = call aten.sum.default(%one)
""",
        False,
    ),
    "sorted rows": (
        """
%end: float64[s0*s1, 5] = call aten.flip.default(%rows, (0,))
""",
        True,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_not_flattened(kind: str) -> None:
    after, left = KINDS[kind]
    graph = graph_of_text(BEFORE.strip() + after.rstrip() + "\nreturn %end", SIZES)
    changed = unflatten_rows(graph).verify()
    compare(run_graph(graph), run_graph(changed))
    assert ("[s0*s1" in str(changed)) == left
    assert unflatten_rows(changed) == changed
