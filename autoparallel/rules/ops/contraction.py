"""Products: sums over a shared loop."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.placement import Partial
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Kernel, OpCall, ShardingRule

LINEAR_IN_EACH = ({0}, {1})
WITH_BIAS = ({0, 1}, {0, 2})


@rule("aten.linear.default")
def linear(call: OpCall) -> ShardingRule:
    """y[..., n] = sum_k x[..., k] w[n, k]. Split n: column-parallel, k: row-parallel."""
    vector = len(call.operands[1].shape) == 1
    notation = "... k, k -> ..." if vector else "... k, n k -> ... n"
    made = ShardingRule.parse(notation, call, linear=LINEAR_IN_EACH, flops=2)
    return replace(made, takes_bias=not vector)


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


_ALIGNED_BYTES = 16  # what torch demands of the strides of a grouped product's operands


@rule(
    "aten._grouped_mm.default",
    "transformers.grouped_mm_fallback.default",
    takes_empty=False,
)
def grouped_mm(call: OpCall) -> ShardingRule:
    """y[t, n] = sum_k x[t, k] w[e(t), k, n], with e(t) the first e for which t < ends[e].

    Rows are sorted by the matrix (the expert) that they are multiplied with. Matrices can be split
    with a kernel: each rank multiplies the rows of its own, the others are zeros.
    """
    left, right = call.operands[:2]
    itemsize = left.dtype.itemsize
    grain = -(-_ALIGNED_BYTES // itemsize) if call.node.target.startswith("aten") else 1
    shapes = (len(left.shape), len(right.shape))
    more = [" ".join(["1"] * len(operand.shape)) for operand in call.operands[2:]]
    notation = {
        (2, 3): "t k, e k n -> t n",
        (3, 3): "e t k, e k n -> e t n",
        (2, 2): "t k, k n -> e t n",
        (3, 2): "e t k, k n -> t n",
    }[shapes]
    operands, results = notation.split(" -> ")
    summed_once = {"k"} if call.argument(3, "bias") is not None else set()
    grouped = {(2, 3): {"t"}, (3, 3): set(), (2, 2): {"k", "e"}, (3, 2): {"n", "e"}}[shapes]
    alone = shapes == (2, 3) and len(call.operands) == 3 and call.argument(4, "out_dtype") is None
    made = ShardingRule.parse(
        f"{', '.join([operands, *more])} -> {results}",
        call,
        whole=grouped | summed_once | (set() if alone or shapes == (3, 3) else {"e"}),
        linear=() if summed_once else LINEAR_IN_EACH,
        kernels={"e": Kernel("grouped_mm_matrices", Partial())} if alone else {},
        flops=2,
    )
    count = made.sizes.get("e", 1)
    assert isinstance(count, int)
    return replace(
        made,
        grain=dict.fromkeys(("k", "n"), grain),
        flops=2 if shapes == (3, 3) else 2 / count,
    )
