"""Rules of look-ups and of writes to indexed places."""

from __future__ import annotations

from dataclasses import replace

import torch

from autoparallel.graph.graph import Ref
from autoparallel.placement import Partial
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Kernel, Loops, OpCall, ShardingRule, loop_per_dim


@rule("aten.embedding.default")
def embedding(call: OpCall) -> ShardingRule:
    """y[..., h] = w[index[...], h].

    Split over the rows v with a mask, each rank adds the rows that it holds.

    A gradient scaled by how often a row is read must see all of the index, and a sparse gradient
    cannot be redistributed: both keep loops whole. (Vocabulary-parallel embedding,
    arXiv:1909.08053, section 3.)
    """
    scaled, sparse = (
        call.argument(3, "scale_grad_by_freq", False),
        call.argument(4, "sparse", False),
    )
    parsed = ShardingRule.parse(
        "v h, ... -> ... h", call, linear=[{0}], kernels={"v": Kernel("embedding_rows", Partial())}
    )
    whole = set(parsed.loops) - (set() if sparse else {"h"}) if scaled or sparse else set()
    return replace(parsed, whole=frozenset(whole))


@rule("aten.index_select.default")
def index_select(call: OpCall) -> ShardingRule:
    """y[.., i, ..] = x[.., index[i], ..]: the index can be split;
    the dim that it points into needs a kernel.
    """
    names, sizes = loop_per_dim(call.operands[0].shape)
    dim = call.node.args[1] % len(names)
    count = call.results[0].shape[dim]
    # A loop of its own: places in the result are not places in the operand.
    place: Loops = ("i",) if count != 1 else ()
    result = [*names[:dim], place, *names[dim + 1 :]]
    index = (place,) if call.operands[1].shape else ()
    return ShardingRule(
        (names, index),
        (tuple(result),),
        {**sizes, "i": count},
        linear=(frozenset({0}),),
        kernels={name: Kernel("index_select_split", Partial()) for name in names[dim]},
    )


@rule("aten.gather.default")
def gather(call: OpCall) -> ShardingRule:
    """y[a, i, b] = x[a, index[a, i, b], b]: other dims are free
    where the index covers all of them.
    """
    x, index = call.operands
    names, sizes = loop_per_dim(call.operands[0].shape)
    if not names:
        return ShardingRule(((), ()), ((),), {}, linear=(frozenset({0}),))
    dim = call.node.args[1] % len(names)
    whole: set[str] = set()
    row: list[Loops] = []
    for i, (size, count) in enumerate(zip(x.shape, index.shape, strict=True)):
        # torch.gather reads the first places of a dim that the index covers in part, so that parts
        # would not correspond.
        if i == dim or size != count:
            whole.update(names[i] if i != dim else ())
            row.append((f"i{i}",) if i == dim and count != 1 else ())
            sizes[f"i{i}"] = count
        else:
            row.append(names[i])
    return ShardingRule(
        (names, tuple(row)),
        (tuple(row),),
        sizes,
        whole=frozenset(whole),
        linear=(frozenset({0}),),
        kernels={name: Kernel("gather_split", Partial()) for name in names[dim]},
    )


@rule("aten.index.Tensor")
def index(call: OpCall) -> ShardingRule:
    """y[.., i, ..] = x[.., index[i], ..]: indexed dims stay whole, all other dims are free.

    The dims of several indices are aligned right; they take the place of the indexed dims, or come
    first where these do not lie side by side (as in numpy's advanced indexing).
    """
    names, sizes = loop_per_dim(call.operands[0].shape)
    places = call.node.args[1]
    indexed = [dim for dim, item in enumerate(places) if isinstance(item, Ref)]
    operands = call.operands[1:]
    # The number of true places, and so the result's shape, depends on the values: nothing is split.
    if any(operand.dtype == torch.bool for operand in operands):
        tensors = (*call.operands, *call.results)
        nothing: list[Dims] = [((),) * len(tensor.shape) for tensor in tensors]
        return ShardingRule(tuple(nothing[:-1]), (nothing[-1],), {})
    wide = max(len(operand.shape) for operand in operands)
    side_by_side = indexed[-1] - indexed[0] == len(indexed) - 1
    start = indexed[0] if side_by_side else 0
    # The indices' own dims: places in the result.
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
        (names, *rows),
        ((*rest[:start], *loops, *rest[start:]),),
        sizes,
        whole=frozenset(name for dim in indexed for name in names[dim]),
        linear=(frozenset({0}),),
    )


@rule(
    "aten.scatter.src",
    "aten.scatter.value",
    "aten.scatter_add.default",
    "aten.scatter_reduce.two",
)
def scatter(call: OpCall) -> ShardingRule:
    """x[a, index[a, i, b], b] is set to y[a, i, b], or joined with it.

    Other dims than that of the places are free where the index covers all of them.
    """
    x, index = call.operands[:2]
    names, sizes = loop_per_dim(call.operands[0].shape)
    dim = call.node.args[1] % max(len(names), 1)
    # A rank cannot write to places that it does not hold.
    whole = set(names[dim] if names else ())
    source = call.operands[2:]
    for i, size in enumerate(x.shape):
        counts = [index.shape[i], *(tensor.shape[i] for tensor in source)]
        if i != dim and any(count != size for count in counts):
            whole.update(names[i])
    rows: list[Dims] = []
    for tensor in (index, *source):
        row = [
            () if i == dim or (name and name[0] in whole) else name for i, name in enumerate(names)
        ]
        rows.append(tuple(row[: len(tensor.shape)]))
    # Setting and adding are linear in both tensors together; a number but 0 would count on every
    # rank.
    sums: tuple[frozenset[int], ...] = ()
    if source and call.argument(4, "reduce", "sum") in ("sum", "mean"):
        sums = (frozenset({0, 2}),)
    elif not source and call.argument(3, "value") == 0:
        sums = (frozenset({0}),)
    return ShardingRule((names, *rows), (names,), sizes, whole=frozenset(whole), linear=sums)


