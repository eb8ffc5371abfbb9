"""The rule of fused attention."""

from __future__ import annotations

from autoparallel.graph.graph import Dim, hint, numel_hint
from autoparallel.placement import Collective, Partial
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Exchange, Kernel, Loops, OpCall, ShardingRule
from autoparallel.support import torch_versions

# Fused kernels leave out blocks of so many keys and queries that a causal mask hides.
_BLOCK = 128
# Bytes of the numbers that gradients are added up in, at least.
_PRECISE = 4


@rule("aten.scaled_dot_product_attention.default")
def attention(call: OpCall) -> ShardingRule:
    """y[.., n, s, e] = sum_t softmax_t(sum_d q[.., n, s, d] k[.., n, t, d]) v[.., n, t, e].

    Batch and heads are free, and so are queries; where a causal mask counts from the first one, a
    kernel knows where a part begins. Keys can be split together with queries, and are passed round;
    e would leave the first product whole. With grouped heads, n = (g, m): keys and values have g
    alone. Of a part without elements, torch gives no gradient to a mask, and some releases cannot
    run without heads.
    """
    query, key, value = call.operands[:3]
    rank = len(query.shape)
    causal = bool(call.argument(5, "is_causal", False))
    grouped = bool(call.node.keyword("enable_gqa", False))
    sizes: dict[str, Dim] = {}

    def named(tensor_shape: tuple[Dim, ...], last: tuple[str, str]) -> list[Loops]:
        """Return the loops of one tensor, aligned right with the query.

        last: names of its two last dims.
        """
        row: list[Loops] = []
        for index, size in enumerate(tensor_shape):
            position = index + rank - len(tensor_shape)
            name = last[position - rank + 2] if position >= rank - 2 else f"b{position}"
            row.append((name,) if size != 1 else ())
            if size != 1:
                sizes.setdefault(name, size)
        return row

    q, k, v = (
        named(query.shape, ("s", "d")),
        named(key.shape, ("t", "d")),
        named(value.shape, ("t", "e")),
    )
    y = named(call.results[0].shape, ("s", "e"))
    head = rank - 3
    heads, groups, others = (
        each.shape[-3] if grouped and len(each.shape) > 2 else 1 for each in (query, key, value)
    )
    if grouped and not (isinstance(heads, int) and isinstance(groups, int) and groups == others):
        # Of a module that is given its keys, the numbers of heads are sizes of inputs: how many
        # share a key is not known for all calls, so that heads stay together; and so they do where
        # a key and a value are shared by different ones.
        sizes.pop(f"b{head}", None)
        for row in (q, k, v, y):
            row[-3:-2] = [()] * len(row[-3:-2])
    elif grouped and heads != groups:
        assert isinstance(heads, int)
        assert isinstance(groups, int)
        sizes.pop(f"b{head}", None)
        sizes["m"] = heads // groups
        inner: Loops = ("m",)
        outer: Loops = ()
        if groups > 1:
            sizes["g"] = groups
            outer = ("g",)
        q[-3] = y[-3] = outer + inner
        k[-3] = v[-3] = outer
    operands: list[Dims] = [tuple(q), tuple(k), tuple(v)]
    for mask in call.operands[3:]:
        row = named(mask.shape, ("s", "t"))
        at = len(mask.shape) - 3
        # A mask with a dim of heads has the loops of the query's heads.
        if at >= 0 and row[at]:
            row[at] = q[head]
        operands.append(tuple(row))
    width, depth = hint(query.shape[-1]), hint(value.shape[-1])
    kernels, exchanges = {}, {}
    if "s" in sizes and causal and not call.argument(4, "dropout_p", 0.0):
        # is_causal masks by the place in the part, which is not the place in the whole.
        kernels["s"] = Kernel("attention_queries", Partial(), _dealt(call, (0,)))
    if {"s", "t"} <= {*sizes} and _can_pass(call, operands):
        exchanges["s"] = Exchange(_ring(call, operands, causal), ("t",))
    whole = {"d", "e", "t"} | ({"s"} if causal and not kernels else set())
    return ShardingRule(
        tuple(operands),
        (tuple(y),),
        sizes,
        whole=frozenset(whole),
        linear=(frozenset({2}),),
        # The two products share (n, s, t) but not d and e, of which the nest has both: each point
        # counts 2 (d + e) / (d e).
        flops=2 * (width + depth) / (width * depth),
        # One for each query and key.
        exponentials=1 / (width * depth),
        skipped=_above_diagonal(hint(query.shape[-2]), hint(key.shape[-2])) if causal else 0.0,
        takes_empty=not any(mask.requires_grad for mask in call.operands[3:]),
        kernels=kernels,
        exchanges=exchanges,
        occupied=frozenset(q[head] if torch_versions.ATTENTION_NEEDS_HEADS and head >= 0 else ()),
    )


