"""Rules of views and rearrangements: they carry loops from dim to dim, merge and divide them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoparallel.graph.graph import Dim
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Loops, OpCall, Shapes, ShardingRule, loop_per_dim
from autoparallel.rules.view_loops import view_loops

# A rearrangement is linear in its operand: a pending sum passes.
SUM_PASSES = (frozenset({0}),)


def _local_shape(call: OpCall, shapes: Shapes) -> tuple[Any, ...]:
    """Return the args of a view with the local shape in place of the whole one."""
    return (call.node.args[0], shapes[0], *call.node.args[2:])


@rule("aten.reshape.default", "aten.view.default")
def reshape(call: OpCall) -> ShardingRule:
    """Dims are merged and divided; loops say which part of one dim is which part of another."""
    left, right, sizes, whole = view_loops(call.operands[0].shape, call.results[0].shape)
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
    """Return a view whose result's dim i is the operand's dim sources[i] (None:
    a new dim of size 1).
    """
    operand = call.operands[0]
    names, sizes = loop_per_dim(operand.shape)
    result = tuple(() if source is None else names[source] for source in sources)
    carried_dims = {source for source in sources if source is not None}
    dropped = {name for i, loops in enumerate(names) if i not in carried_dims for name in loops}
    return ShardingRule(
        (names,), (result,), sizes, whole=frozenset(dropped), linear=SUM_PASSES, free=True
    )


def axis(dim: int, rank: int) -> int:
    """Return the dim counted from 0, where it may be counted from the end;
    0 for a tensor without dims.
    """
    return dim % rank if rank else 0


@rule("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default")
def transpose(call: OpCall) -> ShardingRule:
    """Two dims change places, and their loops with them."""
    rank = len(call.operands[0].shape)
    order: list[int | None] = list(range(rank))
    one, two = axis(call.node.args[1], rank), axis(call.node.args[2], rank)
    if rank:
        order[one], order[two] = order[two], order[one]
    return carried(call, order)


@rule("aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def matrix_transpose(call: OpCall) -> ShardingRule:
    """The two last dims change places, and their loops with them."""
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
    source_of = dict(zip(targets, sources, strict=True))
    others = iter([dim for dim in range(rank) if dim not in sources])
    return carried(call, [source_of[i] if i in source_of else next(others) for i in range(rank)])


@rule("aten.diagonal.default")
def diagonal(call: OpCall) -> ShardingRule:
    """Two dims become one, the last; neither can be split."""
    rank = len(call.operands[0].shape)
    crossed = {axis(call.argument(2, "dim1", 0), rank), axis(call.argument(3, "dim2", 1), rank)}
    return carried(call, [*(i for i in range(rank) if i not in crossed), None])


@rule("aten.permute.default")
def permute(call: OpCall) -> ShardingRule:
    """Dims are put in another order, and their loops with them."""
    rank = len(call.operands[0].shape)
    return carried(call, [axis(dim, rank) for dim in call.node.args[1]])


@rule("aten.unsqueeze.default")
def unsqueeze(call: OpCall) -> ShardingRule:
    """A new dim of size 1, which has no loop."""
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
    base = carried(call, [i for i, size in enumerate(shape) if i not in named or size != 1])
    longer = {f"d{i}" for i in named if shape[i] != 1}
    return replace(base, whole=base.whole | longer)


@rule("aten.expand.default")
def expand(call: OpCall) -> ShardingRule:
    """Dims of size 1 are repeated: the loop is the result's alone."""
    operand, result = call.operands[0], call.results[0]
    offset = len(result.shape) - len(operand.shape)
    right, sizes = loop_per_dim(result.shape)
    left = tuple(() if size == 1 else (f"d{offset + i}",) for i, size in enumerate(operand.shape))
    return ShardingRule(
        (left,), (right,), sizes, linear=SUM_PASSES, free=True, local_args=_local_shape
    )


