"""Views and rearrangements: they carry loops from dim to dim, merge them and divide them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import sympy

from autoparallel.graph.graph import Dim, Sym, hint
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Loops, OpCall, ShardingRule

SUM_PASSES = (frozenset({0}),)


def _product(dims: list[Dim]) -> Any:
    result: Any = sympy.Integer(1)
    for dim in dims:
        result = result * (dim.expr if isinstance(dim, Sym) else dim)
    return result


def factor(
    before: tuple[Dim, ...], after: tuple[Dim, ...]
) -> tuple[Dims, Dims, dict[str, Dim], frozenset[str]]:
    """Loops of a view from shape `before` to shape `after`.

    Both shapes are cut into the shortest runs of dims of equal product; inside a run, loops lie
    between the dims' boundaries, seen from the right: 1600 -> (25, 64) has loops of 25 and 64.
    Returns both sides' dims, the loops' sizes, and the loops that cannot be split.
    """
    sizes: dict[str, Dim] = {}
    whole: set[str] = set()
    left: list[Loops] = [()] * len(before)
    right: list[Loops] = [()] * len(after)
    i = j = 0
    while i < len(before) or j < len(after):
        run_i, run_j = [i], [j]
        if i >= len(before) or (j < len(after) and after[j] == 1 and before[i] != 1):
            j += 1
            continue
        if j >= len(after) or (before[i] == 1 and after[j] != 1):
            i += 1
            continue
        while True:
            one = _product([before[k] for k in run_i])
            two = _product([after[k] for k in run_j])
            if one == two:
                break
            low = _number([before[k] for k in run_i]) <= _number([after[k] for k in run_j])
            if low and run_i[-1] + 1 < len(before):
                run_i.append(run_i[-1] + 1)
            elif run_j[-1] + 1 < len(after):
                run_j.append(run_j[-1] + 1)
            elif run_i[-1] + 1 < len(before):
                run_i.append(run_i[-1] + 1)
            else:
                break
        _cut(before, after, run_i, run_j, left, right, sizes, whole)
        i, j = run_i[-1] + 1, run_j[-1] + 1
    return tuple(left), tuple(right), sizes, frozenset(whole)


def _number(dims: list[Dim]) -> int:
    result = 1
    for dim in dims:
        result *= hint(dim)
    return result


def _cut(
    before: tuple[Dim, ...],
    after: tuple[Dim, ...],
    run_i: list[int],
    run_j: list[int],
    left: list[Loops],
    right: list[Loops],
    sizes: dict[str, Dim],
    whole: set[str],
) -> None:
    """Name the loops of one run of dims of equal product."""
    run_i = [k for k in run_i if before[k] != 1]
    run_j = [k for k in run_j if after[k] != 1]
    if not run_i or not run_j:
        return
    if len(run_i) == 1 and len(run_j) == 1:
        name = f"l{run_i[0]}"
        sizes[name] = before[run_i[0]]
        left[run_i[0]] = right[run_j[0]] = (name,)
        return
    if any(isinstance(before[k], Sym) for k in run_i) or any(
        isinstance(after[k], Sym) for k in run_j
    ):
        _opaque(before, run_i, left, sizes, whole)
        return
    cuts_i = _boundaries([hint(before[k]) for k in run_i])
    cuts_j = _boundaries([hint(after[k]) for k in run_j])
    cuts = sorted({*cuts_i, *cuts_j})
    if any(high % low for low, high in pairwise(cuts)):
        _opaque(before, run_i, left, sizes, whole)
        return
    names: dict[tuple[int, int], str] = {}
    for low, high in reversed(list(pairwise(cuts))):
        name = f"l{run_i[0]}_{len(names)}"
        names[low, high] = name
        sizes[name] = high // low
    for run, bounds, dims in ((run_i, cuts_i, left), (run_j, cuts_j, right)):
        descending = bounds[::-1]
        for k, high, low in zip(run, descending, descending[1:], strict=False):
            dims[k] = tuple(
                name for (start, stop), name in names.items() if start >= low and stop <= high
            )


def _opaque(
    before: tuple[Dim, ...],
    run: list[int],
    left: list[Loops],
    sizes: dict[str, Dim],
    whole: set[str],
) -> None:
    """Dims that mix so that no part of one is a part of the other: loops that stay whole."""
    for k in run:
        name = f"l{k}"
        left[k] = (name,)
        sizes[name] = before[k]
        whole.add(name)


def _boundaries(sizes: list[int]) -> list[int]:
    """Products of the dims from the right: [1, d_n, d_n d_(n-1), ...]."""
    bounds = [1]
    for size in reversed(sizes):
        bounds.append(bounds[-1] * size)
    return bounds


def _local_shape(call: OpCall, shapes: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
    return (call.node.args[0], shapes[0], *call.node.args[2:])


@rule("aten.reshape.default", "aten.view.default")
def reshape(call: OpCall) -> ShardingRule:
    """Dims merged and divided."""
    left, right, sizes, whole = factor(call.operands[0].shape, call.results[0].shape)
    return ShardingRule(
        (left,),
        (right,),
        sizes,
        whole=whole,
        linear=SUM_PASSES,
        free=True,
        local_args=_local_shape,
    )


def _carried(call: OpCall, sources: list[int | None]) -> ShardingRule:
    """A view whose result's dim i is the operand's dim sources[i] (None: a new dim of size 1)."""
    operand = call.operands[0]
    sizes: dict[str, Dim] = {f"d{i}": size for i, size in enumerate(operand.shape) if size != 1}
    names = tuple((f"d{i}",) if size != 1 else () for i, size in enumerate(operand.shape))
    result = tuple(() if source is None else names[source] for source in sources)
    kept = {source for source in sources if source is not None}
    gone = {f"d{i}" for i in range(len(operand.shape)) if i not in kept and f"d{i}" in sizes}
    return ShardingRule(
        (names,), (result,), sizes, whole=frozenset(gone), linear=SUM_PASSES, free=True
    )


def _axis(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


@rule("aten.transpose.int", "aten.swapaxes.default")
def transpose(call: OpCall) -> ShardingRule:
    """Two dims change places."""
    rank = len(call.operands[0].shape)
    order: list[int | None] = list(range(rank))
    one, two = _axis(call.node.args[1], rank), _axis(call.node.args[2], rank)
    order[one], order[two] = order[two], order[one]
    return _carried(call, order)


@rule("aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def matrix_transpose(call: OpCall) -> ShardingRule:
    """The two last dims change places."""
    rank = len(call.operands[0].shape)
    order: list[int | None] = list(range(rank))
    if rank >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    return _carried(call, order)


@rule("aten.permute.default")
def permute(call: OpCall) -> ShardingRule:
    """Dims in another order."""
    rank = len(call.operands[0].shape)
    return _carried(call, [_axis(dim, rank) for dim in call.node.args[1]])


@rule("aten.unsqueeze.default")
def unsqueeze(call: OpCall) -> ShardingRule:
    """A new dim of size 1."""
    rank = len(call.operands[0].shape)
    order: list[int | None] = list(range(rank))
    order.insert(_axis(call.node.args[1], rank + 1), None)
    return _carried(call, order)


@rule("aten.squeeze.dim", "aten.squeeze.default", "aten.squeeze.dims")
def squeeze(call: OpCall) -> ShardingRule:
    """Dims of size 1 go. A named dim of another size stays whole: its part may be of size 1."""
    shape = call.operands[0].shape
    dims = call.argument(1, "dim", tuple(range(len(shape))))
    dims = dims if isinstance(dims, tuple) else (dims,)
    named = {_axis(dim, len(shape)) for dim in dims}
    made = _carried(call, [i for i, size in enumerate(shape) if i not in named or size != 1])
    kept = {f"d{i}" for i in named if shape[i] != 1}
    return replace(made, whole=made.whole | kept)


@rule("aten.expand.default")
def expand(call: OpCall) -> ShardingRule:
    """Dims of size 1 repeat: the loop is the result's alone."""
    operand, result = call.operands[0], call.results[0]
    offset = len(result.shape) - len(operand.shape)
    sizes: dict[str, Dim] = {f"d{i}": size for i, size in enumerate(result.shape) if size != 1}
    right = tuple((f"d{i}",) if size != 1 else () for i, size in enumerate(result.shape))
    left = tuple(() if size == 1 else (f"d{offset + i}",) for i, size in enumerate(operand.shape))
    return ShardingRule(
        (left,), (right,), sizes, linear=SUM_PASSES, free=True, local_args=_local_shape
    )


