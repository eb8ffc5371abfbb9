"""Rules of convolutions, pooling and resampling: windows over the last dims, which stay whole."""

from __future__ import annotations

import re
from dataclasses import replace

from autoparallel.graph.graph import Dim, Sym
from autoparallel.placement import Partial
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Kernel, OpCall, Shapes, ShardingRule


def _spatial(target: str) -> int:
    """Return the number of dims that the windows run over: the 2 of "aten.conv2d.default"."""
    match = re.search(r"(\d)d", target)
    assert match is not None, target
    return int(match.group(1))


# The position of `groups` among a convolution's arguments.
_GROUPS = 6


def _local_groups(call: OpCall, shapes: Shapes) -> tuple[object, ...]:
    """Return the call's args with as many groups as the local part
    of the result has channels for.
    """
    args, channel = call.node.args, -1 - _spatial(call.node.target)
    channels = call.results[0].shape[channel]
    # Groups are split by whole numbers of channels alone.
    if len(args) <= _GROUPS or args[_GROUPS] == 1 or isinstance(channels, Sym):
        return args
    channels_per_group = channels // args[_GROUPS]
    return (*args[:_GROUPS], shapes[0][channel] // channels_per_group, *args[_GROUPS + 1 :])


def _per_group(channels: Dim, groups: int) -> Dim:
    """Return the number of channels of each group, which the inputs may decide: a weight that is
    computed may have as many rows as the batch.
    """
    if isinstance(channels, Sym) and groups != 1:
        return Sym(channels.expr / groups, channels.hint // groups)
    return channels if isinstance(channels, Sym) else channels // groups


def _grouped_by_a_size(call: OpCall) -> ShardingRule:
    """Return the rule of a convolution with as many groups as an input is long, such as one for
    each entry of a batch that has a weight of its own. Only dim 0 is free.
    """
    spatial = _spatial(call.node.target)
    windows, kernel = (" ".join(f"{kind}{at}" for at in range(spatial)) for kind in "sk")
    batch = "b " * (len(call.operands[0].shape) == spatial + 2)
    ones = " ".join("1" * spatial)
    bias = ", 1" * (len(call.operands) - 2)
    # The weight's rows are the channels of the result, or of x for a transposed one; the other
    # side's channels add no points to the loop nest.
    x, y = ("rows", "1") if "transpose" in call.node.target else ("1", "rows")
    text = f"{batch}{x} {ones}, rows columns {kernel}{bias} -> {batch}{y} {windows}"
    rule = ShardingRule.parse(text, call, flops=2)
    whole = frozenset(rule.sizes) - {"b"}
    why = "the number of groups follows from the inputs' sizes"
    return replace(rule, whole=whole, reasons=dict.fromkeys(sorted(whole), why))


@rule(
    *(f"aten.conv{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "padding")),
    "aten.conv_transpose1d.default",
    "aten.conv_transpose2d.input",
    "aten.conv_transpose3d.input",
    takes_empty=False,
)
def convolution(call: OpCall) -> ShardingRule:
    """y[b, g o, s] = sum_(i, k) x[b, g i, s + k] w[g o, i, k] + bias[g o].

    The weight of a transposed one is w[g i, o, k]. Batch, groups and output channels are free.
    Input channels are summed, for which a bias must count once. With several groups, a part of each
    group's output channels needs a kernel, because the number of groups does not follow from the
    result's shape; of a transposed one it follows from no shape.
    """
    x, weight = call.operands[:2]
    spatial = _spatial(call.node.target)
    transposed = "transpose" in call.node.target
    groups = call.argument(_GROUPS, "groups", 1)
    if isinstance(groups, Sym):
        return _grouped_by_a_size(call)
    weight_rows, weight_columns = weight.shape[:2]
    shared: dict[str, Dim] = {"g": groups, "io"[not transposed]: _per_group(weight_rows, groups)}
    shared["io"[transposed]] = weight_columns
    shared["b"] = x.shape[0] if len(x.shape) == spatial + 2 else 1
    kernel = [f"k{index}" for index in range(spatial)]
    places = [f"s{index}" for index in range(spatial)]
    shared |= dict(zip(kernel, weight.shape[2:], strict=True))
    shared |= dict(zip(places, call.results[0].shape[-spatial:], strict=True))
    sizes = {name: size for name, size in shared.items() if size != 1}

    def dims(*rows: str) -> Dims:
        """Return the loops of a tensor's dims, without those of size 1."""
        return tuple(tuple(name for name in row.split() if name in sizes) for row in rows)

    batch = ("b",) if len(x.shape) == spatial + 2 else ()
    first, second = ("g i", "o") if transposed else ("g o", "i")
    bias = len(call.operands) > 2
    operands = [dims(*batch, "g i", *[""] * spatial), dims(first, second, *kernel)]
    if bias:
        operands.append(dims("g o"))
    whole = {*kernel, *places} | ({"o"} if groups != 1 and transposed else set())
    kernels: dict[str, Kernel] = {}
    if bias and "i" in sizes:
        options = (("transposed", transposed),)
        kernels["i"] = Kernel("convolution_inputs", Partial(), arguments=options)
    if groups != 1 and not transposed and "o" in sizes:
        kernels["o"] = Kernel("convolution_outputs", Partial())
    # local_args replaces positional arguments alone.
    if call.node.keyword("groups", 1) != 1:
        whole |= {"g"}
    return ShardingRule(
        tuple(operands),
        (dims(*batch, "g o", *places),),
        sizes,
        whole=frozenset(whole),
        linear=tuple(frozenset({each, 2} if bias else {each}) for each in (0, 1)),
        flops=2,
        kernels=kernels,
        local_args=_local_groups,
    )


def _leading(call: OpCall, linear: bool) -> ShardingRule:
    """Return a rule with a loop for each dim before the windows, which have none.

    linear: in the operand.
    """
    count = len(call.operands[0].shape) - _spatial(call.node.target)
    names = " ".join([f"d{index}" for index in range(count)])
    windows = " ".join(["1"] * _spatial(call.node.target))
    results = ", ".join([f"{names} {windows}"] * len(call.results))
    return ShardingRule.parse(
        f"{names} {windows} -> {results}", call, linear=[{0}] if linear else []
    )


@rule(
    *(f"aten.{kind}_pool{n}d.default" for kind in ("max", "adaptive_max") for n in (1, 2, 3)),
    "aten.max_pool2d_with_indices.default",
    takes_empty=False,
)
def max_pool(call: OpCall) -> ShardingRule:
    """The largest number of each window: every batch entry and channel by itself,
    nothing linear.
    """
    return _leading(call, linear=False)


_INTERPOLATIONS = (
    *(f"nearest{n}d" for n in (1, 2, 3)),
    "linear1d",
    "bilinear2d",
    "bicubic2d",
    "trilinear3d",
)
_MORE_INTERPOLATIONS = (
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)


@rule(
    *(f"aten.{kind}_pool{n}d.default" for kind in ("avg", "adaptive_avg") for n in (1, 2, 3)),
    *(f"aten.upsample_{kind}.vec" for kind in _INTERPOLATIONS),
    *(f"aten.{kind}.vec" for kind in _MORE_INTERPOLATIONS),
    takes_empty=False,
)
def window_sum(call: OpCall) -> ShardingRule:
    """Weighted sums over windows: every batch entry and channel by itself,
    linear in the operand.
    """
    return _leading(call, linear=True)


@rule("aten.im2col.default", "aten.col2im.default", takes_empty=False)
def columns(call: OpCall) -> ShardingRule:
    """Windows laid out as columns, (b, c, h, w) to (b, c k, l), and their sum the other way."""
    image = call.operands[0] if "im2col" in call.node.target else call.results[0]
    table = call.results[0] if "im2col" in call.node.target else call.operands[0]
    batched = len(image.shape) == 4
    channels, rows = image.shape[-3], table.shape[-2]
    sizes: dict[str, Dim] = {"b": image.shape[0] if batched else 1}
    if isinstance(channels, int) and isinstance(rows, int):
        sizes |= {"c": channels, "k": rows // channels}
    sizes = {name: size for name, size in sizes.items() if size != 1}

    def dims(*texts: str) -> Dims:
        """Return the loops of a tensor's dims; without the first one where there is no batch."""
        loops_of_dims = tuple(
            tuple(name for name in text.split() if name in sizes) for text in texts
        )
        return loops_of_dims if batched else loops_of_dims[1:]

    image_dims, table_dims = dims("b", "c", "", ""), dims("b", "c k", "")
    sides = (image_dims, table_dims) if "im2col" in call.node.target else (table_dims, image_dims)
    return ShardingRule(
        (sides[0],), (sides[1],), sizes, whole=frozenset({"k"}), linear=(frozenset({0}),)
    )


@rule(
    *(f"aten.{name}.default" for name in ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")),
    takes_empty=False,
)
def grid_sampler(call: OpCall) -> ShardingRule:
    """Pixels at given places: every batch entry and channel by itself, linear in the image."""
    windows = " ".join(["1"] * (len(call.operands[0].shape) - 2))
    return ShardingRule.parse(f"b c {windows}, b {windows} 1 -> b c {windows}", call, linear=[{0}])


@rule("aten.affine_grid_generator.default", takes_empty=False)
def affine_grid(call: OpCall) -> ShardingRule:
    """Places of pixels under a linear map of each batch entry, which is free."""
    windows = " ".join(["1"] * (len(call.results[0].shape) - 2))

    def local_args(call: OpCall, shapes: Shapes) -> tuple[object, ...]:
        """Return the args with the local batch."""
        size = call.node.args[1]
        return (call.node.args[0], (shapes[0][0], *size[1:]), *call.node.args[2:])

    parsed = ShardingRule.parse(f"b 1 1 -> b {windows} 1", call, linear=[{0}])
    return replace(parsed, local_args=local_args)
