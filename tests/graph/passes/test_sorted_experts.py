"""What looks like routed experts and is not stays as it is written."""

from __future__ import annotations

import pytest
from graph_text import graph_of_text
from test_golden import FOLDER, Golden

from autoparallel.graph.passes.sorted_experts import join_routed_experts

# By what is different, the text in the golden graph and the one in its place, and how many of the
# graph's two sums are still those of experts.
CHANGES = {
    "numbers are drawn": ("silu.default(%even)", "dropout.default(%even, 0.5, True)", 0),
    "experts are counted in wider bins": ("(%counted, 4, 0, 3)", "(%counted, 4, 0, 7)", 0),
    "ends are not sums from the start": ("cumsum.default(%counts", "cumprod.default(%counts", 0),
    "rows are of other tokens": ("divide.default(%order, 2)", "divide.default(%order, 3)", 0),
    "rows come back in another order": ("arange.default(6)", "arange.start(1, 7)", 1),
    "rows are scaled by those beside them": ("silu.default(%even)", "softmax.int(%even, 0)", 0),
    "something was there before": ("zeros_like.default(%x)", "ones_like.default(%x)", 1),
    "nothing": ("silu", "silu", 2),
}


@pytest.mark.parametrize(("old", "new", "count"), CHANGES.values(), ids=list(CHANGES))
def test_others_stay(old: str, new: str, count: int) -> None:
    golden = Golden.read(FOLDER / "join_routed_experts.txt")
    assert old in golden.before
    graph = graph_of_text(golden.before.replace(old, new), golden.sizes)
    assert str(join_routed_experts(graph)).count("routed_experts") == count
