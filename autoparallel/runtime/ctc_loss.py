"""The CTC loss as one op: torch's own returns a table, too, whose size depends on the lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from autoparallel.graph.operators import operator_of

__all__ = ["ctc_loss"]


@torch.library.custom_op("autoparallel::ctc_loss", mutates_args=())
def ctc_loss(
    scores: torch.Tensor,
    targets: torch.Tensor,
    score_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int,
    zero_infinity: bool,
) -> torch.Tensor:
    """Return the loss of each sequence.

    scores: (t, n, c), logarithms of probabilities. targets: (n, s), or those of all sequences, one
    behind the other. score_lengths, target_lengths: (n,). blank, zero_infinity: as in
    torch.nn.functional.ctc_loss.

    >>> scores = torch.zeros(3, 1, 2).log_softmax(-1)
    >>> one = torch.ones(1, dtype=torch.long)
    >>> ctc_loss(scores, one[None], 3 * one, one, 0, False)
    tensor([0.2877])
    """
    # Torch's function cannot run on no sequences, which a rank may have.
    if not scores.size(1):
        return scores.sum((0, 2))
    lengths = (score_lengths, target_lengths)
    options: dict[str, Any] = {"blank": blank, "zero_infinity": zero_infinity}
    return functional.ctc_loss(scores, targets, *lengths, reduction="none", **options)


@ctc_loss.register_fake
def _shape(
    scores: torch.Tensor,
    targets: torch.Tensor,
    score_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    *options: Any,
) -> torch.Tensor:
    """Return losses without numbers, for a trace. Raises ValueError for other numbers of lengths
    than of sequences.
    """
    for lengths in (score_lengths, target_lengths):
        if lengths.shape[0] != scores.shape[1]:
            raise ValueError(f"{lengths.shape[0]} lengths of {scores.shape[1]} sequences")
    return scores.new_empty(scores.shape[1:2])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep the operands for the backward pass."""
    scores, targets, score_lengths, target_lengths, *options = inputs
    ctx.save_for_backward(scores, targets, score_lengths, target_lengths)
    ctx.options = options


def _gradients(context: Any, grad: torch.Tensor) -> Any:
    """Return the gradient of the scores, for which the loss is computed again."""
    scores, *others = context.saved_tensors
    return (scores_gradient(grad, scores, *others, *context.options), *(None,) * 5)


@torch.library.custom_op("autoparallel::ctc_loss_backward", mutates_args=())
def scores_gradient(
    grad: torch.Tensor,
    scores: torch.Tensor,
    targets: torch.Tensor,
    score_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int,
    zero_infinity: bool,
) -> torch.Tensor:
    """Return the gradient of the scores, of the same shape. grad: (n,), of the losses."""
    if not scores.size(1):
        return torch.empty_like(scores)
    lengths = (score_lengths, target_lengths)
    # Below autograd, where an op of torch.library runs, torch's function records no gradient.
    losses, table = operator_of("aten._ctc_loss.Tensor")(
        scores, targets, *lengths, blank, zero_infinity
    )
    gradient: torch.Tensor = operator_of("aten._ctc_loss_backward.Tensor")(
        grad, scores, targets, *lengths, losses, table, blank, zero_infinity
    )
    return gradient


@scores_gradient.register_fake
def _scores_shape(grad: torch.Tensor, scores: torch.Tensor, *others: Any) -> torch.Tensor:
    """Return a gradient without numbers, for a trace."""
    return torch.empty_like(scores)


ctc_loss.register_autograd(_gradients, setup_context=_remember)
