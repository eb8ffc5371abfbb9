"""Cross-entropy of split classes, of split tokens, and of whole logits in their order in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from autoparallel.placement import part_bounds
from autoparallel.runtime.collectives import common_sum, for_parts, pending_sum, same_sum
from autoparallel.runtime.groups import Group
from autoparallel.runtime.memory_order import outer_dim
from autoparallel.runtime.split_indices import require_below
from autoparallel.support.torch_private import nn_binding

__all__ = [
    "cross_entropy_classes",
    "cross_entropy_rows",
    "cross_entropy_tokens",
]


# The reductions of losses, by the numbers that torch gives them.
_NONE, _MEAN, _SUM = 0, 1, 2

# torch's loss by the reduction's number, without what it does in Python.
_cross_entropy = nn_binding("cross_entropy_loss")


# This one is not torch's: it asks for the number of tokens that count, for the kernel of another
# mesh axis.
_COUNT = 3


class _CrossEntropyClasses(torch.autograd.Function):
    """The loss per token with the classes split, in two all-reduces of one and of two numbers a
    token.

    Megatron's vocabulary-parallel cross-entropy (arXiv:1909.08053, section 3): logits are never
    gathered. Backward communicates nothing. The probabilities are a second result, because they
    are what the backward pass reads: it can be differentiated in turn.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignored: int, group: Group, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log(sum(exp(logits))) - logits[target] of each token, 0 for those that are
        ignored; and this rank's part of the softmax.
        """
        start, stop = part_bounds(size, group.world_size, group.rank)
        counts = target != ignored
        require_below(target.masked_fill(~counts, 0), size, "target class")
        local = target - start
        here = counts & (local >= 0) & (local < stop - start)
        local = local.masked_fill(~here, 0).unsqueeze(1)
        if stop > start:
            highest = logits.amax(1)
        else:
            highest = logits.new_full(target.shape, float("-inf"))
        # Less the highest of all ranks, no exponential overflows, and the loss does not change.
        highest = group.all_reduce(highest, "max")
        shifted = logits - highest.unsqueeze(1)
        if stop > start:
            picked = shifted.gather(1, local).squeeze(1).masked_fill(~here, 0)
        else:
            picked = logits.new_zeros(target.shape)
        exponents = shifted.exp_()
        picked, total = group.all_reduce(torch.stack([picked, exponents.sum(1)])).unbind(0)
        # The softmax is all that the backward pass needs; each step in place saves one (t, c / n).
        probabilities = exponents.div_(total.unsqueeze(1))
        ctx.save_for_backward(probabilities, local, here, counts)
        ctx.group = group
        ctx.set_materialize_grads(False)
        return (total.log() - picked).masked_fill(~counts, 0), probabilities

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_probabilities: torch.Tensor | None
    ) -> Any:
        """Return (softmax - one_hot(target)) * grad, of this rank's classes.

        A gradient of the probabilities comes only where this backward pass is differentiated.
        """
        probabilities, local, here, counts = ctx.saved_tensors
        back = None
        if grad is not None:
            # What is ignored gets exactly nothing, also where a mean over no token sends
            # infinities.
            grad = for_parts(grad, ctx.group).masked_fill(~counts, 0)
            back = probabilities * grad.unsqueeze(1)
            if back.size(1):
                back.scatter_add_(1, local, -grad.masked_fill(~here, 0).unsqueeze(1))
        if grad_probabilities is not None:
            weighted = grad_probabilities * probabilities
            total = common_sum(weighted.sum(1, keepdim=True), ctx.group)
            through = weighted - probabilities * total
            back = through if back is None else back + through
        return back, None, None, None, None

    @staticmethod
    def spmd_typecheck(
        *, logits: torch.Tensor, target: torch.Tensor, ignored: int, group: Group, size: int
    ) -> Any:
        """Return the type of the result for the checker of `spmd_types`: split classes give one
        loss.
        """
        import spmd_types
        from spmd_types import rules

        axis = group.process_group  # type: ignore[attr-defined]
        rules.ignore(target)
        others = "".join(chr(ord("d") + dim) for dim in range(logits.dim() - 2))
        summed = rules.einsum(f"tc{others}->t{others}", logits)
        return rules.all_reduce(summed, axis, src=spmd_types.V, dst=spmd_types.I), logits


def cross_entropy_classes(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: None = None,
    reduction: int = _MEAN,
    ignored: int = -100,
    smoothing: float = 0.0,
    *,
    group: Group,
    size: int,
) -> torch.Tensor:
    """Compute cross-entropy of logits whose classes are split; the result is the same on every
    rank.

    logits: (t, c / n, ..). target: (t, ..), classes of the whole. reduction: torch's number, 0 for
    a loss per token, 1 for the mean, 2 for the sum. ignored: the class of tokens that do not count.
    size: c of the whole. weight and smoothing are in torch's signature, and must be their defaults.
    Raises IndexError for a target outside of [0, size) that is not `ignored`.
    """
    if reduction == _COUNT:
        return (target != ignored).sum()
    losses: torch.Tensor
    losses, _ = _CrossEntropyClasses.apply(logits, target, ignored, group, size)
    if reduction == _NONE:
        return losses
    total = losses.sum()
    return total / (target != ignored).sum() if reduction == _MEAN else total


def cross_entropy_rows(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = _MEAN,
    ignored: int = -100,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Compute cross-entropy of whole logits as torch does, a row of classes after the other.

    logits: (t, c, ..). target: (t, ..). The classes usually lie last in memory, as logits of a
    sequence are made: then torch's loss of rows takes a quarter of the time that its loss of images
    takes, and no copy. Otherwise, and for weights and smoothing, it is the latter.

    >>> logits, target = torch.zeros(2, 3, 5).permute(0, 2, 1), torch.zeros(2, 3, dtype=torch.int64)
    >>> torch.equal(cross_entropy_rows(logits, target), functional.cross_entropy(logits, target))
    True
    """
    if logits.dim() < 3 or logits.stride(1) != 1 or target.is_floating_point():
        return _cross_entropy(logits, target, weight, reduction, ignored, smoothing)
    rows, labels = _rows_of_classes(logits, target)
    flat, each = rows.flatten(0, -2), labels.flatten()
    losses = _cross_entropy(flat, each, weight, reduction, ignored, smoothing)
    if reduction != _NONE:
        return losses
    return losses.view(labels.shape).movedim(0, outer_dim(logits.movedim(1, -1)))