@rule("aten.repeat.default", "aten.tile.default")
def repeat(call: OpCall) -> ShardingRule:
    """Dims are repeated as a whole: the repetitions are the outer loop, which stays whole.

    Repetitions of a dim of size 1 are all there is of it, so they can be split: into none, too.
    """
    operand, result = call.operands[0], call.results[0]
    offset = len(result.shape) - len(operand.shape)
    shape = (1,) * offset + operand.shape
    sizes: dict[str, Dim] = {}
    whole: set[str] = set()
    dims: list[Loops] = []
    times = (1,) * (len(result.shape) - len(call.node.args[1])) + tuple(call.node.args[1])
    for i, (size, count) in enumerate(zip(shape, times, strict=True)):
        loops = {f"r{i}": count, f"d{i}": size}
        loops = {name: number for name, number in loops.items() if number != 1}
        if size != 1:
            whole.add(f"r{i}")
        sizes.update(loops)
        dims.append(tuple(loops))

    def local_args(call: OpCall, shapes: Shapes) -> tuple[Any, ...]:
        """Return the args with local repetitions; only dims of size 1
        repeat another number of times.
        """
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
        function="repeat" if any(name[0] == "r" for name in sizes.keys() - whole) else "",
    )


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(call: OpCall) -> ShardingRule:
    """Every place along one dim is repeated: the repetitions are the inner loop.

    They stay together, but on ranks that share a place, and for a dim of size 1.
    """
    operand = call.operands[0]
    dim = call.argument(2, "dim")
    # The operand is flattened, or the size is said twice: neither is worth a rule.
    if dim is None or call.node.keyword("output_size") is not None:
        dims, sizes = loop_per_dim(operand.shape)
        result: Dims = ((),) * len(call.results[0].shape)
        return ShardingRule((dims,), (result,), sizes, whole=frozenset(sizes), linear=SUM_PASSES)
    base = carried(call, list(range(len(operand.shape))))
    row = list(base.results[0])
    at = axis(dim, len(row))
    row[at] = (*row[at], "times")
    times, size = call.node.args[1], operand.shape[at]
    fixed = isinstance(times, int) and times > 1

    def local_args(call: OpCall, shapes: Shapes) -> tuple[Any, ...]:
        """Return the args with this rank's repetitions: not all, where it has a part of a place."""
        held = shapes[0][at]
        less = isinstance(held, int) and (size == 1 or 0 < held < times)
        return (call.node.args[0], held if less else times, *call.node.args[2:])

    return replace(
        base,
        results=(tuple(row),),
        sizes={**base.sizes, "times": times},
        whole=base.whole | (frozenset() if fixed and size == 1 else {"times"}),
        dealt=frozenset({"times"} if fixed else ()),
        local_args=local_args if fixed else None,
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
    base = _shuffled((*batch, channels, *call.results[0].shape[-2:]), factor)
    return replace(base, operands=base.results, results=base.operands)


def _shuffled(shape: tuple[Dim, ...], factor: int) -> ShardingRule:
    """Return the rule from (.., c r q, h, w) to (.., c, h r, w q),
    for the smaller size of each pair of dims.
    """
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
    channel_sizes: dict[str, int] = {}
    if isinstance(channels, int):
        channel_sizes = {"g": groups, "c": channels // groups}
    channel_sizes = {name: size for name, size in channel_sizes.items() if size != 1}
    return ShardingRule(
        ((first, tuple(channel_sizes), *others),),
        ((first, tuple(channel_sizes)[::-1], *others),),
        sizes | channel_sizes,
        whole=frozenset({"g"}),
        linear=SUM_PASSES,
    )


@rule("aten.view_as_real.default", "aten.view_as_complex.default")
def complex_view(call: OpCall) -> ShardingRule:
    """The real and the imaginary part become a last dim of two,
    or a last dim of two becomes them.
    """
    rank = min(len(call.operands[0].shape), len(call.results[0].shape))
    row = " ".join(f"d{i}" for i in range(rank))
    left, right = row, f"{row} 1"
    if len(call.operands[0].shape) > rank:
        left, right = right, left
    base = ShardingRule.parse(f"{left} -> {right}", call, linear=SUM_PASSES)
    return replace(base, free=True)


@rule("aten.diag_embed.default")
def diag_embed(call: OpCall) -> ShardingRule:
    """The last dim becomes the diagonal of two new ones; neither can be split."""
    rank = len(call.results[0].shape)
    crossed = {axis(call.argument(2, "dim1", -2), rank), axis(call.argument(3, "dim2", -1), rank)}
    others = iter(range(rank - 2))
    base = carried(call, [None if i in crossed else next(others) for i in range(rank)])
    return replace(base, free=False)
