"""Rules of convolutions, pooling and resampling: windows over the last dims, of which a split takes
the edges of the neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from autoparallel.graph.graph import Dim, Sym, Value, hint, numel_hint
from autoparallel.placement import Collective, Partial
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Kernel, OpCall, Shapes, ShardingRule

Kernels = Mapping[int, Kernel]

# Numbers of places up to which their products with a reciprocal are rounded to the right element.
_COUNTABLE = 2**22


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
    result's shape; of a transposed one it follows from no shape. Places s are split where the
    windows' edges are sent to the neighbours.
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
    by_edges, free = _convolution_edges(call, places)
    # Of a split dim, parts of the input go with parts of the result, whatever the sizes.
    split = [place if place in by_edges or place in free else "" for place in places]
    operands = [dims(*batch, "g i", *split), dims(first, second, *kernel)]
    if bias:
        operands.append(dims("g o"))
    # Of what is sent, all that make channels of the result need as much.
    loops = frozenset(name for names in operands[0] for name in names)
    kernels = {
        place: replace(each, loops=(loops,) * len(each.collectives))
        for place, each in by_edges.items()
        if place in sizes
    }
    whole = {*kernel, *places} - {*kernels, *free}
    whole |= {"o"} if groups != 1 and transposed else set()
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
        windows=frozenset(places) & sizes.keys(),
    )


def _convolution_edges(call: OpCall, places: list[str]) -> tuple[dict[str, Kernel], list[str]]:
    """Return the kernels that split places, and the places that need none, as windows of one
    element do not.
    """
    x, weight = call.operands[:2]
    spatial, transposed = len(places), "transpose" in call.node.target
    at_dilation = 7 if transposed else 5
    strides = _numbers(call.argument(3, "stride", 1), spatial)
    dilations = _numbers(call.argument(at_dilation, "dilation", 1), spatial)
    padding = call.argument(4, "padding", 0)
    borders = [0] * spatial if isinstance(padding, str) else _numbers(padding, spatial)
    kernels, free = {}, []
    for at, place in enumerate(places):
        widths = weight.shape[2 + at], strides[at], dilations[at]
        if x.shape[at - spatial] == 1 or not all(isinstance(each, int) for each in widths):
            continue
        reach = (hint(widths[0]) - 1) * hint(dilations[at])
        if not reach and strides[at] == 1 and not borders[at] and not transposed:
            free.append(place)
            continue
        # Of a transposed convolution, an input adds to `reach` results, `stride` for each input.
        rows = -(-reach // hint(strides[at])) if transposed else reach
        arguments = (("at", at), ("transposed", True)) if transposed else (("at", at),)
        kernels[place] = _edge_kernel("convolution_edges", x, at - spatial, rows, arguments)
    return kernels, free


def _numbers(given: Any, count: int) -> list[Any]:
    """Return an option of an op for each dim that its windows run over."""
    numbers = list(given) if isinstance(given, tuple | list) else [given]
    return numbers * count if len(numbers) == 1 else numbers


def _edge_kernel(
    name: str, x: Value, dim: int, rows: int, arguments: tuple[tuple[str, Any], ...]
) -> Kernel:
    """Return a kernel that sends edges to the neighbours: in all so many rows of a dim.

    The part is written anew with its edges, and so are gradients.
    """
    whole = numel_hint(x.shape) * x.dtype.itemsize
    edges = whole // max(hint(x.shape[dim]), 1) * rows
    times = 2 if x.requires_grad else 1
    return Kernel(
        name,
        Partial(),
        ((Collective.EDGE_EXCHANGE, edges),) * times if edges else (),
        arguments,
        wraps=True,
        moved=2 * whole,
        alone=True,
    )


def _leading(call: OpCall, linear: bool, kernels: Kernels | None = None) -> ShardingRule:
    """Return a rule with a loop for each dim before the windows; those that the windows run over
    have one where a kernel splits them.

    linear: in the operand. kernels: by the number of the dim that the windows run over.
    """
    spatial, by_dim = _spatial(call.node.target), kernels or {}
    count = len(call.operands[0].shape) - spatial
    names = " ".join([f"d{index}" for index in range(count)])
    windows = " ".join([f"s{at}" if at in by_dim else "1" for at in range(spatial)])
    # Of sizes that differ, that of the result is the loop's.
    rule = ShardingRule.parse(
        f"{names} {windows} -> " + ", ".join([f"{names} {windows}"] * len(call.results)),
        call,
        linear=[{0}] if linear else [],
        kernels={f"s{at}": kernel for at, kernel in by_dim.items()},
    )
    sizes = {f"s{at}": call.results[0].shape[at - spatial] for at in by_dim}
    return replace(rule, sizes={**rule.sizes, **sizes})


def _pool_kernels(call: OpCall, kind: str) -> Kernels:
    """Return the kernels that split dims of a pool: none where windows may hang over the end, or
    where what is padded does not count.
    """
    x, spatial = call.operands[0], _spatial(call.node.target)
    # The pools of the average have no dilation, and say whether what is padded counts.
    at_ceil = 5 if kind == "max" else 4
    kernel = _numbers(call.argument(1, "kernel_size"), spatial)
    padding = _numbers(call.argument(3, "padding", 0), spatial)
    dilation = _numbers(call.argument(4, "dilation", 1) if kind == "max" else 1, spatial)
    counted = kind == "max" or call.argument(5, "count_include_pad", True) or not any(padding)
    if call.argument(at_ceil, "ceil_mode", False) or not counted or call.node.kwargs:
        return {}
    result, kernels = call.results[0], {}
    for at in range(spatial):
        long = x.shape[at - spatial] != 1 and result.shape[at - spatial] != 1
        if long and all(isinstance(each, int) for each in (kernel[at], dilation[at])):
            rows = (kernel[at] - 1) * dilation[at]
            arguments = (("at", at), ("spatial", spatial), ("kind", kind))
            kernels[at] = _edge_kernel("pool_edges", x, at - spatial, rows, arguments)
    return kernels


# Torch's names of resamplings by those of the ops, and how many elements on either side of one
# its results are made of.
_RESAMPLINGS = {
    "upsample_nearest": ("nearest", 0),
    "_upsample_nearest_exact": ("nearest-exact", 0),
    "upsample_linear": ("linear", 1),
    "upsample_bilinear": ("bilinear", 1),
    "upsample_trilinear": ("trilinear", 1),
    "upsample_bicubic": ("bicubic", 2),
}


def _factors(call: OpCall, scales: Any) -> tuple[int, ...]:
    """Return the whole numbers by which a resampling multiplies sizes; () where some are none.

    scales: as the op is given them, which then decide, and not the sizes: 2.05 makes 20 elements of
    10, but not each of them twice. Where the inputs decide the sizes, only they tell.
    """
    if isinstance(scales, tuple):
        whole = all(isinstance(scale, int | float) and scale == int(scale) for scale in scales)
        return tuple(int(scale) for scale in scales) if whole else ()
    factors, spatial = [], _spatial(call.node.target)
    for at in range(-spatial, 0):
        before, after = (value.shape[at] for value in (call.operands[0], call.results[0]))
        if not (isinstance(before, int) and isinstance(after, int)) or not before or after % before:
            return ()
        factors.append(after // before)
    return tuple(factors)


def _resample_kernels(call: OpCall) -> Kernels:
    """Return the kernels that split dims of a resampling by whole factors, whose ends are no places
    of their own (`align_corners`).
    """
    x, spatial = call.operands[0], _spatial(call.node.target)
    mode, reach = _RESAMPLINGS[re.split(r"[.]|\dd", call.node.target)[1]]
    between = "nearest" not in mode
    if between and call.argument(2, "align_corners"):
        return {}
    factors = _factors(call, call.argument(2 + between, "scale_factors"))
    kernels = {}
    for at, factor in enumerate(factors):
        repeats = mode != "nearest" or _is_repeated(factor)
        countable = hint(call.results[0].shape[at - spatial]) <= _COUNTABLE
        if x.shape[at - spatial] != 1 and factor and repeats and countable:
            arguments = (("at", at), ("factors", factors), ("reach", reach), ("mode", mode))
            kernels[at] = _edge_kernel("resample_edges", x, at - spatial, 2 * reach, arguments)
    return kernels


def _is_repeated(factor: int) -> bool:
    """Return whether torch repeats every element so often. It multiplies places by the reciprocal,
    in single precision: where that is less than it should be, some elements are repeated once more
    and the next ones once less, depending on their place in the whole.

    >>> _is_repeated(3), _is_repeated(41)
    (True, False)
    """
    return Fraction(float(np.float32(1 / factor))) * factor >= 1


@rule(*(f"aten.max_pool{n}d.default" for n in (1, 2, 3)), takes_empty=False)
def windows_max(call: OpCall) -> ShardingRule:
    """The largest number of each window, whose edges may lie on another rank."""
    return _leading(call, linear=False, kernels=_pool_kernels(call, "max"))


@rule(*(f"aten.avg_pool{n}d.default" for n in (1, 2, 3)), takes_empty=False)
def windows_mean(call: OpCall) -> ShardingRule:
    """The mean of each window, whose edges may lie on another rank."""
    return _leading(call, linear=True, kernels=_pool_kernels(call, "avg"))


@rule(
    *(f"aten.upsample_nearest{n}d.vec" for n in (1, 2, 3)),
    *(f"aten._upsample_nearest_exact{n}d.vec" for n in (1, 2, 3)),
    *(
        f"aten.upsample_{kind}.vec"
        for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    ),
    takes_empty=False,
)
def resampled(call: OpCall) -> ShardingRule:
    """Elements repeated along the last dims, or means of neighbours, linear in the operand."""
    return _leading(call, linear=True, kernels=_resample_kernels(call))


@rule(
    *(f"aten.adaptive_max_pool{n}d.default" for n in (1, 2, 3)),
    "aten.max_pool2d_with_indices.default",
    takes_empty=False,
)
def max_pool(call: OpCall) -> ShardingRule:
    """The largest number of each window: every batch entry and channel by itself,
    nothing linear.
    """
    return _leading(call, linear=False)


@rule(
    *(f"aten.adaptive_avg_pool{n}d.default" for n in (1, 2, 3)),
    *(f"aten._upsample_{kind}2d_aa.vec" for kind in ("bilinear", "bicubic")),
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
