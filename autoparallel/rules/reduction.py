"""Sums over dims, and reductions whose dims must stay whole."""

from __future__ import annotations

from autoparallel.graph.graph import Dim
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Loops, OpCall, ShardingRule

_DIMS_AT = {"aten.linalg_vector_norm.default": 2, "aten.norm.ScalarOpt_dim": 2}
_ALL_DIMS = tuple(
    f"aten.{name}.default" for name in ("max", "min", "any", "all", "prod", "var", "std")
)


def _reduced_dims(call: OpCall) -> set[int]:
    rank = len(call.operands[0].shape)
    dims = call.argument(_DIMS_AT.get(call.node.target, 1), "dim")
    if call.node.target in _ALL_DIMS:
        dims = None
    if dims is None or dims == ():
        return set(range(rank))
    return {dim % rank for dim in (dims if isinstance(dims, tuple) else (dims,))}


def _reduction(call: OpCall, reduced: set[int]) -> tuple[tuple[Loops, ...], tuple[Loops, ...]]:
    shape = call.operands[0].shape
    names: tuple[Loops, ...] = tuple(
        (f"d{i}",) if size != 1 else () for i, size in enumerate(shape)
    )
    keep = len(call.results[0].shape) == len(shape)
    result: list[Loops] = []
    for i, name in enumerate(names):
        if i not in reduced:
            result.append(name)
        elif keep:
            result.append(())
    return names, tuple(result)


def _sizes(call: OpCall) -> dict[str, Dim]:
    return {f"d{i}": size for i, size in enumerate(call.operands[0].shape) if size != 1}


@rule("aten.sum.dim_IntList", "aten.sum.default")
def sum_(call: OpCall) -> ShardingRule:
    """A split of a summed dim leaves a pending sum."""
    reduced = _reduced_dims(call) if call.node.target != "aten.sum.default" else None
    if reduced is None:
        reduced = set(range(len(call.operands[0].shape)))
    left, right = _reduction(call, reduced)
    return ShardingRule((left,), (right,), _sizes(call), linear=(frozenset({0}),))


@rule(
    "aten.amax.default",
    "aten.amin.default",
    "aten.argmax.default",
    "aten.argmin.default",
    "aten.logsumexp.default",
    "aten.any.dim",
    "aten.all.dim",
    "aten.prod.dim_int",
    "aten.var.correction",
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
    """Not a plain sum: the reduced dims stay whole."""
    reduced = _reduced_dims(call)
    left, right = _reduction(call, reduced)
    whole = frozenset(name for i in reduced for name in left[i])
    return ShardingRule((left,), (right,) * len(call.results), _sizes(call), whole=whole)


@rule("aten.topk.default", "aten.sort.default")
def ordered(call: OpCall) -> ShardingRule:
    """Places along one dim, which stays whole, in the order of their values."""
    position = 2 if "topk" in call.node.target else 1
    dim = call.argument(position, "dim", -1) % max(len(call.operands[0].shape), 1)
    left, right = _reduction(call, {dim})
    whole = frozenset(left[dim] if left else ())
    return ShardingRule((left,), (right,) * 2, _sizes(call), whole=whole)


@rule("aten.cosine_similarity.default")
def cosine_similarity(call: OpCall) -> ShardingRule:
    """A product of vectors along one dim, which stays whole."""
    rank = max(len(operand.shape) for operand in call.operands)
    names = [f"d{i}" for i in range(rank)]
    gone = names[call.argument(2, "dim", 1) % rank]
    rows = [" ".join(names[rank - len(operand.shape) :]) for operand in call.operands]
    kept = " ".join(name for name in names if name != gone)
    return ShardingRule.parse(f"{', '.join(rows)} -> {kept}", call, whole=[gone])


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
    """Every element depends on the others along one dim, which stays whole."""
    shape = call.operands[0].shape
    names: tuple[Loops, ...] = tuple(
        (f"d{i}",) if size != 1 else () for i, size in enumerate(shape)
    )
    whole = frozenset(names[call.node.args[1] % len(shape)]) if shape else frozenset()
    passes = (frozenset({0}),) if call.node.target == "aten.cumsum.default" else ()
    return ShardingRule((names,), (names,), _sizes(call), whole=whole, linear=passes)
