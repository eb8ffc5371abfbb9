"""Ops that are traced as the simpler ops that they stand for.

Two sources. Torch defines many ops by others (`hstack` by `cat`, `lstm_cell` by `linear`): those
that nobody wrote a rule for are traced as torch defines them. And some, written out here, hide
a count, a sum or random numbers that must be seen to be split: the count of a mean is that of all
ranks, a bias counts once, and a number belongs to an element of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from autoparallel.capture.decomposition_registry import Decomposition, decomposition
from autoparallel.support.torch_private import schema_of

__all__: list[str] = []

_NONE, _MEAN, _SUM = 0, 1, 2
# Bytes of the smallest numbers whose sum over a batch is one of them.
_SUMMABLE = 4


def _plus(bias: torch.Tensor, product: torch.Tensor, beta: Any, alpha: Any) -> torch.Tensor:
    """beta * bias + alpha * product; a beta of 0 ignores even what is not a number."""
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    return product + (bias if beta == 1 else bias * beta)


@decomposition("aten.addmm.default")
def addmm(bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """A plain one is kept: a pass of its own finds the dims that were flattened for it."""
    if beta == 1 and alpha == 1:
        return NotImplemented
    return _plus(bias, left @ right, beta, alpha)


@decomposition("aten.addmv.default")
def addmv(bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """The bias counts once, however the summed loop of the product is split."""
    return _plus(bias, left @ right, beta, alpha)


@decomposition("aten.addbmm.default")
def addbmm(bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """The sum over the batch of products, and a bias."""
    return _plus(bias, torch.bmm(left, right).sum(0), beta, alpha)


@decomposition("aten.addr.default")
def addr(bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """An outer product and a bias."""
    return _plus(bias, torch.outer(left, right), beta, alpha)


def _mean_of(loss: Any, position: int) -> Decomposition:
    """A mean over elements: their sum over the count of the whole."""

    def spelled(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if len(given) > position:
            reduction = given.pop(position)
        else:
            reduction = kwargs.pop("reduction", _MEAN)
        if reduction != _MEAN:
            return NotImplemented
        rest = {**kwargs, "reduction": _SUM}
        tail = given[position:]
        if tail:
            names = [argument.name for argument in schema_of(loss).arguments]
            rest |= dict(zip(names[position + 1 :], tail, strict=False))
        if given[0].dtype.itemsize < _SUMMABLE:
            return loss(*given[:position], **{**rest, "reduction": _NONE}).mean()
        count = torch.broadcast_shapes(given[0].shape, given[1].shape).numel()
        return loss(*given[:position], **rest) / count

    return spelled


_aten: Any = torch.ops.aten
for _name, _position in (
    ("mse_loss", 2),
    ("l1_loss", 2),
    ("smooth_l1_loss", 2),
    ("huber_loss", 2),
    ("soft_margin_loss", 2),
    ("kl_div", 2),
    ("binary_cross_entropy", 3),
    ("binary_cross_entropy_with_logits", 4),
):
    decomposition(f"aten.{_name}.default")(_mean_of(getattr(_aten, _name).default, _position))


def _reduced(losses: Any, weights: Any, reduction: int) -> Any:
    """losses: of each token, weighted already. A mean is over the weights."""
    if reduction == _NONE:
        return losses
    return losses.sum() if reduction == _SUM else losses.sum() / weights.sum()


@decomposition("aten.nll_loss.default", "aten.nll_loss_nd.default", "aten.nll_loss2d.default")
def nll_loss(
    scores: Any, target: Any, weight: Any = None, reduction: int = _MEAN, ignored: int = -100
) -> Any:
    """-scores[t, target[t], ...] of every token that is not ignored, weighted by its class.

    A mean divides by the weight of all tokens, wherever they are.
    """
    dim = min(scores.dim() - 1, 1)
    kept = target != ignored
    places = target.masked_fill(~kept, 0)
    losses = -scores.gather(dim, places.unsqueeze(dim)).squeeze(dim)
    weights = kept.to(scores.dtype)
    if weight is not None:
        weights = weight[places] * weights
    return _reduced(torch.where(kept, losses, 0.0) * weights, weights, reduction)


@decomposition("aten.cross_entropy_loss.default")
def cross_entropy(
    logits: Any,
    target: Any,
    weight: Any = None,
    reduction: int = _MEAN,
    ignored: int = -100,
    smoothing: float = 0.0,
) -> Any:
    """Kept, with the classes last, where each token has one class; else what it stands for.

    Soft targets: -sum_c weight[c] target[t, c] log softmax_c(logits)[t, c], a mean being over the
    tokens. label_smoothing mixes the target with an even one.
    """
    dim = min(logits.dim() - 1, 1)
    soft = target.dtype.is_floating_point
    classes = logits.shape[dim]
    # On the meta device, with symbolic sizes, torch 2.13 gets the shape of this one wrong.
    misjudged = logits.is_meta and reduction == _NONE
    if not soft and weight is None and smoothing == 0 and not misjudged:
        if logits.dim() == 2:
            return NotImplemented
        rows = logits.movedim(dim, -1).reshape(-1, classes)
        losses = functional.cross_entropy(
            rows,
            target.reshape(-1),
            reduction=("none", "mean", "sum")[reduction],
            ignore_index=ignored,
        )
        return losses.reshape(target.shape) if reduction == _NONE else losses
    scores = logits.log_softmax(dim)
    by_class = [1] * logits.dim()
    by_class[dim] = classes
    weighted = scores if weight is None else scores * weight.reshape(by_class)
    if soft:
        if smoothing:
            target = target * (1 - smoothing) + smoothing / classes
        losses = -(weighted * target).sum(dim)
        if reduction == _NONE:
            return losses
        return losses.sum() / (losses.numel() if reduction == _MEAN else 1)
    kept = target != ignored
    places = target.masked_fill(~kept, 0)
    weights = kept.to(scores.dtype)
    if weight is not None:
        weights = weight[places] * weights

    def mean(losses: Any) -> Any:
        return _reduced(torch.where(kept, losses, 0.0), weights, reduction)

    made = mean(-weighted.gather(dim, places.unsqueeze(dim)).squeeze(dim))
    if smoothing:  # else the sum over the classes, which may be infinite, must not count at all
        # Two means: over weights that are all 0 the first is no number, the second infinite.
        made = made * (1 - smoothing) + mean(-weighted.sum(dim)) * (smoothing / classes)
    return made


@decomposition("aten.bilinear.default")
def bilinear(left: Any, right: Any, weight: Any, bias: Any = None) -> Any:
    """y[.., n] = sum_(i, j) a[.., i] w[n, i, j] b[.., j] + bias[n], the bias counted once."""
    made = torch.einsum("...i,nij,...j->...n", left, weight, right)
    return made if bias is None else made + bias


@decomposition("aten.scatter.reduce", "aten.scatter.value_reduce")
def scatter(x: Any, dim: int, index: Any, source: Any, *, reduce: str) -> Any:
    """The name that `scatter_reduce` has for it."""
    if not isinstance(source, torch.Tensor):
        source = torch.full_like(index, source, dtype=x.dtype)
    way = {"add": "sum", "multiply": "prod"}[reduce]
    return x.scatter_reduce(dim, index, source, way)


@decomposition("aten.empty_like.default")
def empty_like(x: Any, **options: Any) -> Any:
    """What is in fresh memory differs from rank to rank."""
    return torch.zeros_like(x, **options)


@decomposition("aten.empty.memory_format")
def empty(size: Any, **options: Any) -> Any:
    """See empty_like."""
    options.pop("memory_format", None)
    return torch.zeros(size, **options)


@decomposition("aten.new_empty.default")
def new_empty(x: Any, size: Any, **options: Any) -> Any:
    """See empty_like."""
    return x.new_zeros(size, **options)


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
    """Rows that are looked up, and added to the bag that each belongs to."""
    if mode not in (_BAG_SUM, _BAG_MEAN) or scaled or sparse:
        return NotImplemented
    starts = offsets[:-1] if last else offsets
    places = torch.arange(index.shape[0], device=index.device, dtype=starts.dtype)
    bag = torch.searchsorted(starts, places, right=True) - 1
    kept = torch.ones_like(index) if padding is None else (index != padding).to(index.dtype)
    rows = functional.embedding(index, table) * kept.to(table.dtype).unsqueeze(-1)
    if weights is not None:
        rows = rows * weights.unsqueeze(-1)
    sums = rows.new_zeros((starts.shape[0], table.shape[1])).index_add(0, bag, rows)
    counts = torch.zeros_like(starts).index_add(0, bag, kept)
    if mode == _BAG_MEAN:
        sums = sums / counts.clamp_min(1).unsqueeze(-1).to(sums.dtype)
    return sums, bag, counts, torch.zeros_like(counts)


@decomposition("aten._weight_norm.default")
def weight_norm(direction: Any, length: Any, dim: int = 0) -> Any:
    """A weight as a direction and a length for each place along `dim`, or one for all of it."""
    rank = direction.dim()
    over = [other for other in range(rank) if dim == -1 or other != dim % rank]
    return direction * (length / torch.linalg.vector_norm(direction, dim=over, keepdim=True))


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
    """With statistics of the batch: a function, and the running ones written by themselves."""
    if not training:
        return NotImplemented
    if mean is None:
        return _aten.native_batch_norm(x, weight, bias, None, None, True, momentum, epsilon)[0]
    made = _aten._native_batch_norm_legit_functional(
        x, weight, bias, mean, variance, True, momentum, epsilon
    )
    mean.copy_(made[3])
    variance.copy_(made[4])
    return made[0]
