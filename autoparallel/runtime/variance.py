"""The kernel of variances over a split dim: two sums over the ranks, the mean and the squares."""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.placement import Invariant, Partial
from autoparallel.runtime.collectives import convert, for_parts, pending_sum
from autoparallel.runtime.groups import Group

__all__ = ["variance_split"]


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
    # Sums of half precision would lose what torch keeps: it adds in single precision.
    exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
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


def _sum(x: torch.Tensor, dims: tuple[int, ...], group: Group) -> torch.Tensor:
    """Return the sum over some dims and all ranks, the same on every rank; the dims have size 1."""
    return convert(pending_sum(x.sum(dims, keepdim=True), group), group, Partial(), Invariant())
