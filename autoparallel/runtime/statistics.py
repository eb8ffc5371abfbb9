"""Kernels that reduce over a split dim: softmax, maxima, batch statistics.

Each takes the op's own arguments, with this rank's tensors, then `group`, the ranks that split the
dim, and `size`, its size in the whole. Each is an autograd function of its own, because a sum over
the ranks takes part in most of their backward passes too. Their backward passes are written in
differentiable pieces: they read results (not values on the way), and communicate by conversions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from autoparallel.placement import part_bounds
from autoparallel.runtime.collectives import common_sum, for_parts
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


def _highest(x: torch.Tensor, dim: int | tuple[int, ...], group: Group) -> torch.Tensor:
    """Return the maximum over all ranks' parts, with the dims kept at size 1."""
    if x.dtype == torch.bool:  # of which no collective knows the maximum
        return _highest(x.to(torch.uint8), dim, group).bool()
    dims = (dim,) if isinstance(dim, int) else dim
    if all(x.size(each) for each in dims):
        highest_here = x.amax(dim, keepdim=True)
    else:
        # A rank without elements brings the neutral element of the maximum.
        shape = list(x.shape)
        for each in dims:
            shape[each] = 1
        highest_here = x.new_full(
            shape, float("-inf") if x.is_floating_point() else _lowest(x.dtype)
        )
    return group.all_reduce(highest_here, "max")


def _reversed(x: torch.Tensor) -> torch.Tensor:
    """Return numbers in the opposite order, from which the same function gives the old ones back.

    The negative of an integer may be itself (the least one), or large (unsigned ones).
    """
    return -x if x.is_floating_point() else x.bitwise_not()


def _lowest(dtype: torch.dtype) -> int:
    """Return the least number of an integer type."""
    return torch.iinfo(dtype).min


class _Softmax(torch.autograd.Function):
    """The softmax along a split dim, or its logarithm."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, log: bool, group: Group) -> torch.Tensor:
        """Return this rank's part of exp(x) over its sum, or of the logarithm of that."""
        # Less the maximum of all ranks, no exponential overflows; the result does not change.
        shifted = x - _highest(x, dim, group)
        exponents = shifted.exp()
        total = group.all_reduce(exponents.sum(dim, keepdim=True))
        result = shifted - total.log() if log else exponents / total
        ctx.dim, ctx.log, ctx.group = dim, log, group
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Return s (g - sum(s g)) for a softmax s, and g - s sum(g) for its logarithm; sums are
        over ranks too.
        """
        (result,) = ctx.saved_tensors
        weighted = grad if ctx.log else grad * result
        total = common_sum(weighted.sum(ctx.dim, keepdim=True), ctx.group)
        back = grad - result.exp() * total if ctx.log else weighted - result * total
        return back, None, None, None


def _as(x: torch.Tensor, dtype: torch.dtype | bool | None) -> torch.Tensor:
    """Return x in the type that the op is asked to compute in.

    dtype: a type, None for x's own, or aten's _softmax's half_to_float, which means float32.
    """
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
    """Return this rank's part of the softmax along a split dim, or of its logarithm.

    x: split along `dim`. dtype: to compute in, as torch's softmax takes it, or half_to_float, as
    aten's _softmax does. Two all-reduces forward and one backward, each as large as x without the
    dim.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> softmax_split(torch.zeros(4), 0, group=SingleGroup(), size=4)
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    result: torch.Tensor = _Softmax.apply(_as(x, dtype), dim, log, group)
    return result


log_softmax_split = partial(softmax_split, log=True)


class _LogSumExp(torch.autograd.Function):
    """The logarithm of the sum of exp(x) along dims of which one is split, alike on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dims: tuple[int, ...], group: Group) -> torch.Tensor:
        """Return the log-sum-exp of all ranks' parts."""
        highest = _highest(x, dims, group)
        # Where all are -inf, or one is inf, x - highest would be nan; 0 gives -inf or inf, as torch
        # does.
        highest = highest.masked_fill(highest.isinf(), 0)
        total = group.all_reduce((x - highest).exp().sum(dims, keepdim=True))
        result = total.log() + highest
        ctx.save_for_backward(x, result)
        ctx.group = group
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Return softmax(x) times the gradient, of this rank's part."""
        x, result = ctx.saved_tensors
        grad, result = for_parts(grad, ctx.group), for_parts(result, ctx.group)
        return grad * (x - result).exp(), None, None