@rule(
    "aten.index_add.default",
    "aten.index_copy.default",
    "aten.index_fill.int_Scalar",
    "aten.index_fill.int_Tensor",
    "aten.index_reduce.default",
)
def index_write(call: OpCall) -> ShardingRule:
    """x[a, index[i], b] is set to y[a, i, b], or joined with it:
    all dims but the indexed one are free.
    """
    names, sizes = loop_per_dim(call.operands[0].shape)
    dim = call.node.args[1] % max(len(names), 1)
    whole = frozenset(names[dim]) if names else frozenset()
    index: Dims = ((),) * len(call.operands[1].shape)
    rows: list[Dims] = [names, index]
    sums = frozenset({0})
    if len(call.operands) > 2:
        sums = frozenset({0, 2})
        written = call.operands[2].shape
        row = [() if i == dim else name for i, name in enumerate(names)]
        rows.append(tuple(row[: len(written)]) if written else ())
    passes = "reduce" not in call.node.target
    if "int_Scalar" in call.node.target:
        passes = call.argument(3, "value") == 0
    return ShardingRule(tuple(rows), (names,), sizes, whole=whole, linear=(sums,) if passes else ())


@rule("aten.index_put.default", "aten._unsafe_index_put.default")
def index_put(call: OpCall) -> ShardingRule:
    """x[.., index[i], ..] is set to y[.., i, ..], or joined with it:
    dims that are not indexed are free.

    Values are aligned right with what `x[.., index, ..]` gives.
    """
    x, values = call.operands[0], call.operands[-1]
    names, sizes = loop_per_dim(call.operands[0].shape)
    places = call.node.args[1]
    indexed = [dim for dim, item in enumerate(places) if isinstance(item, Ref)]
    indices = call.operands[1:-1]
    linear = (frozenset({0, len(call.operands) - 1}),)
    if any(operand.dtype == torch.bool for operand in indices):
        # A mask of several dims stands for as many dims of x, and adds one to the result.
        covered: set[int] = set()
        at = 0
        tensors = iter(indices)
        for item in places:
            width = max(len(next(tensors).shape), 1) if isinstance(item, Ref) else 1
            covered |= set(range(at, at + width)) if isinstance(item, Ref) else set()
            at += width
        indexed = sorted(covered)
        wide = 1
    else:
        wide = max(len(operand.shape) for operand in indices)
    side_by_side = indexed[-1] - indexed[0] == len(indexed) - 1
    start = indexed[0] if side_by_side else 0
    rest = [row for dim, row in enumerate(names) if dim not in indexed]
    shape = [x.shape[dim] for dim in range(len(names)) if dim not in indexed]
    nothing: list[Loops] = [()] * wide
    result = [*rest[:start], *nothing, *rest[start:]]
    whole = {name for dim in indexed for name in names[dim]}
    offset = len(result) - len(values.shape)
    row = [
        () if size == 1 else result[offset + i] if offset + i >= 0 else ()
        for i, size in enumerate(values.shape)
    ]
    assert len(shape) == len(rest)
    rows: list[Dims] = [((),) * len(operand.shape) for operand in indices]
    return ShardingRule(
        (names, *rows, tuple(row)),
        (names,),
        sizes,
        whole=frozenset(whole),
        linear=linear,
    )


@rule("aten.bucketize.Tensor", "aten.isin.Tensor_Tensor")
def compared(call: OpCall) -> ShardingRule:
    """Each element is compared with all of a list, which every rank needs in full."""
    row = " ".join(f"d{i}" for i in range(len(call.operands[0].shape)))
    others = " ".join(["1"] * len(call.operands[1].shape))
    return ShardingRule.parse(f"{row}, {others} -> {row}", call)


@rule("aten.searchsorted.Tensor")
def searchsorted(call: OpCall) -> ShardingRule:
    """Places in sorted rows: one list for all, or one for each place of the leading dims."""
    rows, values = call.operands[:2]
    names = [f"d{i}" for i in range(len(values.shape))]
    row = ["1"] if len(rows.shape) == 1 else [*names[:-1], "1"]
    texts = [" ".join(row), " ".join(names), *[" ".join(row)] * (len(call.operands) - 2)]
    return ShardingRule.parse(f"{', '.join(texts)} -> {' '.join(names)}", call)


@rule("aten.take.default")
def take(call: OpCall) -> ShardingRule:
    """Elements at any places of a tensor, which stays whole; the places can be split."""
    places = " ".join(f"i{i}" for i in range(len(call.operands[1].shape)))
    source = " ".join(["1"] * len(call.operands[0].shape))
    return ShardingRule.parse(f"{source}, {places} -> {places}", call, linear=[{0}])


@rule("aten.masked_scatter.default", "aten.put.default")
def all_whole(call: OpCall) -> ShardingRule:
    """Nothing is split, because which element goes where depends on all the others."""
    tensors = (*call.operands, *call.results)
    rows: list[Dims] = [((),) * len(tensor.shape) for tensor in tensors]
    return ShardingRule(
        tuple(rows[:-1]), (rows[-1],), {}, linear=(frozenset({0, len(call.operands) - 1}),)
    )
