"""Tensor-parallel layers by hand, on torch and torch.distributed alone.

Activations are (sequence, batch, hidden): sequence parallelism splits dim 0. A split dim need not
divide by the ranks: rank r has the r-th part of torch.chunk, the last parts may be smaller or
empty. With sequence parallelism the sequence must divide.

A layer's `splits` gives the layout of its parameters on the ranks; `pending_gradients` names those
of which each rank has one term of the gradient after backward (see finish_gradients).

Sources: Shoeybi et al. 2019, arXiv:1909.08053 (column, row and vocabulary parallelism); Korthikanti
et al. 2022, arXiv:2205.05198 (sequence parallelism, gathering again in backward).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_rules.regions import (
    Group,
    Split,
    gathered,
    group_rank,
    group_size,
    reduce_from_tensor_parallel,
    reduce_scattered,
    start_gather,
    start_reduce_scatter,
)

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "column_parallel_linear",
    "finish_gradients",
    "row_parallel_linear",
    "vocab_parallel_cross_entropy",
]

# Products. Collectives of the backward pass run while another product is computed.


class _ColumnProduct(torch.autograd.Function):
    """The column-parallel product, f included: its input's gradient is summed over the ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: Group,
        sequence_parallel: bool,
        keep_gathered: bool,
    ) -> Tensor:
        """Multiply with this rank's rows of the weight; gather x first if sequence-parallel."""
        whole = gathered(x, group) if sequence_parallel else x
        # What was gathered is p times as large as what came in: to gather it once more saves
        # memory.
        ctx.save_for_backward(whole if keep_gathered else x, weight)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        ctx.gather_again = sequence_parallel and not keep_gathered
        return F.linear(whole, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; each collective runs while another product is computed."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gather_again = ctx.gather_again and needs_weight
        whole, gather = start_gather(x, ctx.group) if gather_again else (x, None)
        x_gradient = weight_gradient = bias_gradient = reduction = None
        if needs_x:
            x_gradient = gradient @ weight
            if ctx.sequence_parallel:
                x_gradient, reduction = start_reduce_scatter(x_gradient, ctx.group)
            else:
                reduction = dist.all_reduce(x_gradient, group=ctx.group, async_op=True)
        rows = gradient.flatten(0, -2)
        # The weight's gradient needs the gathered x; that of x was computed meanwhile.
        if gather is not None:
            gather.wait()
        if needs_weight:
            weight_gradient = rows.t() @ whole.flatten(0, -2)
        if needs_bias:
            bias_gradient = rows.sum(0)
        if reduction is not None:
            reduction.wait()
        return x_gradient, weight_gradient, bias_gradient, None, None, None


class _RowProduct(torch.autograd.Function):
    """The row-parallel product, g included: the terms of all ranks are summed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: Group, sequence_parallel: bool
    ) -> Tensor:
        """Multiply with this rank's columns of the weight, and sum over the ranks."""
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        term = F.linear(x, weight)
        if sequence_parallel:
            return reduce_scattered(term, group)
        dist.all_reduce(term, group=group)
        return term

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; with sequence parallelism the incoming one is gathered first."""
        x, weight = ctx.saved_tensors
        if ctx.sequence_parallel:
            gradient = gathered(gradient, ctx.group)
        x_gradient = gradient @ weight if ctx.needs_input_grad[0] else None
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        return x_gradient, weight_gradient, None, None


def _autocast(tensor: Tensor) -> Tensor:
    """Return the tensor in autocast's dtype, where autocast is on.

    The products here are autograd Functions, which hide them from autocast.
    """
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group = None,
    sequence_parallel: bool = False,
    keep_gathered: bool = False,
) -> Tensor:
    """Return the product with this rank's rows of a weight, (s, b, i) -> (s, b, o/p).

    x: the same on all ranks; with sequence_parallel this rank's positions (s/p, b, i), which are
    gathered for the product, and gathered once more in backward unless keep_gathered. weight: (o/p,
    i). bias: (o/p).

    Example: `column_parallel_linear(x, weight, group=group, sequence_parallel=True)`
    """
    x, weight = _autocast(x), _autocast(weight)
    bias = None if bias is None else _autocast(bias)
    if group_size(group) == 1:
        return F.linear(x, weight, bias)
    return _ColumnProduct.apply(x, weight, bias, group, sequence_parallel, keep_gathered)


def row_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """Return the sum of the ranks' products with their columns of a weight, to (s, b, o).

    x: (s, b, i/p). weight: (o, i/p). bias: (o) whole, added once, after the sum. With
    sequence_parallel the result is this rank's positions (s/p, b, o).

    Example: `row_parallel_linear(x, weight, bias, group=group)`
    """
    x, weight = _autocast(x), _autocast(weight)
    bias = None if bias is None else _autocast(bias)
    if group_size(group) == 1:
        return F.linear(x, weight, bias)
    total = _RowProduct.apply(x, weight, group, sequence_parallel)
    # Added before the sum, the bias would count once per rank.
    return total if bias is None else total + bias


class ColumnParallelLinear(nn.Module):
    """Linear layer with its output split over the group; see column_parallel_linear.

    input_size, output_size, bias: as of nn.Linear, for the whole layer. blocks, unit: see Split.
    deviation: of the normal initialization.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        blocks: int = 1,
        unit: int = 1,
        group: Group = None,
        sequence_parallel: bool = False,
        keep_gathered: bool = False,
        deviation: float = 0.02,
    ) -> None:
        super().__init__()
        split = Split(0, output_size, blocks, unit)
        self.group, self.sequence_parallel = group, sequence_parallel
        self.keep_gathered = keep_gathered
        self.splits = {"weight": split, "bias": split} if bias else {"weight": split}
        self.weight = _split_normal((output_size, input_size), split, group, deviation)
        local_size = split.local_size(group_rank(group), group_size(group))
        self.bias = nn.Parameter(torch.zeros(local_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the product: (s, b, i), or (s/p, b, i) with sequence_parallel -> (s, b, o/p)."""
        return column_parallel_linear(
            x,
            self.weight,
            self.bias,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            keep_gathered=self.keep_gathered,
        )


class RowParallelLinear(nn.Module):
    """Linear layer with its input split over the group; see row_parallel_linear.

    input_size, output_size, bias: as of nn.Linear, for the whole layer. unit: see Split. deviation:
    of the normal initialization.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        unit: int = 1,
        group: Group = None,
        sequence_parallel: bool = False,
        deviation: float = 0.02,
    ) -> None:
        super().__init__()
        split = Split(1, input_size, unit=unit)
        self.group, self.sequence_parallel = group, sequence_parallel
        self.splits = {"weight": split}
        # With sequence parallelism a rank adds the bias to its own positions only.
        self.pending_gradients = ("bias",) if bias and sequence_parallel else ()
        self.weight = _split_normal((output_size, input_size), split, group, deviation)
        self.bias = nn.Parameter(torch.zeros(output_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum: (s, b, i/p) -> (s, b, o), or (s/p, b, o) with sequence_parallel."""
        return row_parallel_linear(
            x, self.weight, self.bias, group=self.group, sequence_parallel=self.sequence_parallel
        )


class VocabParallelEmbedding(nn.Module):
    """Embedding with its vocabulary split over the group, unevenly where it must be.

    vocabulary, hidden: of the whole table. deviation: of the normal initialization. A rank looks up
    the tokens that it has and gives zeros for the others; the sum is whole.
    """

    def __init__(
        self, vocabulary: int, hidden: int, *, group: Group = None, deviation: float = 0.02
    ) -> None:
        super().__init__()
        split = Split(0, vocabulary)
        self.group = group
        self.splits = {"weight": split}
        self.first, self.end = split.bounds(group_rank(group), group_size(group))
        self.weight = _split_normal((vocabulary, hidden), split, group, deviation)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (..., h), the same on all ranks.

        tokens: integers of any shape, below the vocabulary. On more than one rank a token outside
        the vocabulary gives zeros, not an IndexError.
        """
        if group_size(self.group) == 1:
            return F.embedding(tokens, self.weight)
        absent = (tokens < self.first) | (tokens >= self.end)
        local_rows = F.embedding((tokens - self.first).masked_fill(absent, 0), self.weight)
        return reduce_from_tensor_parallel(
            local_rows.masked_fill(absent[..., None], 0.0), self.group
        )


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits split over the vocabulary: three all-reduces forward, no other."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first: int, ignored_label: int, group: Group
    ) -> Tensor:
        """Return the mean loss; save the local softmax for the backward pass."""
        parallel = group_size(group) > 1
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = wide.amax(dim=-1)
        if parallel:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        # The largest logit of all ranks is subtracted, so that no exponential overflows.
        wide = wide - largest[..., None]

        absent = (labels < first) | (labels >= first + logits.shape[-1])
        index = (labels - first).masked_fill(absent, 0)
        predicted = wide.gather(-1, index[..., None])[..., 0].masked_fill(absent, 0.0)
        softmax = wide.exp_()
        total = softmax.sum(dim=-1)
        if parallel:
            dist.all_reduce(predicted, group=group)
            dist.all_reduce(total, group=group)

        weights = (labels != ignored_label).to(wide.dtype)
        # The mean is over the labels that count, which all ranks see alike.
        weights /= weights.sum()
        softmax /= total[..., None]
        ctx.save_for_backward(softmax, index, absent, weights)
        ctx.dtype = logits.dtype
        return ((total.log() - predicted) * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the local logits' gradient, (softmax - one-hot) * weight, by itself."""
        softmax, index, absent, weights = ctx.saved_tensors
        weights = weights * gradient
        result = softmax * weights[..., None]
        result.scatter_add_(-1, index[..., None], -weights.masked_fill(absent, 0.0)[..., None])
        return result.to(ctx.dtype), None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocabulary: int,
    *,
    ignored_label: int = -100,
    group: Group = None,
) -> Tensor:
    """Return the mean cross-entropy over the labels that count, a scalar, the same on all ranks.

    logits: (..., V/p), this rank's part of the vocabulary. labels: (...) integers below vocabulary,
    the same on all ranks. vocabulary: V. ignored_label: does not count. Three all-reduces of one
    number per token forward (largest logit, predicted logit, sum of exponentials), none backward.
    Computed in at least single precision; NaN if no label counts, as in torch.

    >>> vocab_parallel_cross_entropy(torch.zeros(1, 4), torch.tensor([2]), vocabulary=4)
    tensor(1.3863)
    """
    first, _ = Split(0, vocabulary).bounds(group_rank(group), group_size(group))
    return _VocabParallelCrossEntropy.apply(logits, labels, first, ignored_label, group)


def finish_gradients(model: nn.Module, group: Group = None) -> None:
    """Sum over the group, in place, the gradients of which each rank has one term.

    With sequence parallelism these are the norms' and the row biases', each seen by only this
    rank's positions. To be called after backward and before the step: one all-reduce per dtype.
    """
    if group_size(group) == 1:
        return
    pending: dict[torch.dtype, list[Tensor]] = {}
    for module in model.modules():
        for name in getattr(module, "pending_gradients", ()):
            gradient = getattr(module, name).grad
            if gradient is not None:
                pending.setdefault(gradient.dtype, []).append(gradient)
    for gradients in pending.values():
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total, group=group)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, total.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))


def _split_normal(
    shape: tuple[int, int], split: Split, group: Group, deviation: float
) -> nn.Parameter:
    """Return this rank's part of a normal matrix.

    The whole matrix is drawn on each rank: with equal seeds it is the same at every world size.
    """
    whole = nn.init.normal_(torch.empty(shape), std=deviation)
    return nn.Parameter(split.local(whole, group_rank(group), group_size(group)))
