"""Rules of cutting tensors along a dim, and of putting them together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from autoparallel.graph.graph import Dim
from autoparallel.rules.ops.shape import SUM_PASSES, axis, carried
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Loops, OpCall, Shapes, ShardingRule, loop_per_dim


@dataclass(frozen=True, slots=True)
class _Laid:
    """The loops of a tensor that consists of parts laid end to end along one dim.

    whole: its dims. parts: the dims of every part. sizes: of the loops. unsplit: those that stay
    whole. pieces: as in `ShardingRule`.
    """

    whole: Dims
    parts: tuple[Dims, ...]
    sizes: dict[str, Dim]
    unsplit: frozenset[str] = frozenset()
    pieces: dict[str, tuple[str, int, int]] = field(default_factory=dict)


def _laid_end_to_end(shape: tuple[Dim, ...], dim: int, lengths: list[Dim]) -> _Laid:
    """Return the loops of a tensor of `shape` whose dim consists of parts of these lengths.

    Equal parts are blocks of the dim, all split alike. Of parts of unequal sizes, such as a fused
    query of 32 heads with key and value of 8 each, every one is split by itself, and the dim in
    blocks of these sizes.
    """
    names, sizes = loop_per_dim(shape)
    before, after = names[:dim], names[dim + 1 :]
    fixed = [part for part in lengths if isinstance(part, int)]
    # Symbolic parts cannot be told apart in the dim's loop, and a part without elements has none.
    if len(fixed) < len(lengths) or not all(fixed) or max(fixed, default=1) == 1:
        rows = tuple((*before, (), *after) for _ in lengths)
        return _Laid(names, rows, sizes, frozenset({f"d{dim}"} & set(sizes)))
    sizes.pop(f"d{dim}", None)
    if len(set(fixed)) == 1:
        sizes |= {"blocks": len(fixed), "inner": fixed[0]}
        row: Loops = ("blocks", "inner") if len(fixed) > 1 else ("inner",)
        rows = tuple((*before, ("inner",), *after) for _ in fixed)
        return _Laid((*before, row, *after), rows, sizes, frozenset({"blocks"}))
    sizes["laid"] = sum(fixed)
    pieces, start, several = {}, 0, []
    for index, part in enumerate(fixed):
        sizes[f"piece{index}"] = part
        pieces[f"piece{index}"] = ("laid", start, start + part)
        several.append((*before, (f"piece{index}",), *after))
        start += part
    whole = (*before, ("laid",), *after)
    return _Laid(whole, tuple(several), sizes, frozenset(pieces), pieces)


@rule(
    "aten.split.Tensor",
    "aten.chunk.default",
    "aten.split_with_sizes.default",
    "aten.tensor_split.sections",
    "aten.split_with_sizes_copy.default",
    "aten.unsafe_split_with_sizes.default",
)
def split(call: OpCall) -> ShardingRule:
    """The parts are blocks of the operand's dim; each block can be split by itself."""
    shape = call.operands[0].shape
    dim = axis(call.argument(2, "dim", 0), len(shape))
    parts = [result.shape[dim] for result in call.results]
    counted = any(word in call.node.target for word in ("chunk", "sections", "unsafe_split.T"))
    # The op would cut a part of the dim into counted parts of other sizes.
    if counted and any(part != parts[0] for part in parts):
        parts = [1] * len(parts)
    laid = _laid_end_to_end(shape, dim, parts)
    base = ShardingRule(
        (laid.whole,),
        laid.parts,
        laid.sizes,
        whole=laid.unsplit,
        linear=SUM_PASSES,
        free=True,
        pieces=laid.pieces,
    )

    def local_args(call: OpCall, shapes: Shapes) -> tuple[Any, ...]:
        """Return the args with the parts' local sizes, however the op is told how to cut."""
        spec = call.node.args[1]
        if call.node.target.endswith("split.Tensor"):
            # torch cannot count parts of size 0, but takes sizes of 0; and a last part that was
            # shorter may be longer than others of a rank, or be there where torch would end.
            sizes = tuple(shape[dim] for shape in shapes)
            fixed = all(isinstance(size, int) for size in sizes)
            alike = fixed and len(set(sizes[:-1])) <= 1 and 0 < sizes[-1] <= sizes[0]
            spec = sizes if fixed and not alike else sizes[0]
        elif call.node.target == "aten.chunk.default":
            spec = len(shapes)
        elif "with_sizes" in call.node.target:
            spec = tuple(shape[dim] for shape in shapes)
        return (call.node.args[0], spec, *call.node.args[2:])

    return replace(base, local_args=local_args)


