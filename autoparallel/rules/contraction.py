"""Products: sums over a shared loop."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.rules.registry import rule
from autoparallel.rules.rule import OpCall, ShardingRule

LINEAR_IN_EACH = ({0}, {1})
WITH_BIAS = ({0, 1}, {0, 2})


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


@rule("aten.mv.default")
def mv(call: OpCall) -> ShardingRule:
    """y[m] = sum_k A[m,k] x[k]."""
    return ShardingRule.parse("m k, k -> m", call, linear=LINEAR_IN_EACH, flops=2)


@rule("aten.dot.default", "aten.vdot.default")
def dot(call: OpCall) -> ShardingRule:
    """y = sum_k a[k] b[k]."""
    return ShardingRule.parse("k, k -> ", call, linear=LINEAR_IN_EACH, flops=2)


@rule("aten.outer.default")
def outer(call: OpCall) -> ShardingRule:
    """C[m,n] = a[m] b[n]."""
    return ShardingRule.parse("m, n -> m n", call, linear=LINEAR_IN_EACH)


_ADDED = {
    "aten.addmm.default": ("m k, k n", "m n", "k"),
    "aten.addmv.default": ("m k, k", "m", "k"),
    "aten.baddbmm.default": ("b m k, b k n", "b m n", "k"),
    "aten.addbmm.default": ("b m k, b k n", "m n", "bk"),
}


@rule(*_ADDED)
def added_product(call: OpCall) -> ShardingRule:
    """A product and a bias that must count once: what is summed stays whole."""
    factors, result, summed = _ADDED[call.node.target]
    names = result.split()
    bias = " ".join(names[len(names) - len(call.operands[0].shape) :])
    return ShardingRule.parse(
        f"{bias}, {factors} -> {result}", call, whole=summed, linear=WITH_BIAS, flops=2
    )


@rule("aten.einsum.default")
def einsum(call: OpCall) -> ShardingRule:
    """The equation is the loop nest. A diagonal (a name twice in one operand) stays whole."""
    left, arrow, right = call.node.args[0].replace(" ", "").partition("->")
    texts = left.split(",")
    letters = left.replace("...", "").replace(",", "")
    if not arrow:
        right = "..." if "..." in left else ""
        right += "".join(sorted(name for name in set(letters) if letters.count(name) == 1))
    twice = {name for text in texts for name in text if name != "." and text.count(name) > 1}

    def spaced(text: str) -> str:
        return " ".join(text.replace("...", ".")).replace(".", "...")

    return ShardingRule.parse(
        f"{', '.join(map(spaced, texts))} -> {spaced(right)}",
        call,
        whole=twice,
        linear=[{index} for index in range(len(texts))],
        flops=2,
    )
