"""Rules of sums over dims, and of reductions whose dims stay whole or need a kernel."""

from __future__ import annotations

from autoparallel.graph.graph import Dim, numel_hint
from autoparallel.placement import Collective, Invariant
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Kernel, Loops, OpCall, ShardingRule, loop_per_dim

# The position of `dim` among the arguments, where it is not the second.
_DIMS_AT = {"aten.linalg_vector_norm.default": 2, "aten.norm.ScalarOpt_dim": 2}
# Overloads that take no dim and reduce all of them.
_ALL_DIMS = (
    "aten.norm.Scalar",
    *(
        f"aten.{name}.default"
        for name in ("max", "min", "any", "all", "prod", "var", "std", "median", "nanmedian")
    ),
)


def _reduced_dims(call: OpCall) -> set[int]:
    """Return the dims that the call reduces, counted from 0."""
    rank = len(call.operands[0].shape)
    dims = call.argument(_DIMS_AT.get(call.node.target, 1), "dim")
    if call.node.target in _ALL_DIMS:
        dims = None
    if dims is None or dims == ():
        return set(range(rank))
    if not rank:
        return set()
    return {dim % rank for dim in (dims if isinstance(dims, tuple) else (dims,))}


def _reduction(call: OpCall, reduced: set[int]) -> tuple[Dims, Dims, dict[str, Dim]]:
    """Return dims of the operand and of the result, and the loops' sizes.

    A dim that is kept has no loop.
    """
    shape = call.operands[0].shape
    names, sizes = loop_per_dim(shape)
    keep = len(call.results[0].shape) == len(shape)
    result: list[Loops] = []
    for i, name in enumerate(names):
        if i not in reduced:
            result.append(name)
        elif keep:
            result.append(())
    return names, tuple(result), sizes


@rule("aten.sum.dim_IntList", "aten.sum.default")
def sum_(call: OpCall) -> ShardingRule:
    """y[a] = sum_b x[a, b]. A split of a summed dim leaves a pending sum."""
    left, right, sizes = _reduction(call, _reduced_dims(call))
    return ShardingRule((left,), (right,), sizes, linear=(frozenset({0}),))


@rule("aten.nansum.default", "aten.count_nonzero.default", "aten.count_nonzero.dim_IntList")
def sum_of_terms(call: OpCall) -> ShardingRule:
    """A sum of terms that are not linear in the operand: splits leave a pending sum,
    none passes.
    """
    left, right, sizes = _reduction(call, _reduced_dims(call))
    return ShardingRule((left,), (right,), sizes)


@rule("aten.trace.default")
def trace(call: OpCall) -> ShardingRule:
    """A sum over the diagonal, of which no part of one dim holds its part; linear all the same."""
    left, sizes = loop_per_dim(call.operands[0].shape)
    return ShardingRule((left,), ((),), sizes, whole=frozenset(sizes), linear=(frozenset({0}),))


@rule(
    "aten.amax.default",
    "aten.amin.default",
    "aten.aminmax.default",
    "aten.any.dims",
    "aten.all.dims",
    "aten.median.dim",
    "aten.nanmedian.dim",
    "aten.argmax.default",
    "aten.argmin.default",
    "aten.logsumexp.default",
    "aten.any.dim",
    "aten.all.dim",
    "aten.prod.dim_int",
    "aten.var.correction",
    "aten.var_mean.correction",
    "aten.std_mean.correction",
    "aten.var.dim",
    "aten.std.correction",
    "aten.max.dim",
    "aten.min.dim",
    "aten.std.dim",
    *_DIMS_AT,
    *_ALL_DIMS,
    takes_empty=False,
)
def whole_reduction(call: OpCall) -> ShardingRule:
    """A reduction that is no plain sum: a reduced dim stays whole, or is split by a kernel."""
    reduced = _reduced_dims(call)
    left, right, sizes = _reduction(call, reduced)
    whole = frozenset(name for i in reduced for name in left[i])
    kernel = _COMMUNICATING.get(call.node.target)
    kernels: dict[str, Kernel] = {}
    # Kernels know one reduced dim.
    if kernel is not None and len(whole) == 1 and len(reduced) == 1:
        kernels = {name: _reducing(call, kernel[0], kernel[1]) for name in whole}
        whole = frozenset()
    return ShardingRule((left,), (right,) * len(call.results), sizes, whole=whole, kernels=kernels)


