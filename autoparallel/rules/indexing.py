"""Look-ups."""

from __future__ import annotations

from dataclasses import replace

import torch

from autoparallel.graph.graph import Dim, Ref
from autoparallel.placement import Partial
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Kernel, Loops, OpCall, ShardingRule


@rule("aten.embedding.default")
def embedding(call: OpCall) -> ShardingRule:
    """y[..., h] = w[index[...], h]. Split over the rows with a mask, each rank adds its own.

    A gradient scaled by how often a row is read must see all of the index; a sparse one has no
    conversions.
    """
    scaled, sparse = (
        call.argument(3, "scale_grad_by_freq", False),
        call.argument(4, "sparse", False),
    )
    made = ShardingRule.parse(
        "v h, ... -> ... h", call, linear=[{0}], kernels={"v": Kernel("embedding_rows", Partial())}
    )
    whole = set(made.loops) - (set() if sparse else {"h"}) if scaled or sparse else set()
    return replace(made, whole=frozenset(whole))


def _own(call: OpCall) -> tuple[list[Loops], dict[str, Dim]]:
    """A loop for every dim of the first operand."""
    shape = call.operands[0].shape
    sizes = {f"d{i}": size for i, size in enumerate(shape) if size != 1}
    return [(f"d{i}",) if size != 1 else () for i, size in enumerate(shape)], sizes


@rule("aten.index_select.default")
def index_select(call: OpCall) -> ShardingRule:
    """y[.., i, ..] = x[.., index[i], ..]: the places can be split, what they point to can not."""
    names, sizes = _own(call)
    dim = call.node.args[1] % len(names)
    count = call.results[0].shape[dim]
    place: Loops = ("i",) if count != 1 else ()
    result = [*names[:dim], place, *names[dim + 1 :]]
    index = (place,) if call.operands[1].shape else ()
    return ShardingRule(
        (tuple(names), index),
        (tuple(result),),
        {**sizes, "i": count},
        whole=frozenset(names[dim]),
        linear=(frozenset({0}),),
    )


@rule("aten.gather.default")
def gather(call: OpCall) -> ShardingRule:
    """y[a, i, b] = x[a, index[a, i, b], b]: the other dims are free where all of them is read."""
    x, index = call.operands
    names, sizes = _own(call)
    dim = call.node.args[1] % len(names)
    whole = set(names[dim])
    row: list[Loops] = []
    for i, (size, count) in enumerate(zip(x.shape, index.shape, strict=True)):
        if i == dim or size != count:
            whole.update(names[i])
            row.append((f"i{i}",) if i == dim and count != 1 else ())
            sizes[f"i{i}"] = count
        else:
            row.append(names[i])
    return ShardingRule(
        (tuple(names), tuple(row)),
        (tuple(row),),
        sizes,
        whole=frozenset(whole),
        linear=(frozenset({0}),),
    )


@rule("aten.index.Tensor")
def index(call: OpCall) -> ShardingRule:
    """y[.., i, ..] = x[.., index[i], ..]: indexed dims stay whole, all other dims are free.

    Dims of several indices are aligned right; they take the place of the indexed dims, or come
    first where these do not lie side by side.
    """
    names, sizes = _own(call)
    places = call.node.args[1]
    indexed = [dim for dim, item in enumerate(places) if isinstance(item, Ref)]
    operands = call.operands[1:]
    if any(operand.dtype == torch.bool for operand in operands):
        tensors = (*call.operands, *call.results)
        nothing: list[Dims] = [((),) * len(tensor.shape) for tensor in tensors]
        return ShardingRule(tuple(nothing[:-1]), (nothing[-1],), {})
    wide = max(len(operand.shape) for operand in operands)
    side_by_side = indexed[-1] - indexed[0] == len(indexed) - 1
    start = indexed[0] if side_by_side else 0
    loops: list[Loops] = []
    for i, size in enumerate(call.results[0].shape[start : start + wide]):
        loops.append((f"i{i}",) if size != 1 else ())
        sizes[f"i{i}"] = size
    rest = [row for dim, row in enumerate(names) if dim not in indexed]
    rows = [
        tuple(
            () if size == 1 else loops[wide - len(operand.shape) + i]
            for i, size in enumerate(operand.shape)
        )
        for operand in operands
    ]
    return ShardingRule(
        (tuple(names), *rows),
        ((*rest[:start], *loops, *rest[start:]),),
        sizes,
        whole=frozenset(name for dim in indexed for name in names[dim]),
        linear=(frozenset({0}),),
    )
