"""Kernels that reduce over a split dim: softmax, maxima, batch statistics.

Each takes the op's own arguments, with local tensors, then `group` and the size of the whole dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from autoparallel.placement import part_bounds
from autoparallel.runtime.groups import Group

__all__ = [
    "amax_split",
    "amin_split",
    "argmax_split",
    "argmin_split",
    "batch_norm_split",
    "log_softmax_split",
    "logsumexp_split",
    "max_split",
    "min_split",
    "softmax_split",
]


def _highest(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """The maximum over all ranks' parts, with the dim kept."""
    if x.size(dim):
        own = x.amax(dim, keepdim=True)
    else:
        shape = list(x.shape)
        shape[dim] = 1
        own = x.new_full(shape, float("-inf") if x.is_floating_point() else _lowest(x.dtype))
    return group.all_reduce(own, "max")


def _lowest(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).min


class _Softmax(torch.autograd.Function):
    """exp(x) over its sum along a split dim, or the logarithm of that."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, log: bool, group: Group) -> torch.Tensor:
        shifted = x - _highest(x, dim, group)
        exponents = shifted.exp()
        total = group.all_reduce(exponents.sum(dim, keepdim=True))
        made = shifted - total.log() if log else exponents / total
        ctx.dim, ctx.log, ctx.group = dim, log, group
        ctx.save_for_backward(made)
        return made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (made,) = ctx.saved_tensors
        weighted = grad if ctx.log else grad * made
        total = ctx.group.all_reduce(weighted.sum(ctx.dim, keepdim=True))
        back = grad - made.exp() * total if ctx.log else weighted - made * total
        return back, None, None, None


def _as(x: torch.Tensor, dtype: torch.dtype | bool | None) -> torch.Tensor:
    """x in the type that the op is asked to compute in."""
    if isinstance(dtype, bool):
        return x.float() if dtype else x
    return x if dtype is None else x.to(dtype)


def softmax_split(
    x: torch.Tensor,
    dim: int,
    dtype: torch.dtype | bool | None = None,
    *,
    group: Group,
    size: int,
    log: bool = False,
) -> torch.Tensor:
    """Softmax along a split dim, or its logarithm."""
    made: torch.Tensor = _Softmax.apply(_as(x, dtype), dim, log, group)
    return made


log_softmax_split = partial(softmax_split, log=True)


class _LogSumExp(torch.autograd.Function):
    """log of the sum of exp(x) along a split dim, the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        highest = _highest(x, dim, group)
        highest = highest.masked_fill(highest.isinf(), 0)
        total = group.all_reduce((x - highest).exp().sum(dim, keepdim=True))
        made = total.log() + highest
        ctx.save_for_backward(x, made)
        return made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, made = ctx.saved_tensors
        return grad * (x - made).exp(), None, None


def _over_one(
    kernel: type[torch.autograd.Function],
    x: torch.Tensor,
    dims: int | list[int] | tuple[int, ...],
    keepdim: bool,
    group: Group,
) -> torch.Tensor:
    """A kernel that keeps the dim that it reduces, called as ops of several dims are."""
    dim = dims if isinstance(dims, int) else dims[0]
    made: torch.Tensor = kernel.apply(x, dim, group)
    return made if keepdim else made.squeeze(dim)


def logsumexp_split(
    x: torch.Tensor, dims: list[int], keepdim: bool = False, *, group: Group, size: int
) -> torch.Tensor:
    """Log-sum-exp over one split dim, the same on every rank."""
    return _over_one(_LogSumExp, x, dims, keepdim, group)


class _Extremes(torch.autograd.Function):
    """The maximum over a split dim; its gradient goes evenly to all elements that have it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        made = _highest(x, dim, group)
        ctx.save_for_backward(x, made)
        ctx.dim, ctx.group = dim, group
        return made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, made = ctx.saved_tensors
        chosen = (x == made).to(grad.dtype)
        count = ctx.group.all_reduce(chosen.sum(ctx.dim, keepdim=True))
        return grad * chosen / count, None, None


def amax_split(
    x: torch.Tensor, dims: list[int], keepdim: bool = False, *, group: Group, size: int
) -> torch.Tensor:
    """Maximum over one split dim, the same on every rank."""
    return _over_one(_Extremes, x, dims, keepdim, group)


def amin_split(
    x: torch.Tensor, dims: list[int], keepdim: bool = False, *, group: Group, size: int
) -> torch.Tensor:
    """Minimum over one split dim, the same on every rank."""
    return -amax_split(-x, dims, keepdim, group=group, size=size)


class _First(torch.autograd.Function):
    """The maximum over a split dim and the first place that has it, on every rank."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dim: int, group: Group, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        best = _highest(x, dim, group)
        start, _ = part_bounds(size, group.world_size, group.rank)
        shape = [1] * x.dim()
        shape[dim] = x.size(dim)
        places = torch.arange(start, start + x.size(dim), device=x.device).reshape(shape)
        found = (x == best) | (x.isnan() & best.isnan())
        places = torch.where(found, -places, -size)
        first = -_highest(places, dim, group)
        ctx.save_for_backward(found & (places == -first))
        ctx.mark_non_differentiable(first)
        return best, first

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
        (chosen,) = ctx.saved_tensors
        return grad * chosen, None, None, None


