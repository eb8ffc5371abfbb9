"""Products: sums over a shared loop."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.rules.registry import rule
from autoparallel.rules.rule import OpCall, ShardingRule

LINEAR_IN_EACH = ({0}, {1})


@rule("aten.linear.default")
def linear(call: OpCall) -> ShardingRule:
    """y[..., n] = sum_k x[..., k] w[n, k]. Split n: column-parallel, k: row-parallel."""
    made = ShardingRule.parse("... k, n k -> ... n", call, linear=LINEAR_IN_EACH, flops=2)
    return replace(made, takes_bias=True)


@rule("aten.mm.default")
def mm(call: OpCall) -> ShardingRule:
    """C[m,n] = sum_k A[m,k] B[k,n] (arXiv:1909.08053)."""
    return ShardingRule.parse("m k, k n -> m n", call, linear=LINEAR_IN_EACH, flops=2)


@rule("aten.bmm.default")
def bmm(call: OpCall) -> ShardingRule:
    """C[b,m,n] = sum_k A[b,m,k] B[b,k,n]."""
    return ShardingRule.parse("b m k, b k n -> b m n", call, linear=LINEAR_IN_EACH, flops=2)


@rule("aten.matmul.default")
def matmul(call: OpCall) -> ShardingRule:
    """C[..., m, n] = sum_k A[..., m, k] B[..., k, n], with vectors and broadcast batches."""
    left, right = (len(operand.shape) for operand in call.operands)
    if left == 1 and right == 1:
        notation = "k, k -> "
    elif left == 1:
        notation = "k, ... k n -> ... n"
    elif right == 1:
        notation = "... k, k -> ..."
    elif right == 2:
        notation = "... k, k n -> ... n"
    else:
        notation = "... m k, ... k n -> ... m n"
    return ShardingRule.parse(notation, call, linear=LINEAR_IN_EACH, flops=2)
