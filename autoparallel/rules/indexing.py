"""Look-ups."""

from __future__ import annotations

from autoparallel.placement import Partial
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Kernel, OpCall, ShardingRule


@rule("aten.embedding.default")
def embedding(call: OpCall) -> ShardingRule:
    """y[..., h] = w[index[...], h]. Split over the rows with a mask, each rank adds its own."""
    scaled = call.argument(3, "scale_grad_by_freq", False) or call.argument(4, "sparse", False)
    return ShardingRule.parse(
        "v h, ... -> ... h",
        call,
        whole=["v"] if scaled else [],
        linear=[{0}],
        kernels={"v": Kernel("embedding_rows", Partial())},
    )