def max_split(
    x: torch.Tensor, dim: int, keepdim: bool = False, *, group: Group, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum over a split dim and its place in the whole, the same on every rank."""
    best, first = _First.apply(x, dim, group, size)
    return (best, first) if keepdim else (best.squeeze(dim), first.squeeze(dim))


def min_split(
    x: torch.Tensor, dim: int, keepdim: bool = False, *, group: Group, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum over a split dim and its place in the whole, the same on every rank."""
    best, first = max_split(-x, dim, keepdim, group=group, size=size)
    return -best, first


def argmax_split(
    x: torch.Tensor, dim: int, keepdim: bool = False, *, group: Group, size: int
) -> torch.Tensor:
    """Place of the maximum over a split dim, the same on every rank."""
    return max_split(x.detach(), dim, keepdim, group=group, size=size)[1]


def argmin_split(
    x: torch.Tensor, dim: int, keepdim: bool = False, *, group: Group, size: int
) -> torch.Tensor:
    """Place of the minimum over a split dim, the same on every rank."""
    return max_split(-x.detach(), dim, keepdim, group=group, size=size)[1]


class _BatchNorm(torch.autograd.Function):
    """Each channel less its mean, over its deviation, both of all ranks' parts.

    Returns the result without scale and offset, the mean, the biased variance and 1 / deviation.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, epsilon: float, group: Group
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        channels = x.size(1)
        count = x.numel() // channels
        own = x.sum(dims) / max(count, 1)
        spread = (x - own.reshape(shape)).square().sum(dims)
        packed = torch.cat([own, spread, own.new_full((1,), count)])
        rows = group.all_gather(packed)
        means, spreads, counts = rows.split([channels, channels, 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = (spreads + counts * (means - mean).square()).sum(0) / total
        inverse = (variance + epsilon).rsqrt()
        made = (x - mean.reshape(shape)) * inverse.reshape(shape)
        ctx.save_for_backward(made, inverse, total)
        ctx.dims, ctx.shape, ctx.group = dims, shape, group
        unbiased = variance * (total / (total - 1))
        ctx.mark_non_differentiable(mean, unbiased, inverse)
        return made, mean, unbiased, inverse

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        made, inverse, total = ctx.saved_tensors
        sums = torch.stack([grad.sum(ctx.dims), (grad * made).sum(ctx.dims)])
        even, along = (ctx.group.all_reduce(sums) / total).unbind(0)
        rest = grad - even.reshape(ctx.shape) - made * along.reshape(ctx.shape)
        return rest * inverse.reshape(ctx.shape), None, None


def batch_norm_split(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_variance: torch.Tensor | None,
    training: bool,
    momentum: float,
    epsilon: float,
    *,
    group: Group,
    size: int,
) -> tuple[torch.Tensor, ...]:
    """Batch norm of (b / n, c, ...) with the statistics of the whole batch.

    Returns the result, mean and 1 / deviation; and the new running mean and variance, if there are
    old ones. All but the result are the same on every rank.
    """
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    wide = torch.promote_types(x.dtype, torch.float32)
    made, mean, variance, inverse = _BatchNorm.apply(x.to(wide), epsilon, group)
    if weight is not None:
        made = made * weight.reshape(shape)
    if bias is not None:
        made = made + bias.reshape(shape)
    made = made.to(x.dtype)
    if running_mean is None or running_variance is None:
        return made, mean, inverse
    with torch.no_grad():
        new_mean = torch.lerp(running_mean, mean.to(running_mean.dtype), momentum)
        new_variance = torch.lerp(running_variance, variance.to(running_variance.dtype), momentum)
    return made, mean, inverse, new_mean, new_variance
