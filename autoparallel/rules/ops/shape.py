"""Views and rearrangements: they carry loops from dim to dim, merge them and divide them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import sympy

from autoparallel.graph.graph import Dim, Sym, hint
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Loops, OpCall, Shapes, ShardingRule, loop_per_dim

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


def _local_shape(call: OpCall, shapes: Shapes) -> tuple[Any, ...]:
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


def carried(call: OpCall, sources: list[int | None]) -> ShardingRule:
    """A view whose result's dim i is the operand's dim sources[i] (None: a new dim of size 1)."""
    operand = call.operands[0]
    names, sizes = loop_per_dim(operand.shape)
    result = tuple(() if source is None else names[source] for source in sources)
    kept = {source for source in sources if source is not None}
    gone = {name for i, own in enumerate(names) if i not in kept for name in own}
    return ShardingRule(
        (names,), (result,), sizes, whole=frozenset(gone), linear=SUM_PASSES, free=True
    )


def axis(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


@rule("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default")
def transpose(call: OpCall) -> ShardingRule:
    """Two dims change places."""
    rank = len(call.operands[0].shape)
    order: list[int | None] = list(range(rank))
    one, two = axis(call.node.args[1], rank), axis(call.node.args[2], rank)
    if rank:
        order[one], order[two] = order[two], order[one]
    return carried(call, order)


@rule("aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def matrix_transpose(call: OpCall) -> ShardingRule:
    """The two last dims change places."""
    rank = len(call.operands[0].shape)
    order: list[int | None] = list(range(rank))
    if rank >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    return carried(call, order)


@rule("aten.movedim.int", "aten.movedim.intlist", "aten.moveaxis.int", "aten.moveaxis.intlist")
def movedim(call: OpCall) -> ShardingRule:
    """Some dims move to given places, the others keep their order."""
    rank = len(call.operands[0].shape)
    sources, targets = (
        [axis(dim, rank) for dim in (item if isinstance(item, tuple) else (item,))]
        for item in call.node.args[1:3]
    )
    moved = dict(zip(targets, sources, strict=True))
    others = iter([dim for dim in range(rank) if dim not in sources])
    return carried(call, [moved[i] if i in moved else next(others) for i in range(rank)])


@rule("aten.diagonal.default")
def diagonal(call: OpCall) -> ShardingRule:
    """Two dims become one, the last; neither can be split."""
    rank = len(call.operands[0].shape)
    gone = {axis(call.argument(2, "dim1", 0), rank), axis(call.argument(3, "dim2", 1), rank)}
    return carried(call, [*(i for i in range(rank) if i not in gone), None])


@rule("aten.permute.default")
def permute(call: OpCall) -> ShardingRule:
    """Dims in another order."""
    rank = len(call.operands[0].shape)
    return carried(call, [axis(dim, rank) for dim in call.node.args[1]])


@rule("aten.unsqueeze.default")
def unsqueeze(call: OpCall) -> ShardingRule:
    """A new dim of size 1."""
    rank = len(call.operands[0].shape)
    order: list[int | None] = list(range(rank))
    order.insert(axis(call.node.args[1], rank + 1), None)
    return carried(call, order)


@rule("aten.squeeze.dim", "aten.squeeze.default", "aten.squeeze.dims")
def squeeze(call: OpCall) -> ShardingRule:
    """Dims of size 1 go. A named dim of another size stays whole: its part may be of size 1."""
    shape = call.operands[0].shape
    dims = call.argument(1, "dim", tuple(range(len(shape))))
    dims = dims if isinstance(dims, tuple) else (dims,)
    named = {axis(dim, len(shape)) for dim in dims}
    made = carried(call, [i for i, size in enumerate(shape) if i not in named or size != 1])
    kept = {f"d{i}" for i in named if shape[i] != 1}
    return replace(made, whole=made.whole | kept)


@rule("aten.expand.default")
def expand(call: OpCall) -> ShardingRule:
    """Dims of size 1 repeat: the loop is the result's alone."""
    operand, result = call.operands[0], call.results[0]
    offset = len(result.shape) - len(operand.shape)
    right, sizes = loop_per_dim(result.shape)
    left = tuple(() if size == 1 else (f"d{offset + i}",) for i, size in enumerate(operand.shape))
    return ShardingRule(
        (left,), (right,), sizes, linear=SUM_PASSES, free=True, local_args=_local_shape
    )