def _cut_dim(call: OpCall, dim: int, equal: bool) -> ShardingRule:
    """Results are parts of the operand along `dim`: blocks laid end to end, if they are equal."""
    shape = call.operands[0].shape
    count = len(call.results)
    sizes: dict[str, Dim] = {f"d{i}": size for i, size in enumerate(shape) if size != 1}
    names: list[Loops] = [(f"d{i}",) if size != 1 else () for i, size in enumerate(shape)]
    result = list(names)
    whole: set[str] = set()
    part = call.results[0].shape[dim]
    if equal and isinstance(part, int):
        names[dim] = ("part", "inner")
        result[dim] = ("inner",)
        sizes["part"], sizes["inner"] = count, part
        whole.add("part")
        sizes.pop(f"d{dim}", None)
    else:
        result[dim] = ()
        if names[dim]:
            whole.add(names[dim][0])
    return ShardingRule(
        (tuple(names),),
        (tuple(result),) * count,
        sizes,
        whole=frozenset(whole),
        linear=SUM_PASSES,
        free=True,
    )


@rule("aten.split.Tensor", "aten.chunk.default", "aten.split_with_sizes.default")
def split(call: OpCall) -> ShardingRule:
    """Equal parts are blocks of the operand's dim; each block can be split by itself."""
    dim = _axis(call.argument(2, "dim", 0), len(call.operands[0].shape))
    parts = [result.shape[dim] for result in call.results]
    made = _cut_dim(call, dim, all(part == parts[0] for part in parts))

    def local_args(call: OpCall, shapes: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
        spec = call.node.args[1]
        if call.node.target == "aten.split.Tensor":
            spec = shapes[0][dim]
        elif call.node.target == "aten.split_with_sizes.default":
            spec = tuple(shape[dim] for shape in shapes)
        return (call.node.args[0], spec, *call.node.args[2:])

    return replace(made, local_args=local_args)


@rule("aten.unbind.int")
def unbind(call: OpCall) -> ShardingRule:
    """The dim goes; each result is one place along it."""
    return _without(call, _axis(call.argument(1, "dim", 0), len(call.operands[0].shape)))


@rule("aten.select.int")
def select(call: OpCall) -> ShardingRule:
    """One place along the dim, which stays whole."""
    return _without(call, _axis(call.node.args[1], len(call.operands[0].shape)))


def _without(call: OpCall, dim: int) -> ShardingRule:
    rank = len(call.operands[0].shape)
    made = _carried(call, [i for i in range(rank) if i != dim])
    return replace(made, results=made.results * len(call.results))


@rule("aten.slice.Tensor")
def slice_(call: OpCall) -> ShardingRule:
    """Part of one dim, which stays whole."""
    return _keep_dim_whole(call, _axis(call.argument(1, "dim", 0), len(call.operands[0].shape)))


@rule("aten.flip.default", "aten.roll.default")
def moved(call: OpCall) -> ShardingRule:
    """Elements move along some dims, which stay whole."""
    made = _carried(call, list(range(len(call.operands[0].shape))))
    dims = call.argument(2 if "roll" in call.node.target else 1, "dims", ())
    rank = len(call.operands[0].shape)
    kept = {f"d{_axis(dim, rank)}" for dim in dims} if dims else set(made.sizes)
    return replace(made, whole=made.whole | kept, free=False)


def _keep_dim_whole(call: OpCall, dim: int) -> ShardingRule:
    made = _carried(call, list(range(len(call.operands[0].shape))))
    result = list(made.results[0])
    result[dim] = ()
    name = made.operands[0][dim]
    return replace(made, results=(tuple(result),), whole=made.whole | frozenset(name))


@rule("aten.constant_pad_nd.default", "aten.pad.default")
def pad(call: OpCall) -> ShardingRule:
    """Padded dims stay whole. Zeros added to a pending sum are zeros of the sum."""
    rank = len(call.operands[0].shape)
    made = _carried(call, list(range(rank)))
    amounts = call.node.args[1]
    result = list(made.results[0])
    whole = set(made.whole)
    for index in range(len(amounts) // 2):
        dim = rank - 1 - index
        if amounts[2 * index] != 0 or amounts[2 * index + 1] != 0:
            whole.update(made.operands[0][dim])
            result[dim] = ()
    value = call.argument(3, "value") if "pad.default" in call.node.target else None
    constant = call.argument(2, "mode", "constant") in ("constant", 0, 0.0)
    zero = constant and value in (None, 0, 0.0)
    return replace(
        made,
        results=(tuple(result),),
        whole=frozenset(whole),
        linear=SUM_PASSES if zero else (),
        free=False,
    )


@rule("aten.cat.default")
def cat(call: OpCall) -> ShardingRule:
    """Joined along one dim, which stays whole; equal parts are blocks of it."""
    dim = _axis(call.argument(1, "dim", 0), len(call.results[0].shape))
    shape = call.results[0].shape
    sizes: dict[str, Dim] = {f"d{i}": size for i, size in enumerate(shape) if size != 1}
    names: list[Loops] = [(f"d{i}",) if size != 1 else () for i, size in enumerate(shape)]
    parts = [operand.shape[dim] for operand in call.operands]
    operand, result = list(names), list(names)
    whole: frozenset[str] = frozenset()
    if all(part == parts[0] for part in parts) and isinstance(parts[0], int):
        operand[dim], result[dim] = ("inner",), ("part", "inner")
        sizes.pop(f"d{dim}", None)
        sizes["part"], sizes["inner"] = len(parts), parts[0]
        whole = frozenset({"part"})
    else:
        operand[dim] = ()
        whole = frozenset(names[dim])
    return ShardingRule(
        (tuple(operand),) * len(call.operands),
        (tuple(result),),
        sizes,
        whole=whole,
        linear=(frozenset(range(len(call.operands))),),
    )


@rule("aten.stack.default")
def stack(call: OpCall) -> ShardingRule:
    """A new dim, one place per operand."""
    rank = len(call.results[0].shape)
    dim = _axis(call.argument(1, "dim", 0), rank)
    made = _carried(call, list(range(rank - 1)))
    result = list(made.operands[0])
    result.insert(dim, ())
    return replace(
        made,
        operands=made.operands * len(call.operands),
        results=(tuple(result),),
        linear=(frozenset(range(len(call.operands))),),
        free=False,
    )
