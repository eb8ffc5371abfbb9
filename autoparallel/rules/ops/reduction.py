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
    kernels: dict[str, Kernel] = {}
    for dim in sorted(reduced):
        kernel = _kernel(call, reduced, dim)
        if kernel is not None:
            kernels |= dict.fromkeys(left[dim], kernel)
    whole = frozenset(name for i in reduced for name in left[i]) - set(kernels)
    return ShardingRule((left,), (right,) * len(call.results), sizes, whole=whole, kernels=kernels)


# Kernels for a split of a reduced dim, and how often they reduce one number per result.
_COMMUNICATING = {
    "aten.logsumexp.default": ("logsumexp_split", 2),
    "aten.amax.default": ("amax_split", 2),
    "aten.amin.default": ("amin_split", 2),
    "aten.max.default": ("amax_split", 2),
    "aten.min.default": ("amin_split", 2),
    "aten.max.dim": ("max_split", 2),
    "aten.min.dim": ("min_split", 2),
    "aten.argmax.default": ("argmax_split", 2),
    "aten.argmin.default": ("argmin_split", 2),
    "aten.softmax.int": ("softmax_split", 3),
    "aten._softmax.default": ("softmax_split", 3),
    "aten.log_softmax.int": ("log_softmax_split", 3),
    "aten._log_softmax.default": ("log_softmax_split", 3),
}
# These return places, which count along one dim.
_PLACED = frozenset(f"aten.{name}" for name in ("max.dim", "min.dim", "argmax.default"))
_PLACED |= {"aten.argmin.default"}
# Of the results of parts, the op itself makes the result of the whole.
_COMBINING = frozenset(
    f"aten.{name}"
    for name in (
        *("prod.default", "prod.dim_int", "linalg_vector_norm.default"),
        *("norm.Scalar", "norm.ScalarOpt_dim"),
        *(
            f"{kind}.{overload}"
            for kind in ("any", "all")
            for overload in ("default", "dim", "dims")
        ),
    )
)
_VARIANCES = ("var", "std", "var_mean", "std_mean")


def _kernel(call: OpCall, reduced: set[int], dim: int) -> Kernel | None:
    """Return the kernel for a split of a reduced dim; None where there is none."""
    target, dtype = call.node.target, call.operands[0].dtype
    name = target.split(".")[1]
    if name in _VARIANCES:
        return _variance(call, reduced, dim) if dtype.is_floating_point else None
    if target in _COMBINING:
        # The norm of complex numbers is real, so that the op is another one for the parts' norms.
        combines = not dtype.is_complex and ("norm" not in name or _is_norm_of_norms(call))
        return _combined(call, reduced, dim) if combines else None
    # Where no dim is named, the place is one among all elements: of a vector, that in its one dim.
    of_all = call.argument(1, "dim") is None and len(call.operands[0].shape) > 1
    if target not in _COMMUNICATING or (target in _PLACED and of_all):
        return None
    kernel, times = _COMMUNICATING[target]
    return _reducing(call, kernel, times)


def _is_norm_of_norms(call: OpCall) -> bool:
    """Return whether the norm of the parts' norms is the whole's, and its gradient too.

    It is so for p-norms. That of order 0 counts, that of infinite order divides its gradient among
    equal numbers, and below 1 a part of zeros has none.
    """
    order = call.argument(1, "ord" if "linalg" in call.node.target else "p", 2)
    return 1 <= (2 if order is None else order) < float("inf")


def _combined(call: OpCall, reduced: set[int], dim: int) -> Kernel:
    """Return a kernel that gathers the results of parts and reduces them once more."""
    rank = len(call.operands[0].shape)
    keep = len(call.results[0].shape) == rank
    kept = [each for each in range(rank) if each not in reduced]
    places = tuple(
        (each if keep else kept.index(each)) if each in kept else -1 for each in range(rank)
    )
    # As many results are gathered as there are ranks, which a rule does not know: priced as two.
    result = call.results[0]
    nbytes = 2 * numel_hint(result.shape) * result.dtype.itemsize
    arguments = (("operation", call.node.target), ("where", (0, dim, places)))
    return Kernel("combined_parts", Invariant(), ((Collective.ALL_GATHER, nbytes),), arguments)


def _variance(call: OpCall, reduced: set[int], dim: int) -> Kernel:
    """Return the kernel of a variance, with all that the overloads say in different ways."""
    target = call.node.target
    if target.endswith(".correction"):
        correction = call.argument(2, "correction", 1)
        correction = 1 if correction is None else correction
        keepdim = bool(call.argument(3, "keepdim", False))
    else:
        whole = target.endswith(".default")
        correction = int(bool(call.argument(1 if whole else 2, "unbiased", True)))
        keepdim = bool(call.argument(3, "keepdim", False)) and not whole
    result = call.results[0]
    once = (Collective.ALL_REDUCE, numel_hint(result.shape) * result.dtype.itemsize)
    name = target.split(".")[1]
    arguments = (
        ("split", dim),
        ("dims", tuple(sorted(reduced))),
        ("less", correction),
        ("keep", keepdim),
        ("root", name.startswith("std")),
        ("with_mean", name.endswith("mean")),
    )
    # Two sums forward; backward, that over the mean.
    return Kernel("variance_split", Invariant(), (once,) * 3, arguments)


def _reducing(call: OpCall, kernel: str, times: int) -> Kernel:
    """Return a kernel that all-reduces one number for each row of the operand, `times` times."""
    # Reduced, or along a dim as a softmax is: rows are what is left of the operand.
    operand = call.operands[0]
    rows = numel_hint(call.results[0].shape)
    if call.results[0].shape == operand.shape and operand.shape:
        dims = call.argument(1, "dim")
        # It is a reduced dim of size 1, which is kept.
        dims = dims if isinstance(dims, tuple) else (dims,)
        rows //= max(numel_hint(tuple(operand.shape[dim] for dim in dims)), 1)
    reduced_once = (Collective.ALL_REDUCE, rows * operand.dtype.itemsize)
    return Kernel(kernel, Invariant(), (reduced_once,) * times)


_PLACES = ("topk", "kthvalue", "sort", "mode", "cummax", "cummin")
# Of no elements, torch's gradients of these depend on other tensors than those of some elements do.
_NEED_ELEMENTS = {
    f"aten.{name}.default" for name in ("cummax", "cummin", "cumprod", "logcumsumexp")
}


@rule(*(f"aten.{name}.default" for name in _PLACES), "aten.sort.stable")
def ordered(call: OpCall) -> ShardingRule:
    """Values ordered along one dim, which stays whole, and their places."""
    # topk and kthvalue take k first.
    position = 2 if call.node.target in ("aten.topk.default", "aten.kthvalue.default") else 1
    dim = call.argument(position, "dim", -1) % max(len(call.operands[0].shape), 1)
    left, right, sizes = _reduction(call, {dim})
    whole = frozenset(left[dim] if left else ())
    takes_empty = call.node.target not in _NEED_ELEMENTS
    return ShardingRule((left,), (right,) * 2, sizes, whole=whole, takes_empty=takes_empty)


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
        takes_empty=call.node.target not in _NEED_ELEMENTS,
    )