@rule("aten.repeat.default", "aten.tile.default")
def repeat(call: OpCall) -> ShardingRule:
    """Dims as a whole repeat: the repetitions are the outer loop.

    Those of a dim of size 1 are all there is of it, so they can be split.
    """
    operand, result = call.operands[0], call.results[0]
    offset = len(result.shape) - len(operand.shape)
    shape = (1,) * offset + operand.shape
    sizes: dict[str, Dim] = {}
    whole: set[str] = set()
    dims: list[Loops] = []
    times = (1,) * (len(result.shape) - len(call.node.args[1])) + tuple(call.node.args[1])
    for i, (size, count) in enumerate(zip(shape, times, strict=True)):
        own = {f"r{i}": count, f"d{i}": size}
        own = {name: number for name, number in own.items() if number != 1}
        if size != 1:
            whole.add(f"r{i}")
        sizes.update(own)
        dims.append(tuple(own))

    def local_args(call: OpCall, shapes: Shapes) -> tuple[Any, ...]:
        local = tuple(
            part if size == 1 else count
            for part, size, count in zip(shapes[0], shape, times, strict=True)
        )
        return (call.node.args[0], local)

    left = tuple(tuple(name for name in names if name[0] == "d") for names in dims[offset:])
    return ShardingRule(
        (left,),
        (tuple(dims),),
        sizes,
        whole=frozenset(whole),
        linear=SUM_PASSES,
        local_args=local_args,
    )


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(call: OpCall) -> ShardingRule:
    """Every place along one dim repeats: the repetitions are the inner loop."""
    operand = call.operands[0]
    dim = call.argument(2, "dim")
    if dim is None or call.node.keyword("output_size") is not None:
        dims, sizes = loop_per_dim(operand.shape)
        result: Dims = ((),) * len(call.results[0].shape)
        return ShardingRule((dims,), (result,), sizes, whole=frozenset(sizes), linear=SUM_PASSES)
    made = carried(call, list(range(len(operand.shape))))
    row = list(made.results[0])
    at = axis(dim, len(row))
    row[at] = (*row[at], "times")
    return replace(
        made,
        results=(tuple(row),),
        sizes={**made.sizes, "times": call.node.args[1]},
        whole=made.whole | {"times"},
        free=False,
    )


@rule("aten.pixel_shuffle.default", takes_empty=False)
def pixel_shuffle(call: OpCall) -> ShardingRule:
    """Channels become pixels: (c r q, h, w) to (c, h r, w q)."""
    factor = call.node.args[1]
    *batch, _, height, width = call.operands[0].shape
    return _shuffled((*batch, call.results[0].shape[-3], height, width), factor)


@rule("aten.pixel_unshuffle.default", takes_empty=False)
def pixel_unshuffle(call: OpCall) -> ShardingRule:
    """Pixels become channels: (c, h r, w q) to (c r q, h, w)."""
    factor = call.node.args[1]
    *batch, channels, _, _ = call.operands[0].shape
    made = _shuffled((*batch, channels, *call.results[0].shape[-2:]), factor)
    return replace(made, operands=made.results, results=made.operands)


def _shuffled(shape: tuple[Dim, ...], factor: int) -> ShardingRule:
    """Of (.., c, h, w), the fewest channels and pixels that there are on either side."""
    (*first, channel, high, wide), sizes = loop_per_dim(shape)
    return ShardingRule(
        ((*first, (*channel, "r", "q"), high, wide),),
        ((*first, channel, (*high, "r"), (*wide, "q")),),
        {**sizes, "r": factor, "q": factor},
        whole=frozenset({"r", "q"}),
        linear=SUM_PASSES,
    )


@rule("aten.channel_shuffle.default", takes_empty=False)
def channel_shuffle(call: OpCall) -> ShardingRule:
    """Groups of channels are dealt like cards: (b, g c, ..) to (b, c g, ..)."""
    groups = call.node.args[1]
    shape = call.operands[0].shape
    channels = shape[1]
    (first, _, *others), sizes = loop_per_dim(shape)
    sizes.pop("d1", None)
    own: dict[str, int] = {}
    if isinstance(channels, int):
        own = {"g": groups, "c": channels // groups}
    own = {name: size for name, size in own.items() if size != 1}
    return ShardingRule(
        ((first, tuple(own), *others),),
        ((first, tuple(own)[::-1], *others),),
        sizes | own,
        whole=frozenset({"g"}),
        linear=SUM_PASSES,
    )


@rule("aten.view_as_real.default", "aten.view_as_complex.default")
def complex_view(call: OpCall) -> ShardingRule:
    """The real and the imaginary part are a last dim of two, or not."""
    rank = min(len(call.operands[0].shape), len(call.results[0].shape))
    row = " ".join(f"d{i}" for i in range(rank))
    left, right = row, f"{row} 1"
    if len(call.operands[0].shape) > rank:
        left, right = right, left
    made = ShardingRule.parse(f"{left} -> {right}", call, linear=SUM_PASSES)
    return replace(made, free=True)


@rule("aten.diag_embed.default")
def diag_embed(call: OpCall) -> ShardingRule:
    """The last dim becomes the diagonal of two; neither can be split."""
    rank = len(call.results[0].shape)
    new = {axis(call.argument(2, "dim1", -2), rank), axis(call.argument(3, "dim2", -1), rank)}
    others = iter(range(rank - 2))
    made = carried(call, [None if i in new else next(others) for i in range(rank)])
    return replace(made, free=False)
