"""Decompositions of losses, applied while tracing.

A mean over a part of the tokens is no part of the mean: the count that it divides by, or the weight
of the tokens that count, is made a sum over all ranks.
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

    A single sequence is traced as it is.
    """
    lengths = (score_lengths, target_lengths)
    if scores.dim() != 3 or any(each.dim() != 1 for each in lengths):
        return NotImplemented
    losses = ctc_loss(scores, targets, *lengths, blank, zero_infinity)
    if reduction == _MEAN:
        return (losses / target_lengths.clamp(min=1).to(losses.dtype)).mean()
    return losses.sum() if reduction == _SUM else losses