@rule("aten.unsafe_split.Tensor", takes_empty=False)
def unsafe_split(call: OpCall) -> ShardingRule:
    """As split, but of a part without elements it makes only one."""
    return split(call)


@rule("aten.unbind.int")
def unbind(call: OpCall) -> ShardingRule:
    """The dim goes; each result is one place along it."""
    return _without(call, axis(call.argument(1, "dim", 0), len(call.operands[0].shape)))


@rule("aten.select.int")
def select(call: OpCall) -> ShardingRule:
    """One place along the dim, which stays whole and goes."""
    return _without(call, axis(call.node.args[1], len(call.operands[0].shape)))


def _without(call: OpCall, dim: int) -> ShardingRule:
    """Return the rule of results that lack one dim of the operand."""
    rank = len(call.operands[0].shape)
    base = carried(call, [i for i in range(rank) if i != dim])
    return replace(base, results=base.results * len(call.results))


@rule("aten.slice.Tensor", "aten.narrow.default")
def slice_(call: OpCall) -> ShardingRule:
    """A range of one dim, which stays whole; all others are free."""
    return _keep_dim_whole(call, axis(call.argument(1, "dim", 0), len(call.operands[0].shape)))


@rule("aten.unfold.default")
def unfold(call: OpCall) -> ShardingRule:
    """Windows of one dim, which stays whole; a new last dim runs through each."""
    base = _keep_dim_whole(call, axis(call.node.args[1], len(call.operands[0].shape)))
    return replace(base, results=((*base.results[0], ()),))


@rule("aten.tril.default", "aten.triu.default")
def triangle(call: OpCall) -> ShardingRule:
    """The places in the two last dims, which stay whole, decide which elements stay."""
    rank = len(call.operands[0].shape)
    base = carried(call, list(range(rank)))
    in_place = {name for names in base.operands[0][-2:] for name in names}
    return replace(base, whole=base.whole | in_place, free=False)


@rule("aten.diagonal_scatter.default")
def scattered_diagonal(call: OpCall) -> ShardingRule:
    """A tensor with another diagonal of two dims, which stay whole."""
    rank = len(call.operands[0].shape)
    crossed = {axis(call.argument(3, "dim1", 0), rank), axis(call.argument(4, "dim2", 1), rank)}
    base = carried(call, list(range(rank)))
    row = base.operands[0]
    part = [*(names for i, names in enumerate(row) if i not in crossed), ()]
    return replace(
        base,
        operands=(row, tuple(part)),
        whole=base.whole | {name for i in crossed for name in row[i]},
        linear=(frozenset({0, 1}),),
        free=False,
    )


@rule("aten.rot90.default")
def rot90(call: OpCall) -> ShardingRule:
    """Two dims, which stay whole, turn; all others are free."""
    rank = len(call.operands[0].shape)
    times, dims = call.argument(1, "k", 1), call.argument(2, "dims", (0, 1))
    one, two = (axis(dim, rank) for dim in dims)
    order: list[int | None] = list(range(rank))
    if times % 2:
        order[one], order[two] = two, one
    base = carried(call, order)
    turned = {name for dim in (one, two) for name in base.operands[0][dim]}
    return replace(base, whole=base.whole | turned, free=False)


@rule("aten.glu.default")
def gated(call: OpCall) -> ShardingRule:
    """The first half of one dim times the sigmoid of the second: two blocks, each split alike."""
    shape = call.operands[0].shape
    dim = axis(call.argument(1, "dim", -1), len(shape))
    half = call.results[0].shape[dim]
    laid = _laid_end_to_end(shape, dim, [half, half])
    return ShardingRule((laid.whole,), laid.parts[:1], laid.sizes, whole=laid.unsplit)


