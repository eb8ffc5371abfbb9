"""Rules of products: sums over a shared loop."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.graph import Dim
from autoparallel.placement import Partial
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Kernel, Loops, OpCall, ShardingRule

# A product is linear in each factor by itself; a bias goes with one factor, or it would be lost.
LINEAR_IN_EACH = ({0}, {1})
WITH_BIAS = ({0, 1}, {0, 2})

# Products with a weight matrix as second factor, and the functions of autoparallel.runtime.overlap
# that run them with the gradient of the weight computed apart from that of the first factor.
LATE_PRODUCTS = {"aten.linear.default": "linear", "aten.mm.default": "mm"}


@rule("aten.linear.default")
def linear(call: OpCall) -> ShardingRule:
    """y[..., n] = sum_k x[..., k] w[n, k].

    Split n: column-parallel, k: row-parallel (arXiv:1909.08053, section 3).
    """
    vector = len(call.operands[1].shape) == 1
    notation = "... k, k -> ..." if vector else "... k, n k -> ... n"
    parsed = ShardingRule.parse(notation, call, linear=LINEAR_IN_EACH, flops=2)
    return replace(parsed, takes_bias=not vector)


@rule("aten.mm.default")
def mm(call: OpCall) -> ShardingRule:
    """C[m,n] = sum_k A[m,k] B[k,n].

    Split n: column-parallel, k: row-parallel (arXiv:1909.08053).
    """
    return ShardingRule.parse("m k, k n -> m n", call, linear=LINEAR_IN_EACH, flops=2)


@rule("aten.bmm.default")
def bmm(call: OpCall) -> ShardingRule:
    """C[b,m,n] = sum_k A[b,m,k] B[b,k,n]. The batch b is free."""
    return ShardingRule.parse("b m k, b k n -> b m n", call, linear=LINEAR_IN_EACH, flops=2)


@rule("aten.matmul.default")
def matmul(call: OpCall) -> ShardingRule:
    """C[..., m, n] = sum_k A[..., m, k] B[..., k, n],
    with vectors and broadcast batches as in numpy.
    """
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
    """y[m] = sum_k A[m,k] x[k]. The matrix is split by rows, or with the vector by columns."""
    return ShardingRule.parse("m k, k -> m", call, linear=LINEAR_IN_EACH, flops=2)


@rule("aten.dot.default", "aten.vdot.default")
def dot(call: OpCall) -> ShardingRule:
    """y = sum_k a[k] b[k]. Both vectors are split alike, and the sum is pending."""
    return ShardingRule.parse("k, k -> ", call, linear=LINEAR_IN_EACH, flops=2)


@rule("aten.outer.default")
def outer(call: OpCall) -> ShardingRule:
    """C[m,n] = a[m] b[n]. Nothing is summed."""
    return ShardingRule.parse("m, n -> m n", call, linear=LINEAR_IN_EACH)


# Loops of the two factors, of the result, and those that are summed over.
_ADDED = {
    "aten.addmm.default": ("m k, k n", "m n", "k"),
    "aten.addmv.default": ("m k, k", "m", "k"),
    "aten.baddbmm.default": ("b m k, b k n", "b m n", "k"),
    "aten.addbmm.default": ("b m k, b k n", "m n", "bk"),
}


@rule(*_ADDED)
def added_product(call: OpCall) -> ShardingRule:
    """A product and a bias that must count once: summed loops stay whole.

    Passes take the bias out of most of these first, so that the sum can be split after all.
    """
    factors, result, summed = _ADDED[call.node.target]
    names = result.split()
    # The bias is broadcast to the result, aligned right.
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
        # Without an arrow, einsum sorts the names that occur once.
        right += "".join(sorted(name for name in set(letters) if letters.count(name) == 1))
    twice = {name for text in texts for name in text if name != "." and text.count(name) > 1}

    def spaced(text: str) -> str:
        """Return an operand's or the result's letters as words; "..." stays one."""
        return " ".join(text.replace("...", ".")).replace(".", "...")

    return ShardingRule.parse(
        f"{', '.join(map(spaced, texts))} -> {spaced(right)}",
        call,
        whole=twice,
        linear=[{index} for index in range(len(texts))],
        flops=2,
    )


# torch's grouped product demands that the strides of its operands are multiples of 16 bytes.
_ALIGNED_BYTES = 16


@rule(
    "aten._grouped_mm.default",
    "transformers.grouped_mm_fallback.default",
    takes_empty=False,
)
def grouped_mm(call: OpCall) -> ShardingRule:
    """y[t, n] = sum_k x[t, k] w[e(t), k, n], with e(t) the first e for which t < ends[e].

    Rows are sorted by the matrix (the expert) that they are multiplied with. Matrices can be split
    with a kernel: each rank multiplies the rows of its own matrices, and leaves zeros for the
    others.
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
    # The kernel knows rows by matrices, without a bias and another output type.
    alone = shapes == (2, 3) and len(call.operands) == 3 and call.argument(4, "out_dtype") is None
    parsed = ShardingRule.parse(
        f"{', '.join([operands, *more])} -> {results}",
        call,
        whole=grouped | summed_once | (set() if alone or shapes == (3, 3) else {"e"}),
        linear=() if summed_once else LINEAR_IN_EACH,
        kernels={"e": Kernel("grouped_mm_matrices", Partial())} if alone else {},
        flops=2,
    )
    count = parsed.sizes.get("e", 1)
    assert isinstance(count, int)
    return replace(
        parsed,
        grain=dict.fromkeys(("k", "n"), grain),
        # The nest has a loop of experts, but each row meets only one of them.
        flops=2 if shapes == (3, 3) else 2 / count,
    )


@rule("aten.lu_unpack.default")
def lu_unpack(call: OpCall) -> ShardingRule:
    """P L U = the matrix that was packed, for each matrix of a batch by itself."""
    batch = call.operands[0].shape[:-2]
    sizes: dict[str, Dim] = {}
    nests: list[tuple[Loops, ...]] = []
    for number, value in enumerate((*call.operands, *call.results)):
        own = 1 if number == 1 else 2  # dims of a matrix; pivots are one row
        # A result that was not asked for is empty, and has no batch.
        rows = len(batch) if len(value.shape) == len(batch) + own else 0
        names = [f"b{dim}" if dim < rows else f"t{number}_{dim}" for dim in range(len(value.shape))]
        loops = {name: size for name, size in zip(names, value.shape, strict=True) if size != 1}
        sizes |= loops
        nests.append(tuple((name,) if name in loops else () for name in names))
    whole = frozenset(name for name in sizes if name.startswith("t"))
    return ShardingRule(tuple(nests[:2]), tuple(nests[2:]), sizes, whole=whole)
