"""Decompositions applied while tracing.

Two sources. Torch defines many ops by others (`hstack` by `cat`, `lstm_cell` by `linear`): those
that nobody wrote a rule for are traced as torch defines them (decompose.py). And some, written out
here and in loss_decompositions.py, hide a count or a sum that must be seen to be split: a mean
divides by the count of all ranks, and a bias counts once, however the sum that it is added to is
split.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from autoparallel.capture.decomposition_registry import decomposition

__all__: list[str] = []


def _plus(bias: torch.Tensor, product: torch.Tensor, beta: Any, alpha: Any) -> torch.Tensor:
    """Return beta * bias + alpha * product; a beta of 0 ignores even a bias of nan."""
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    return product + (bias if beta == 1 else bias * beta)


@decomposition("aten.addmm.default")
def addmm(bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """beta * bias + alpha * left @ right, where either factor is not 1.

    A plain one is kept: a pass of its own (split_bias) finds the dims that were flattened for it.
    """
    if beta == 1 and alpha == 1:
        return NotImplemented
    return _plus(bias, left @ right, beta, alpha)


@decomposition("aten.addmv.default")
def addmv(bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """beta * bias + alpha * left @ right, the bias counted once however the product is split."""
    return _plus(bias, left @ right, beta, alpha)


@decomposition("aten.addbmm.default")
def addbmm(bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """beta * bias + alpha * sum_b left[b] @ right[b], the bias counted once."""
    return _plus(bias, torch.bmm(left, right).sum(0), beta, alpha)


@decomposition("aten.addr.default")
def addr(bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """beta * bias + alpha * outer(left, right), the bias counted once."""
    return _plus(bias, torch.outer(left, right), beta, alpha)


_aten: Any = torch.ops.aten


@decomposition("aten.bilinear.default")
def bilinear(left: Any, right: Any, weight: Any, bias: Any = None) -> Any:
    """y[.., n] = sum_(i, j) a[.., i] w[n, i, j] b[.., j] + bias[n], the bias counted once."""
    product = torch.einsum("...i,nij,...j->...n", left, weight, right)
    return product if bias is None else product + bias


@decomposition("aten.scatter.reduce", "aten.scatter.value_reduce")
def scatter(x: Any, dim: int, index: Any, source: Any, *, reduce: str) -> Any:
    """`scatter_reduce`, which has a rule, under the name that it has for the reduction."""
    if not isinstance(source, torch.Tensor):
        source = torch.full_like(index, source, dtype=x.dtype)
    reduction = {"add": "sum", "multiply": "prod"}[reduce]
    return x.scatter_reduce(dim, index, source, reduction)


@decomposition("aten.empty_like.default")
def empty_like(x: Any, **options: Any) -> Any:
    """Zeros: the numbers in fresh memory would differ from rank to rank."""
    return torch.zeros_like(x, **options)


@decomposition("aten.empty.memory_format")
def empty(size: Any, **options: Any) -> Any:
    """Zeros, for the reason given at empty_like."""
    options.pop("memory_format", None)
    return torch.zeros(size, **options)


@decomposition("aten.new_empty.default")
def new_empty(x: Any, size: Any, **options: Any) -> Any:
    """Zeros, for the reason given at empty_like."""
    return x.new_zeros(size, **options)


@decomposition("aten.empty_strided.default", "aten.empty_permuted.default")
def empty_in_order(size: Any, order: Any, **options: Any) -> Any:
    """Zeros, for the reason given at empty_like; parts of a tensor have strides of their own."""
    return torch.zeros(size, **options)


@decomposition("aten.new_empty_strided.default")
def new_empty_in_order(x: Any, size: Any, order: Any, **options: Any) -> Any:
    """Zeros, as of empty_in_order."""
    return x.new_zeros(size, **options)


# The values of `mode` in aten; 2, a maximum, is kept.
_BAG_SUM, _BAG_MEAN = 0, 1


@decomposition("aten.embedding_bag.default", "aten.embedding_bag.padding_idx")
def embedding_bag(
    table: Any,
    index: Any,
    offsets: Any,
    scaled: bool = False,
    mode: int = _BAG_SUM,
    sparse: bool = False,
    weights: Any = None,
    last: bool = False,
    padding: int | None = None,
) -> Any:
    """Rows that are looked up, and added to the bag that each belongs to.

    table: [rows, features]. index: [entries], rows of the table. offsets: [bags], where each bag
    begins among the entries. last: whether the last offset only says where the last bag ends.
    padding: a row that does not count. Returns (sums or means, bag of each entry, entries of each
    bag, positions of maxima, which are none).
    """
    if mode not in (_BAG_SUM, _BAG_MEAN) or scaled or sparse:
        return NotImplemented
    starts = offsets[:-1] if last else offsets
    places = torch.arange(index.shape[0], device=index.device, dtype=starts.dtype)
    # The bag of an entry is the last that begins at it or before it; empty bags have no entry.
    bag = torch.searchsorted(starts, places, right=True) - 1
    counted = torch.ones_like(index) if padding is None else (index != padding).to(index.dtype)
    rows = functional.embedding(index, table) * counted.to(table.dtype).unsqueeze(-1)
    if weights is not None:
        rows = rows * weights.unsqueeze(-1)
    sums = rows.new_zeros((starts.shape[0], table.shape[1])).index_add(0, bag, rows)
    counts = torch.zeros_like(starts).index_add(0, bag, counted)
    if mode == _BAG_MEAN:
        sums = sums / counts.clamp_min(1).unsqueeze(-1).to(sums.dtype)
    return sums, bag, counts, torch.zeros_like(counts)


@decomposition("aten._weight_norm.default")
def weight_norm(direction: Any, length: Any, dim: int = 0) -> Any:
    """length * direction / |direction|, the norm over all dims but `dim`, or over all if it is -1.

    Source: arXiv:1602.07868.
    """
    rank = direction.dim()
    over = [other for other in range(rank) if dim == -1 or other != dim % rank]
    return direction * (length / torch.linalg.vector_norm(direction, dim=over, keepdim=True))


def _with_running(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, epsilon: float
) -> tuple[Any, ...]:
    """Run batch norm, and write the new running mean and variance in place of the old ones.

    No gradient flows through these, even where they are no buffers. Returns the result, and the
    mean and the inverse deviation of the batch.
    """
    old = [tensor.detach() if tensor.requires_grad else tensor for tensor in (mean, variance)]
    *results, new_mean, new_variance = _aten._native_batch_norm_legit_functional(
        x, weight, bias, *old, True, momentum, epsilon
    )
    for place, new in zip(old, (new_mean, new_variance), strict=True):
        place.copy_(new)  # a detached tensor shares the memory
    return tuple(results)


@decomposition("aten.native_batch_norm.default")
def native_batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    epsilon: float,
) -> Any:
    """Batch norm that also returns the batch's mean and inverse deviation, which are empty where
    the running ones are used. It writes on the side, as aten.batch_norm does.
    """
    rest = (momentum, epsilon)
    if not training:
        result = _aten.batch_norm(x, weight, bias, mean, variance, False, *rest, False)
        return result, x.detach().new_empty((0,)), x.detach().new_empty((0,))
    if mean is None:
        return NotImplemented
    return _with_running(x, weight, bias, mean, variance, *rest)


@decomposition("aten.instance_norm.default")
def instance_norm(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    epsilon: float,
    cudnn: bool,
) -> Any:
    """Normalization of each entry of the batch by its own statistics, and writes of the running
    ones, which aten.instance_norm makes on the side.

    The running statistics take in the mean over the batch of the entries' statistics.
    """
    if not training or mean is None:
        return NotImplemented
    wide = x.detach().to(mean.dtype)
    entry_variance, entry_mean = torch.var_mean(wide, tuple(range(2, x.dim())), correction=1)
    with torch.no_grad():
        for running, entries in ((mean, entry_mean), (variance, entry_variance)):
            running.copy_(running * (1 - momentum) + entries.mean(0) * momentum)
    return _aten.instance_norm(x, weight, bias, None, None, True, momentum, epsilon, cudnn)


@decomposition("aten.batch_norm.default")
def batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    epsilon: float,
    cudnn: bool,
) -> Any:
    """Normalization by the batch's own statistics, and writes of the running ones.

    Without statistics of the batch the op is kept. aten.batch_norm writes to the running mean and
    variance on the side; here the new ones are results, and written in place by ops that say so.
    A batch without elements has no statistics, and the op alone takes it.
    """
    if not training or x.numel() == 0:
        return NotImplemented
    if mean is None:
        return _aten.native_batch_norm(x, weight, bias, None, None, True, momentum, epsilon)[0]
    return _with_running(x, weight, bias, mean, variance, momentum, epsilon)[0]
