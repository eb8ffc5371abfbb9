"""Normalizations over the last dims, which stay whole."""

from __future__ import annotations

from autoparallel.rules.registry import rule
from autoparallel.rules.rule import OpCall, ShardingRule


@rule("aten.layer_norm.default", "aten.rms_norm.default")
def last_dims(call: OpCall) -> ShardingRule:
    """y[..., n] = (x - mean_n) / deviation_n * w[n] + b[n]: all but the last dims are free."""
    count = len(call.node.args[1])
    inner = " ".join(f"n{i}" for i in range(count))
    affine = f", {inner}" * (len(call.operands) - 1)
    return ShardingRule.parse(
        f"... {inner}{affine} -> ... {inner}", call, whole=[f"n{i}" for i in range(count)]
    )