def _can_pass(call: OpCall, operands: list[Dims]) -> bool:
    """Return whether keys and values can be passed round: all have the batch and a head for each
    group of the queries', nothing is dropped out, and a mask of the keys alone is a constant.
    """
    query, key, value = (operand.shape for operand in call.operands[:3])
    if call.argument(4, "dropout_p", 0.0) or key[:-2] != value[:-2]:
        return False
    grouped = bool(call.node.keyword("enable_gqa", False))
    apart = 3 if grouped else 2
    masks = zip(call.operands[3:], operands[3:], strict=True)
    return (
        len(query) == len(key) >= 2
        and query[:-apart] == key[:-apart]
        and not any(mask.requires_grad and _is_of_keys(dims) for mask, dims in masks)
    )


def _is_of_keys(mask: Dims) -> bool:
    """Return whether a mask hides keys from all queries alike."""
    return "t" in mask[-1] and not any("s" in names for names in mask)


def _ring(call: OpCall, operands: list[Dims], causal: bool) -> Kernel:
    """Return the kernel that passes keys and values round, with what it sends.

    Backward they are passed round once more, and their gradients with them, in single precision at
    least.
    """
    pair = call.operands[1:3]
    loops = [frozenset(name for names in dims for name in names) for dims in operands]
    there = sum(numel_hint(value.shape) * value.dtype.itemsize for value in pair)
    back = sum(numel_hint(value.shape) * max(value.dtype.itemsize, _PRECISE) for value in pair)
    of_keys = [
        (mask, has)
        for mask, dims, has in zip(call.operands[3:], operands[3:], loops[3:], strict=True)
        if _is_of_keys(dims)
    ]
    sent = [((Collective.RING_PASS, there), loops[1])]
    if any(operand.requires_grad for operand in call.operands[:3]):
        sent.append(((Collective.RING_PASS, there + back), loops[1]))
    for mask, has in of_keys:
        nbytes = numel_hint(mask.shape) * mask.dtype.itemsize
        sent.append(((Collective.ALL_GATHER, nbytes), has))
    if causal:
        sent += [(each, loops[0]) for each in _dealt(call, (0,))]
        sent += [(each, loops[1]) for each in _dealt(call, (1, 2), with_result=False)]
    return Kernel(
        "attention_ring",
        Partial(),
        tuple(each for each, _ in sent),
        arguments=(("masked", "keys"),) if of_keys else (),
        # What is known so far is read, what is new is added, and the sum is written.
        merged=numel_hint(call.results[0].shape) * 3 * _PRECISE,
        loops=tuple(has for _, has in sent),
    )


def _dealt(
    call: OpCall, operands: tuple[int, ...], with_result: bool = True
) -> tuple[tuple[Collective, int], ...]:
    """Return what is sent to give all ranks the same work under a causal mask: operands and the
    result, and backward their gradients.
    """
    values = (*(call.operands[at] for at in operands), *call.results[:with_result])
    sizes = [numel_hint(value.shape) * value.dtype.itemsize for value in values]
    again = [size for size, value in zip(sizes, values, strict=True) if value.requires_grad]
    return tuple((Collective.ALL_TO_ALL, size) for size in (*sizes, *again))


def _above_diagonal(queries: int, keys: int) -> float:
    """Return the share of the points that a causal mask hides, in whole blocks.

    >>> _above_diagonal(4096, 4096), _above_diagonal(64, 64)
    (0.484375, 0.0)
    """
    if not queries or not keys:
        return 0.0
    # Row i sees i + 1 keys; half a block more is computed of each row.
    seen = (
        (queries + _BLOCK) / 2 if queries <= keys else keys - keys * (keys - _BLOCK) / 2 / queries
    )
    return max(1.0 - seen / keys, 0.0)
