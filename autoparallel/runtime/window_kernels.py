"""Kernels of ops whose windows run over a split dim: each rank gets the edges of its neighbours.

A rank computes an equal part of the result. Which part of the input that takes follows from stride,
padding and dilation; what of it other ranks hold is sent (halo exchange). Beyond the ends of the
whole there are zeros, or what else the op pads with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from autoparallel.placement import part_bounds
from autoparallel.runtime.dealt_pieces import Deal, dealt
from autoparallel.runtime.groups import Group
from autoparallel.support.torch_private import nn_binding

__all__ = ["convolution_edges", "pool_edges", "resample_edges"]

Run = Callable[..., torch.Tensor]
# Not by its name, under which a program may have put another function.
_PAD: Run = nn_binding("pad")
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_POOLS: Mapping[str, tuple[Any, ...]] = {
    "max": (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d),
    "avg": (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
}


@dataclass(frozen=True, slots=True)
class _Reach:
    """The part of the input, and of the result, that belongs to one rank.

    result: the places that it computes. start, stop: of the input that this takes, which may lie
    beyond the ends of the whole.
    """

    result: tuple[int, int]
    start: int
    stop: int

    def inside(self, size: int) -> tuple[int, int]:
        """Return what of the input there is."""
        start = min(max(self.start, 0), size)
        return start, max(min(self.stop, size), start)


def _with_edges(
    x: torch.Tensor, group: Group, dim: int, size: int, reaches: Sequence[_Reach], fill: float
) -> torch.Tensor:
    """Return this rank's part of the input with all that it needs. Collective.

    size: of the whole dim. fill: the number that lies beyond its ends.
    """
    intervals = tuple((reach.inside(size),) for reach in reaches)
    x = dealt(x, group, Deal(dim, size, intervals))
    here = reaches[group.rank]
    first, last = intervals[group.rank][0]
    before = first - here.start if last > first else here.stop - here.start
    after = here.stop - last if last > first else 0
    if not before and not after:
        return x
    return _PAD(x, [0, 0] * (x.dim() - 1 - dim) + [before, after], value=fill)


def _numbers(given: Any, count: int, default: int) -> list[int]:
    """Return an option of an op for each dim that its windows run over."""
    some = [default] if given is None or given == [] or given == () else given
    numbers = [some] if isinstance(some, int) else list(some)
    return numbers * count if len(numbers) == 1 else numbers


def _bordered(
    padding: Any, kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Return what is padded before and after each dim, for a padding that may be a word."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [(width - 1) * step for width, step in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(each, each) for each in _numbers(padding, len(kernel), 0)]


def _windows(
    count: int, ranks: int, width: int, stride: int, step: int, before: int
) -> list[_Reach]:
    """Return what each rank needs for its part of `count` windows.

    width: of a window, with `step` between its elements. before: what is padded in front.
    """
    reaches = []
    for rank in range(ranks):
        first, last = part_bounds(count, ranks, rank)
        start = first * stride - before
        # A rank without windows computes one, which is cut off.
        windows = max(last - first, 1)
        reaches.append(
            _Reach((first, last), start, start + (windows - 1) * stride + (width - 1) * step + 1)
        )
    return reaches


def convolution_edges(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *options: Any,
    group: Group,
    size: int,
    at: int,
    transposed: bool = False,
    run: Run | None = None,
    **more: Any,
) -> torch.Tensor:
    """Convolve along a split dim.

    x: (.., c, *spatial), of which spatial dim number `at` is split, whose whole size is `size`.
    options, more: the op's other arguments. run: the op on its part, where an axis further in
    splits it too; by default the op itself.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> x, weight = torch.arange(4.0).reshape(1, 4), torch.ones(1, 1, 3)
    >>> convolution_edges(x, weight, padding=1, group=SingleGroup(), size=4, at=0)
    tensor([[1., 3., 6., 5.]])
    """
    count = weight.dim() - 2
    kernel = list(weight.shape[2:])
    names: tuple[str, ...] = ("stride", "padding", "dilation", "groups")
    if transposed:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    given = {**dict(zip(names, options, strict=False)), **more}
    stride, dilation = (_numbers(given.get(name), count, 1) for name in ("stride", "dilation"))
    groups = given.get("groups", 1)
    dim = x.dim() - count + at
    if transposed:
        padding, extra = (
            _numbers(given.get(name), count, 0) for name in ("padding", "output_padding")
        )
        span = (kernel[at] - 1) * dilation[at]
        length = (size - 1) * stride[at] - 2 * padding[at] + span + extra[at] + 1
        reaches = _spread(length, group.world_size, span, stride[at], padding[at])
        first, last = reaches[group.rank].result
        cut = first + padding[at] - reaches[group.rank].start * stride[at]
        x = _with_edges(x, group, dim, size, reaches, 0.0)
        padding[at] = extra[at] = 0
        convolve = run or _TRANSPOSED[count - 1]
        y = convolve(x, weight, bias, stride, padding, extra, groups, dilation)
        return y.narrow(y.dim() - count + at, cut, last - first)
    borders = _bordered(given.get("padding", 0), kernel, dilation)
    windows = size + sum(borders[at]) - (kernel[at] - 1) * dilation[at] - 1
    reaches = _windows(
        windows // stride[at] + 1,
        group.world_size,
        kernel[at],
        stride[at],
        dilation[at],
        borders[at][0],
    )
    x = _with_edges(x, group, dim, size, reaches, 0.0)
    borders[at] = (0, 0)
    if any(before != after for before, after in borders):
        x = _PAD(x, [each for border in reversed(borders) for each in border])
        borders = [(0, 0)] * count
    y = (run or _CONVOLUTIONS[count - 1])(
        x, weight, bias, stride, [before for before, _ in borders], dilation, groups
    )
    first, last = reaches[group.rank].result
    return y.narrow(y.dim() - count + at, 0, last - first)


def _spread(count: int, ranks: int, span: int, stride: int, before: int) -> list[_Reach]:
    """Return what each rank needs for its part of `count` results of a transposed convolution.

    span: from the first to the last result that an input adds to. before: the results cut off in
    front. Inputs are taken so far that their results cover the part, by all ranks as many, so that
    none holds more than the first.
    """
    reaches = []
    for rank in range(ranks):
        first, last = part_bounds(count, ranks, rank)
        start, stop = first + before, max(last, first + 1) - 1 + before
        reaches.append(
            _Reach(
                (first, last),
                min(-((span - start) // stride), start // stride),
                max(stop // stride, -((span - stop) // stride)) + 1,
            )
        )
    most = max(reach.stop - reach.start for reach in reaches)
    return [_Reach(reach.result, reach.start, reach.start + most) for reach in reaches]


def pool_edges(
    x: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    *options: Any,
    group: Group,
    size: int,
    at: int,
    spatial: int,
    kind: str,
    run: Run | None = None,
) -> torch.Tensor:
    """Pool along a split dim: `kind` is "max" or "avg".

    x: of which dim number `at` of the last `spatial` ones is split, whose whole size is `size`.
    options: the op's other arguments: of a maximum, its dilation. run: as in `convolution_edges`.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> x, whole = torch.arange(4.0).reshape(1, 4), {"group": SingleGroup(), "size": 4}
    >>> pool_edges(x, 2, at=0, spatial=1, kind="max", **whole)
    tensor([[1., 3.]])
    """
    kernel = _numbers(kernel_size, spatial, 1)
    steps = kernel if stride is None or stride in ([], ()) else _numbers(stride, spatial, 1)
    borders = _numbers(padding, spatial, 0)
    dilation = _numbers(options[0] if options else None, spatial, 1) if kind == "max" else [1] * 3
    length = size + 2 * borders[at] - (kernel[at] - 1) * dilation[at] - 1
    reaches = _windows(
        length // steps[at] + 1,
        group.world_size,
        kernel[at],
        steps[at],
        dilation[at],
        borders[at],
    )
    fill = -torch.inf if kind == "max" else 0.0
    dim = x.dim() - spatial + at
    x = _with_edges(x, group, dim, size, reaches, fill)
    borders = [0 if index == at else border for index, border in enumerate(borders)]
    pool: Run = run or _POOLS[kind][spatial - 1]
    y = pool(x, kernel, steps, borders, *options)
    first, last = reaches[group.rank].result
    return y.narrow(dim, 0, last - first)


def resample_edges(
    x: torch.Tensor,
    *options: Any,
    group: Group,
    size: int,
    at: int,
    factors: tuple[int, ...],
    reach: int,
    mode: str,
    run: Run | None = None,
) -> torch.Tensor:
    """Resample to whole multiples of sizes, along dims of which one is split.

    x: (b, c, *spatial), of which spatial dim number `at` is split, whose whole size is `size`.
    factors: how many results each element has, along each dim. reach: the elements on either side
    of it that its results are made of; beyond the ends, the op repeats the last one. mode: torch's
    name of it. options: the op's own, which say no more. run: as in `convolution_edges`.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> options = {"at": 0, "factors": (2,), "reach": 0, "mode": "nearest"}
    >>> resample_edges(torch.ones(1, 1, 2), None, None, group=SingleGroup(), size=2, **options)
    tensor([[[1., 1., 1., 1.]]])
    """
    factor, dim, count = factors[at], at + 2, size * factors[at]
    reaches = []
    for rank in range(group.world_size):
        first, last = part_bounds(count, group.world_size, rank)
        # A rank without results computes some, which are cut off.
        start = min(first, count - 1) // factor - reach
        stop = (max(last, 1) - 1) // factor + 1 + reach
        reaches.append(_Reach((first, last), max(start, 0), min(stop, size)))
    x = _with_edges(x, group, dim, size, reaches, 0.0)
    if run is None:
        scales = [float(each) for each in factors]
        y = functional.interpolate(x, scale_factor=scales, mode=mode)
    else:
        y = run(x, *options)
    here = reaches[group.rank]
    first, last = here.result
    return y.narrow(dim, first - here.start * factor, last - first)
