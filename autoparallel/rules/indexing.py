"""Look-ups."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.placement import Partial
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Kernel, OpCall, ShardingRule


@rule("aten.embedding.default")
def embedding(call: OpCall) -> ShardingRule:
    """y[..., h] = w[index[...], h]. Split over the rows with a mask, each rank adds its own.

    A gradient scaled by how often a row is read must see all of the index; a sparse one has no
    conversions.
    """
    scaled, sparse = (
        call.argument(3, "scale_grad_by_freq", False),
        call.argument(4, "sparse", False),
    )
    made = ShardingRule.parse(
        "v h, ... -> ... h", call, linear=[{0}], kernels={"v": Kernel("embedding_rows", Partial())}
    )
    whole = set(made.loops) - (set() if sparse else {"h"}) if scaled or sparse else set()
    return replace(made, whole=frozenset(whole))