def _over(
    kernel: type[torch.autograd.Function],
    x: torch.Tensor,
    dims: int | Sequence[int],
    keepdim: bool,
    group: Group,
) -> torch.Tensor:
    """Run a kernel that keeps the dims that it reduces, called as an op of several dims; of none
    means of all.
    """
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    over = given or tuple(range(x.dim()))
    result: torch.Tensor = kernel.apply(x, over, group)
    return result if keepdim else result.squeeze(over)


def logsumexp_split(
    x: torch.Tensor, dims: list[int], keepdim: bool = False, *, group: Group, size: int
) -> torch.Tensor:
    """Return the log-sum-exp over dims of which one is split, the same on every rank.

    x: split along one of the dims. keepdim: whether they stay, with size 1.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> logsumexp_split(torch.zeros(2, 1), [0], group=SingleGroup(), size=2)
    tensor([0.6931])
    """
    return _over(_LogSumExp, x, dims, keepdim, group)


class _Extremes(torch.autograd.Function):
    """The maximum over dims of which one is split, whose gradient goes evenly to all elements that
    have it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dims: tuple[int, ...], group: Group) -> torch.Tensor:
        """Return the maximum of all ranks' parts."""
        highest = _highest(x, dims, group)
        ctx.save_for_backward(x, highest)
        ctx.dims, ctx.group = dims, group
        return highest

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Divide the gradient by the number of elements, on all ranks, that have the maximum."""
        x, highest = ctx.saved_tensors
        chosen = (x == highest).to(grad.dtype)
        count = ctx.group.all_reduce(chosen.sum(ctx.dims, keepdim=True))
        return for_parts(grad, ctx.group) * chosen / count, None, None


def amax_split(
    x: torch.Tensor, dims: Sequence[int] = (), keepdim: bool = False, *, group: Group, size: int
) -> torch.Tensor:
    """Return the maximum over dims of which one is split, the same on every rank.

    x: split along one of the dims. dims: none for all. keepdim: whether they stay, with size 1. The
    gradient goes evenly to all elements that have the maximum, as torch.amax's does.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> amax_split(torch.tensor([1.0, 3.0]), [0], group=SingleGroup(), size=2)
    tensor(3.)
    """
    return _over(_Extremes, x, dims, keepdim, group)


def amin_split(
    x: torch.Tensor, dims: Sequence[int] = (), keepdim: bool = False, *, group: Group, size: int
) -> torch.Tensor:
    """Return the minimum over dims of which one is split, the same on every rank. The arguments are
    `amax_split`'s.
    """
    return _reversed(amax_split(_reversed(x), dims, keepdim, group=group, size=size))


class _First(torch.autograd.Function):
    """The maximum over a split dim and the first place that has it, the same on every rank."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dim: int, group: Group, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the maximum and its place, counted from the start of the whole."""
        best = _highest(x, dim, group)
        start, _ = part_bounds(size, group.world_size, group.rank)
        shape = [1] * x.dim()
        shape[dim] = x.size(dim)
        places = torch.arange(start, start + x.size(dim), device=x.device).reshape(shape)
        has_best = (x == best) | (x.isnan() & best.isnan())
        # The first place is found as the maximum of -place; -size is below that of every place. A
        # nan is the maximum where there is one, as in torch.
        places = torch.where(has_best, -places, -size)
        first = -_highest(places, dim, group)
        ctx.save_for_backward(has_best & (places == -first))
        ctx.group = group
        ctx.mark_non_differentiable(first)
        return best, first

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
        """Give the gradient to the one element that was chosen."""
        (chosen,) = ctx.saved_tensors
        return for_parts(grad, ctx.group) * chosen, None, None, None


