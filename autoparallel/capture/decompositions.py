"""Decompositions applied while tracing.

Two sources. Torch defines many ops by others (`hstack` by `cat`, `lstm_cell` by `linear`): those
that nobody wrote a rule for are traced as torch defines them (decompose.py). And some, written out
here, hide a count or a sum that must be seen to be split: a mean divides by the count of all ranks,
and a bias counts once, however the sum that it is added to is split.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.nn import functional

from autoparallel.capture.decomposition_registry import Decomposition, decomposition
from autoparallel.runtime.ctc_loss import ctc_loss
from autoparallel.support.torch_private import schema_of

__all__: list[str] = []

# The values of `reduction` in aten (torch 2.13, at::Reduction).
_NONE, _MEAN, _SUM = 0, 1, 2
# Bytes of the smallest type in which losses may be summed: float16 overflows at 65504, and bfloat16
# keeps 8 bits of a sum. Their mean divides first, or adds in float32.
_SUMMABLE = 4


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


def _mean_of(loss: Any, position: int) -> Decomposition:
    """Return the decomposition of a loss's mean over elements: their sum over the count of all.

    loss: the op. position: of its argument `reduction`. Other reductions are kept.
    """

    def mean(*args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a call whose reduction is a mean."""
        values = list(args)
        if len(values) > position:
            reduction = values.pop(position)
        else:
            reduction = kwargs.pop("reduction", _MEAN)
        if reduction != _MEAN:
            return NotImplemented
        rest = {**kwargs, "reduction": _SUM}
        # What came behind `reduction` by position goes by name: another value stands there now.
        tail = values[position:]
        if tail:
            names = [argument.name for argument in schema_of(loss).arguments]
            rest |= dict(zip(names[position + 1 :], tail, strict=False))
        if values[0].dtype.itemsize < _SUMMABLE:
            return loss(*values[:position], **{**rest, "reduction": _NONE}).mean()
        # `Size.numel()` would fix sizes that the inputs decide on.
        count = prod(torch.broadcast_shapes(values[0].shape, values[1].shape))
        return loss(*values[:position], **rest) / count

    return mean


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
    """Return the losses reduced: all of them, their sum, or their sum over that of the weights.

    losses: of each token, weighted already.
    """
    if reduction == _NONE:
        return losses
    return losses.sum() if reduction == _SUM else losses.sum() / weights.sum()


@decomposition("aten.nll_loss.default", "aten.nll_loss_nd.default", "aten.nll_loss2d.default")
def nll_loss(
    scores: Any, target: Any, weight: Any = None, reduction: int = _MEAN, ignored: int = -100
) -> Any:
    """-scores[t, target[t], ...] of every token that is not ignored, weighted by its class.

    scores: [tokens, classes, ...], or [classes] for one token. target: the class of each token. A
    mean divides by the weight of all tokens, wherever they are.
    """
    dim = min(scores.dim() - 1, 1)
    counted = target != ignored
    # Ignored targets are no classes, often -100: any class will do, as its loss does not count.
    places = target.masked_fill(~counted, 0)
    losses = -scores.gather(dim, places.unsqueeze(dim)).squeeze(dim)
    weights = counted.to(scores.dtype)
    if weight is not None:
        weights = weight[places] * weights
    # Not by the weights alone: 0 times an infinite score is no number.
    return _reduced(torch.where(counted, losses, 0.0) * weights, weights, reduction)


@decomposition("aten.cross_entropy_loss.default")
def cross_entropy(
    logits: Any,
    target: Any,
    weight: Any = None,
    reduction: int = _MEAN,
    ignored: int = -100,
    smoothing: float = 0.0,
) -> Any:
    """-log softmax(logits)[t, target[t]] of every token that is not ignored, weighted by class.

    Kept, with the classes last, where each token has one class and all classes one weight: that
    has a rule. logits: [tokens, classes, ...]. target: the class of each token, or soft targets in
    the shape of the logits: -sum_c weight[c] target[t, c] log softmax_c(logits)[t, c], whose mean
    is over the tokens. smoothing mixes the target with an even one (arXiv:1512.00567, section 7).
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
    counted = target != ignored
    places = target.masked_fill(~counted, 0)
    weights = counted.to(scores.dtype)
    if weight is not None:
        weights = weight[places] * weights

    def reduced(losses: Any) -> Any:
        """Reduce the losses of the tokens that are not ignored."""
        return _reduced(torch.where(counted, losses, 0.0), weights, reduction)

    loss = reduced(-weighted.gather(dim, places.unsqueeze(dim)).squeeze(dim))
    if smoothing:  # else the sum over the classes, which may be infinite, must not count at all
        # Two means: over weights that are all 0 the first is no number, the second infinite.
        loss = loss * (1 - smoothing) + reduced(-weighted.sum(dim)) * (smoothing / classes)
    return loss


@decomposition("aten.ctc_loss.Tensor")
def ctc_loss_of_batch(
    scores: Any,
    targets: Any,
    score_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = _MEAN,
    zero_infinity: bool = False,
) -> Any:
    """The loss of each sequence over its length, by an op that returns nothing else; their mean.

    Targets of all sequences in one row, and a single sequence, are traced as they are.
    """
    lengths = (score_lengths, target_lengths)
    if scores.dim() != 3 or targets.dim() != 2 or any(each.dim() != 1 for each in lengths):
        return NotImplemented
    losses = ctc_loss(scores, targets, *lengths, blank, zero_infinity)
    if reduction == _MEAN:
        return (losses / target_lengths.clamp(min=1).to(losses.dtype)).mean()
    return losses.sum() if reduction == _SUM else losses


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