# Kernels for a split of the reduced dim, and how often they reduce one number per result.
_COMMUNICATING = {
    "aten.logsumexp.default": ("logsumexp_split", 2),
    "aten.amax.default": ("amax_split", 2),
    "aten.amin.default": ("amin_split", 2),
    "aten.max.dim": ("max_split", 2),
    "aten.min.dim": ("min_split", 2),
    "aten.argmax.default": ("argmax_split", 2),
    "aten.argmin.default": ("argmin_split", 2),
    "aten.softmax.int": ("softmax_split", 3),
    "aten._softmax.default": ("softmax_split", 3),
    "aten.log_softmax.int": ("log_softmax_split", 3),
    "aten._log_softmax.default": ("log_softmax_split", 3),
}


def _reducing(call: OpCall, kernel: str, times: int) -> Kernel:
    """Return a kernel that all-reduces one number for each of the operand's rows, `times` times."""
    operand = call.operands[0]
    # Where no dim is named, it is the one of a vector.
    dim = call.argument(1, "dim") or 0
    dim = dim[0] if isinstance(dim, tuple) else dim
    rows = numel_hint(operand.shape) // max(numel_hint((operand.shape[dim],)), 1)
    reduced_once = (Collective.ALL_REDUCE, rows * operand.dtype.itemsize)
    return Kernel(kernel, Invariant(), (reduced_once,) * times)


_PLACES = ("topk", "kthvalue", "sort", "mode", "cummax", "cummin")


@rule(*(f"aten.{name}.default" for name in _PLACES), "aten.sort.stable")
def ordered(call: OpCall) -> ShardingRule:
    """Values ordered along one dim, which stays whole, and their places."""
    # topk and kthvalue take k first.
    position = 2 if call.node.target in ("aten.topk.default", "aten.kthvalue.default") else 1
    dim = call.argument(position, "dim", -1) % max(len(call.operands[0].shape), 1)
    left, right, sizes = _reduction(call, {dim})
    whole = frozenset(left[dim] if left else ())
    return ShardingRule((left,), (right,) * 2, sizes, whole=whole)


@rule("aten._fft_r2c.default", "aten._fft_c2c.default", "aten._fft_c2r.default", takes_empty=False)
def fourier(call: OpCall) -> ShardingRule:
    """Sums over some dims, which stay whole, with a weight for each frequency: linear."""
    left, sizes = loop_per_dim(call.operands[0].shape)
    rank = len(left)
    dims = {dim % rank for dim in call.node.args[1]}
    right = tuple(() if i in dims else names for i, names in enumerate(left))
    whole = frozenset(name for i in dims for name in left[i])
    return ShardingRule((left,), (right,), sizes, whole=whole, linear=(frozenset({0}),))


@rule("aten.renorm.default")
def renorm(call: OpCall) -> ShardingRule:
    """Each place along one dim is scaled by its norm, which is over all other dims."""
    left, sizes = loop_per_dim(call.operands[0].shape)
    free = left[call.node.args[2] % len(left)]
    return ShardingRule((left,), (left,), sizes, whole=frozenset(sizes) - set(free))


@rule("aten.cdist.default")
def cdist(call: OpCall) -> ShardingRule:
    """Distances of all pairs of rows; a row itself stays whole."""
    return ShardingRule.parse("... m k, ... n k -> ... m n", call, whole="k")


@rule("aten.cosine_similarity.default")
def cosine_similarity(call: OpCall) -> ShardingRule:
    """A product of vectors along one dim, which stays whole, over their lengths."""
    rank = max(len(operand.shape) for operand in call.operands)
    names = [f"d{i}" for i in range(rank)]
    reduced = names[call.argument(2, "dim", 1) % rank]
    rows = [" ".join(names[rank - len(operand.shape) :]) for operand in call.operands]
    result = " ".join(name for name in names if name != reduced)
    return ShardingRule.parse(f"{', '.join(rows)} -> {result}", call, whole=[reduced])


@rule(
    "aten.cumsum.default",
    "aten.cumprod.default",
    "aten.logcumsumexp.default",
    "aten.softmax.int",
    "aten.log_softmax.int",
    "aten._softmax.default",
    "aten._log_softmax.default",
)
def along_dim(call: OpCall) -> ShardingRule:
    """Every element depends on the others along one dim,
    which stays whole or is split by a kernel.
    """
    names, sizes = loop_per_dim(call.operands[0].shape)
    whole = frozenset(names[call.node.args[1] % len(names)]) if names else frozenset()
    passes = (frozenset({0}),) if call.node.target == "aten.cumsum.default" else ()
    kernel = _COMMUNICATING.get(call.node.target)
    kernels = {name: _reducing(call, kernel[0], kernel[1]) for name in whole if kernel}
    return ShardingRule(
        (names,),
        (names,),
        sizes,
        whole=whole - set(kernels),
        linear=passes,
        kernels=kernels,
    )