def max_split(
    x: torch.Tensor, dim: int, keepdim: bool = False, *, group: Group, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maximum over a split dim and its place in the whole, the same on every rank.

    x: split along `dim`, whose whole size is `size`. keepdim: whether the dim stays, with size 1.
    Of equal elements the first one counts, and alone gets the gradient.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> max_split(torch.tensor([1.0, 3.0, 3.0]), 0, group=SingleGroup(), size=3)
    (tensor(3.), tensor(1))
    """
    best, first = _First.apply(x, dim, group, size)
    return (best, first) if keepdim else (best.squeeze(dim), first.squeeze(dim))


def min_split(
    x: torch.Tensor, dim: int, keepdim: bool = False, *, group: Group, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the minimum over a split dim and its place in the whole, as `max_split` does the
    maximum.
    """
    best, first = max_split(_reversed(x), dim, keepdim, group=group, size=size)
    return _reversed(best), first


def argmax_split(
    x: torch.Tensor, dim: int | None = None, keepdim: bool = False, *, group: Group, size: int
) -> torch.Tensor:
    """Return the place of the maximum over a split dim, as `max_split` does. It has no gradient.

    dim: None for the one dim of a vector.
    """
    return max_split(x.detach(), dim or 0, keepdim, group=group, size=size)[1]


def argmin_split(
    x: torch.Tensor, dim: int | None = None, keepdim: bool = False, *, group: Group, size: int
) -> torch.Tensor:
    """Return the place of the minimum over a split dim, as `argmax_split` does the maximum's."""
    return max_split(_reversed(x.detach()), dim or 0, keepdim, group=group, size=size)[1]


class _BatchNorm(torch.autograd.Function):
    """Each channel less its mean, over its deviation, both of all ranks' parts."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, epsilon: float, group: Group
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the result without scale and offset, the mean, the unbiased variance and 1 /
        deviation.

        x: (b / n, c, ...). The latter three are (c,) and the same on every rank.
        """
        dims = [dim for dim in range(x.dim()) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        channels = x.size(1)
        count = x.numel() // channels
        mean_here = x.sum(dims) / max(count, 1)
        squares_here = (x - mean_here.reshape(shape)).square().sum(dims)
        # Parts may be unequal or empty: every rank brings its mean, its sum of squares about that
        # mean, and its count; they are combined as in Chan et al. 1979, without cancellation.
        packed = torch.cat([mean_here, squares_here, mean_here.new_full((1,), count)])
        gathered = group.all_gather(packed)
        means, squares, counts = gathered.split([channels, channels, 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        inverse = (variance + epsilon).rsqrt()
        normalized = (x - mean.reshape(shape)) * inverse.reshape(shape)
        ctx.save_for_backward(normalized, inverse, total)
        ctx.dims, ctx.shape, ctx.group = dims, shape, group
        # Running statistics take the variance over n - 1.
        unbiased = variance * (total / (total - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        ctx.set_materialize_grads(False)
        return normalized, mean, unbiased, inverse

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, _: Any, __: Any, grad_inverse: torch.Tensor | None
    ) -> Any:
        """Return (g - mean(g) - x mean(g x)) / deviation, x being the normalized input and means
        over all ranks.

        A gradient of 1 / deviation comes only where this backward pass, which reads it, is
        differentiated: d (1 / deviation) is -(1 / deviation)^2 mean(x dx).
        """
        normalized, inverse, total = ctx.saved_tensors
        inverse = for_parts(inverse, ctx.group).reshape(ctx.shape)
        back = None
        if grad is not None:
            sums = torch.stack([grad.sum(ctx.dims), (grad * normalized).sum(ctx.dims)])
            means = (common_sum(sums, ctx.group) / total).unbind(0)
            mean_grad, mean_projection = (mean.reshape(ctx.shape) for mean in means)
            back = (grad - mean_grad - normalized * mean_projection) * inverse
        if grad_inverse is not None:
            share = for_parts(grad_inverse, ctx.group).reshape(ctx.shape) / total
            through = -share * inverse.square() * normalized
            back = through if back is None else back + through
        return back, None, None


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
    """Normalize (b / n, c, ...) with the statistics of the whole batch, which is split over the
    ranks.

    weight, bias, running_mean, running_variance: (c,), whole, or None. training: not read, as the
    kernel computes as in training. momentum: the share of the new statistics in the running ones.
    Returns the result, mean and 1 / deviation; and the new running mean and variance, if there are
    old ones. All but the result are the same on every rank.
    """
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    # As torch does, half-precision inputs are normalized in float32.
    wide = torch.promote_types(x.dtype, torch.float32)
    result, mean, variance, inverse = _BatchNorm.apply(x.to(wide), epsilon, group)
    inverse = inverse.detach()  # a statistic, through which no gradient flows in torch either
    if weight is not None:
        result = result * weight.reshape(shape)
    if bias is not None:
        result = result + bias.reshape(shape)
    result = result.to(x.dtype)
    if running_mean is None or running_variance is None:
        return result, mean, inverse
    with torch.no_grad():
        new_mean = torch.lerp(running_mean, mean.to(running_mean.dtype), momentum)
        new_variance = torch.lerp(running_variance, variance.to(running_variance.dtype), momentum)
    return result, mean, inverse, new_mean, new_variance
