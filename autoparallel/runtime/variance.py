"""Kernels of variances over a split dim, and of norms by them: two sums over the ranks, those of
the numbers and of their squares about the mean. A root mean square norm has one, of the squares.
"""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.placement import Invariant, Partial
from autoparallel.runtime.collectives import convert, for_parts, pending_sum
from autoparallel.runtime.groups import Group

__all__ = ["group_norm_split", "instance_norm_split", "rms_norm_split", "variance_split"]


def variance_split(
    x: torch.Tensor,
    *_: Any,
    group: Group,
    size: int,
    split: int,
    dims: tuple[int, ...],
    less: float,
    keep: bool,
    root: bool,
    with_mean: bool,
    **__: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the variance over dims of which one is split, the same on every rank.

    x: split along the dim `split`, whose whole size is `size`. dims: all that are reduced.
    less: what is taken off the count. keep: whether the dims stay, with size 1. root:
    whether the standard deviation is asked for. with_mean: whether the mean is returned too. The
    op's own arguments, which its overloads have in different places, are not read.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> options = {"less": 1, "keep": False, "root": False, "with_mean": False}
    >>> x = torch.tensor([1.0, 2.0, 3.0])
    >>> variance_split(x, group=SingleGroup(), size=3, split=0, dims=(0,), **options)
    tensor(1.)
    """
    exact = _exact(x)
    count = size
    for dim in dims:
        if dim != split:
            count *= x.size(dim)
    mean = _sum(exact, dims, group) / count
    # Every rank's part is compared with the mean of all: the squares lose nothing by cancellation,
    # as the difference of two sums of squares would.
    squares = (exact - for_parts(mean, group)).square()
    # A count that is not positive gives inf or nan, as in torch.
    result = _sum(squares, dims, group) / max(count - less, 0)
    if root:
        # As in torch, where all numbers are equal the gradient is 0, and not that of a root at 0.
        flat = result == 0
        result = result.masked_fill(flat, 1).sqrt().masked_fill(flat, 0)
    if not keep:
        result, mean = result.squeeze(dims), mean.squeeze(dims)
    return (result.to(x.dtype), mean.to(x.dtype)) if with_mean else result.to(x.dtype)


def group_norm_split(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    group: Group,
    size: int,
    channels: int,
    split: int = 1,
    **__: Any,
) -> torch.Tensor:
    """Normalize groups of channels of which each rank has a part: of the channels of every group,
    or of the places of every channel.

    x: (b, g c, ...), of which the dim `split` is split. groups: not read, as the rank may have a
    part of them. weight, bias: a number for each channel that is here, or None. size: of the split
    dim in the whole. channels: c, those of a group.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> x = torch.tensor([[1.0, -1.0]])
    >>> group_norm_split(x, 1, group=SingleGroup(), size=2, channels=2, eps=0.0)
    tensor([[ 1., -1.]])
    """
    rest = [x.size(dim) for dim in range(2, x.dim()) if dim != split]
    count = channels * torch.Size(rest).numel() * (1 if split == 1 else size)
    groups_here = (size if split == 1 else x.size(1)) // channels
    return _normalized(x, groups_here, count, (weight, bias), eps, group)


def instance_norm_split(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: None,
    running_variance: None,
    training: bool,
    momentum: float,
    epsilon: float,
    *_: Any,
    group: Group,
    size: int,
    split: int,
) -> torch.Tensor:
    """Normalize each channel of (b, c, ...) over the other dims, of which `split` is split.

    weight, bias: (c,), or None. size: of the split dim in the whole. There are no running
    statistics, and the kernel computes as in training.
    """
    rest = [x.size(dim) for dim in range(2, x.dim()) if dim != split]
    count = size * torch.Size(rest).numel()
    return _normalized(x, x.size(1), count, (weight, bias), epsilon, group)


def rms_norm_split(
    x: torch.Tensor,
    shape: Any,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    group: Group,
    size: int,
) -> torch.Tensor:
    """Divide rows, of which each rank has a part, by the root of the mean of their squares.

    x: (..., n / ranks), with n = size in the whole. shape: not read. weight: (n / ranks,), or None.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> rms_norm_split(torch.tensor([[1.0, 7.0]]), (2,), group=SingleGroup(), size=2, eps=0.0)
    tensor([[0.2000, 1.4000]])
    """
    exact = _exact(x)
    eps = torch.finfo(exact.dtype).eps if eps is None else eps
    mean = _sum(exact.square(), (-1,), group) / size
    result = exact * for_parts((mean + eps).rsqrt(), group)
    return (result if weight is None else result * weight).to(x.dtype)


def _normalized(
    x: torch.Tensor,
    groups: int,
    count: int,
    affine: tuple[torch.Tensor | None, torch.Tensor | None],
    epsilon: float,
    group: Group,
) -> torch.Tensor:
    """Return x less the mean of its group, over the deviation, times a weight, plus a bias.

    groups: of channels of this rank's x. count: elements of a group on all ranks. affine: weight
    and bias of each channel here.
    """
    rows = _exact(x).reshape(x.size(0), groups, x[:1].numel() // max(groups, 1))
    centred = rows - for_parts(_sum(rows, (2,), group) / count, group)
    variance = _sum(centred.square(), (2,), group) / count
    result = (centred * for_parts((variance + epsilon).rsqrt(), group)).reshape(x.shape)
    shape = [-1] + [1] * (x.dim() - 2)
    weight, bias = (None if each is None else each.reshape(shape) for each in affine)
    result = result if weight is None else result * weight
    return (result if bias is None else result + bias).to(x.dtype)


def _exact(x: torch.Tensor) -> torch.Tensor:
    """Return x in at least single precision, in which torch adds up numbers of half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sum(x: torch.Tensor, dims: tuple[int, ...], group: Group) -> torch.Tensor:
    """Return the sum over some dims and all ranks, the same on every rank; the dims have size 1."""
    return convert(pending_sum(x.sum(dims, keepdim=True), group), group, Partial(), Invariant())