def _rows_of_classes(
    logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (t, c, ..) with their classes last, and the targets in the same order.

    The classes usually lie last in memory: rows of classes are then a view, not a copy.
    """
    rows = logits.transpose(1, 2) if logits.dim() == 3 else logits.movedim(1, -1)
    dim = outer_dim(rows)
    return (rows.movedim(dim, 0), target.movedim(dim, 0)) if dim else (rows, target)


def cross_entropy_tokens(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: None = None,
    reduction: int = _MEAN,
    ignored: int = -100,
    smoothing: float = 0.0,
    *,
    group: Group,
    size: int,
    run: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute cross-entropy of logits whose tokens are split: a pending sum, a mean being over all
    ranks' tokens.

    logits: (t / n, c, ..), or (t, c, ../ n, ..), split along a later dim. reduction, ignored: as in
    `cross_entropy_classes`. run: the op on this rank's tokens, where another mesh axis splits the
    classes; by default torch's own.
    """
    if reduction in (_MEAN, _COUNT):
        with torch.no_grad():
            if run is not None:
                count_here = run(logits, target, weight, _COUNT, ignored, smoothing)
            else:
                count_here = (target != ignored).sum()
            count = same_sum(count_here, group)
    if reduction == _COUNT:
        return count
    if run is not None:
        total = run(logits, target, weight, _SUM, ignored, smoothing)
    else:
        rows, labels = _rows_of_classes(logits, target)
        total = functional.cross_entropy(
            rows.flatten(0, -2), labels.flatten(), ignore_index=ignored, reduction="sum"
        )
    if reduction == _MEAN:
        # Each rank divides its sum by the count of all ranks, so that the terms add up to the mean.
        total = total / count
    return pending_sum(total, group)