@rule("aten.flip.default", "aten.roll.default")
def moved(call: OpCall) -> ShardingRule:
    """Elements move along some dims, which stay whole; without dims, along all."""
    base = carried(call, list(range(len(call.operands[0].shape))))
    dims = call.argument(2 if "roll" in call.node.target else 1, "dims", ())
    rank = len(call.operands[0].shape)
    shifted = {f"d{axis(dim, rank)}" for dim in dims} if dims else set(base.sizes)
    return replace(base, whole=base.whole | shifted, free=False)


def _keep_dim_whole(call: OpCall, dim: int) -> ShardingRule:
    """Return the rule of a result with another size along one dim, which stays whole."""
    base = carried(call, list(range(len(call.operands[0].shape))))
    result = list(base.results[0])
    result[dim] = ()
    name = base.operands[0][dim]
    return replace(base, results=(tuple(result),), whole=base.whole | frozenset(name))


@rule("aten.constant_pad_nd.default", "aten.pad.default")
def pad(call: OpCall) -> ShardingRule:
    """Padded dims stay whole. Zeros added to a pending sum are zeros of the sum."""
    rank = len(call.operands[0].shape)
    base = carried(call, list(range(rank)))
    amounts = call.node.args[1]
    result = list(base.results[0])
    whole = set(base.whole)
    for index in range(len(amounts) // 2):
        dim = rank - 1 - index
        if amounts[2 * index] != 0 or amounts[2 * index + 1] != 0:
            whole.update(base.operands[0][dim])
            result[dim] = ()
    # constant_pad_nd has no mode; pad's other modes repeat elements, which is linear.
    constant, value = True, call.argument(2, "value", 0)
    if call.node.target == "aten.pad.default":
        constant = call.argument(2, "mode", "constant") == "constant"
        value = call.argument(3, "value")
    zero = value in (None, 0)
    return replace(
        base,
        results=(tuple(result),),
        whole=frozenset(whole),
        linear=SUM_PASSES if zero or not constant else (),
        free=False,
        takes_empty=constant,
    )


@rule("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def cat(call: OpCall) -> ShardingRule:
    """Tensors joined along one dim are blocks of the result's dim."""
    shape = call.results[0].shape
    dim = axis(call.argument(1, "dim", 0), len(shape))
    parts = [operand.shape[dim] for operand in call.operands]
    laid = _laid_end_to_end(shape, dim, parts)
    return ShardingRule(
        laid.parts,
        (laid.whole,),
        laid.sizes,
        whole=laid.unsplit,
        linear=(frozenset(range(len(call.operands))),),
        pieces=laid.pieces,
    )


@rule("aten.stack.default")
def stack(call: OpCall) -> ShardingRule:
    """A new dim, one place per operand; all other dims are free."""
    rank = len(call.results[0].shape)
    dim = axis(call.argument(1, "dim", 0), rank)
    base = carried(call, list(range(rank - 1)))
    result = list(base.operands[0])
    result.insert(dim, ())
    return replace(
        base,
        operands=base.operands * len(call.operands),
        results=(tuple(result),),
        linear=(frozenset(range(len(call.operands))),),
        free=False,
    )


@rule("aten.slice_scatter.default", "aten.select_scatter.default")
def scattered(call: OpCall) -> ShardingRule:
    """A tensor with a part of one dim replaced. That dim stays whole, all others are free."""
    rank = len(call.operands[0].shape)
    base = carried(call, list(range(rank)))
    dim = axis(call.argument(2, "dim", 0), rank)
    row = base.operands[0]
    part = list(row)
    if "slice" in call.node.target:
        part[dim] = ()
    else:
        del part[dim]
    return replace(
        base,
        operands=(row, tuple(part)),
        whole=base.whole | frozenset(row[dim]),
        linear=(frozenset({0, 1}),),
        free=False,
    )
