"""Rules of normalizations: dims over which they take the mean stay whole, or need a kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoparallel.graph.graph import Dim, numel_hint
from autoparallel.placement import Collective, Invariant
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Kernel, Loops, OpCall, Shapes, ShardingRule


@rule("aten.layer_norm.default", "aten.native_layer_norm.default")
def last_dims(call: OpCall) -> ShardingRule:
    """y[..., n] = (x - mean_n) / deviation_n * w[n] + b[n]: all but the normalized dims are free.

    Layer norm of activations that are sharded along the sequence needs no communication
    (arXiv:2205.05198).
    """
    count = len(call.node.args[1])
    inner = " ".join(f"n{i}" for i in range(count))
    affine = f", {inner}" * (len(call.operands) - 1)
    # native_layer_norm also returns mean and deviation, of size 1 along normalized dims.
    statistics = (", ... " + " ".join(["1"] * count)) * (len(call.results) - 1)
    return ShardingRule.parse(
        f"... {inner}{affine} -> ... {inner}{statistics}",
        call,
        whole=[f"n{i}" for i in range(count)],
    )


@rule("aten.rms_norm.default")
def rms_norm(call: OpCall) -> ShardingRule:
    """y[..., n] = x / root of mean_n(x^2) * w[n]: a single n is split by a kernel, in which the
    ranks add up one number per row, and one backward.
    """
    free = last_dims(call)
    if len(call.node.args[1]) != 1 or "n0" not in free.sizes:
        return free
    x = call.operands[0]
    once = (Collective.ALL_REDUCE, numel_hint(x.shape[:-1]) * max(x.dtype.itemsize, 4))
    kernel = Kernel("rms_norm_split", Invariant(), (once,) * 2)
    return replace(free, whole=frozenset(), kernels={"n0": kernel})


def _channels(call: OpCall, whole: str) -> ShardingRule:
    """Return the rule of x[b, c, s] with vectors over c.

    whole: initials of the loops that cannot be split.
    """
    spatial = [f"s{i}" for i in range(len(call.operands[0].shape) - 2)]
    row = " ".join(["b", "c", *spatial])
    vectors = ", c" * (len(call.operands) - 1)
    names = [name for name in ("b", "c", *spatial) if name[0] in whole]
    rest = ", c" * (len(call.results) - 1)
    return ShardingRule.parse(f"{row}{vectors} -> {row}{rest}", call, whole=names)


@rule("aten.batch_norm.default", takes_empty=False)
def batch_norm(call: OpCall) -> ShardingRule:
    """y[b, c, s] = (x - mean_c) / deviation_c * w[c] + bias[c].

    In training the mean is over b and s, which stay whole. If running statistics are kept too, it
    writes to its operands, which only the unsharded op may do.
    """
    trains, keeps = bool(call.node.args[5]), call.node.args[3] is not None
    return _channels(call, ("bcs" if keeps else "bs") if trains else "")


@rule(
    "aten.native_batch_norm.default",
    "aten._native_batch_norm_legit_functional.default",
    takes_empty=False,
)
def batch_statistics(call: OpCall) -> ShardingRule:
    """Batch norm with the batch's own mean and deviation, and the running ones as results.

    Splitting the dims of the mean needs statistics of all ranks: two numbers per channel are
    gathered, and two summed backward (synchronized batch norm).
    """
    x = call.operands[0]
    by_channel = _channels(call, "")
    # Statistics are kept as float32 at least.
    nbytes = 2 * numel_hint(x.shape[1:2]) * max(x.dtype.itemsize, 4)
    collectives = ((Collective.ALL_GATHER, nbytes), (Collective.ALL_REDUCE, nbytes))
    kernel = Kernel("batch_norm_split", Invariant(), collectives)
    averaged = [name for name in by_channel.sizes if name != "c"]
    return replace(by_channel, kernels=dict.fromkeys(averaged, kernel))


@rule("aten.instance_norm.default", takes_empty=False)
def instance_norm(call: OpCall) -> ShardingRule:
    """Batch norm with a mean for each b, so that the batch is free in training too.

    The dims of the mean are split by a kernel: two sums of all ranks forward, and two backward.
    """
    trains, keeps = bool(call.node.args[5]), call.node.args[3] is not None
    by_channel = _channels(call, ("bcs" if keeps else "") if trains else "")
    if not trains or keeps:
        return by_channel
    x = call.operands[0]
    once = (Collective.ALL_REDUCE, numel_hint(x.shape[:2]) * x.dtype.itemsize)
    kernels = {
        f"s{dim - 2}": Kernel("instance_norm_split", Invariant(), (once,) * 4, (("split", dim),))
        for dim in range(2, len(x.shape))
        if f"s{dim - 2}" in by_channel.sizes
    }
    return replace(by_channel, kernels=kernels)


# With so many groups, they are split, rather than the channels of each. That is free.
_MANY_GROUPS = 8


@rule("aten.group_norm.default", takes_empty=False)
def group_norm(call: OpCall) -> ShardingRule:
    """y[b, g c, s] = (x - mean_(c, s)) / deviation_(c, s) * w[g c] + bias[g c]:
    b and g are free. Few groups may be fewer than the ranks: c is split by a kernel then; and so
    are places s, of which each rank has some of an image.
    """
    groups = call.node.args[1]
    by_channel = _channels(call, "cs")
    channels = call.operands[0].shape[1]
    # Groups of an unknown number of channels are no loops.
    if not isinstance(channels, int):
        return _channels(call, "cs")
    channel_sizes: dict[str, Dim] = {"g": groups, "c": channels // groups}
    channel_sizes = {name: size for name, size in channel_sizes.items() if size != 1}

    def divided(dims: tuple[Loops, ...]) -> tuple[Loops, ...]:
        """Return the loops of one tensor with its channels as groups and channels of a group."""
        return tuple(tuple(channel_sizes) if names == ("c",) else names for names in dims)

    def local_args(call: OpCall, shapes: Shapes) -> tuple[Any, ...]:
        """Return the args with as many groups as the local channels are."""
        args = call.node.args
        return (args[0], shapes[0][1] * groups // channels, *args[2:])

    x = call.operands[0]
    once = (Collective.ALL_REDUCE, numel_hint(x.shape[:1]) * groups * x.dtype.itemsize)
    arguments = (("channels", channels // groups),)
    kernels = {
        f"s{dim - 2}": Kernel(
            "group_norm_split", Invariant(), (once,) * 4, (*arguments, ("split", dim))
        )
        for dim in range(2, len(x.shape))
        if f"s{dim - 2}" in by_channel.sizes
    }
    if groups < _MANY_GROUPS and "c" in channel_sizes:
        kernels["c"] = Kernel("group_norm_split", Invariant(), (once,) * 4, arguments)
    return replace(
        by_channel,
        whole=by_channel.whole - set(kernels),
        kernels=kernels,
        operands=tuple(map(divided, by_channel.operands)),
        results=tuple(map(divided, by_channel.results)),
        sizes={name: size for name, size in by_channel.sizes.items() if name != "c"}
        | channel_sizes,
        local_args=local_args,
    )
