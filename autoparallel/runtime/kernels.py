"""Operators on parts that know where their part begins, and communicate inside if they must.

Each takes the op's own arguments, with local tensors, then `group` and the sizes of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from autoparallel.placement import part_bounds
from autoparallel.runtime.collectives import pending_sum, same_sum
from autoparallel.runtime.discovered_kernels import combined_parts, masked_lookup, weighted_mean
from autoparallel.runtime.groups import Group
from autoparallel.runtime.stand_ins import shortened, some
from autoparallel.runtime.statistics import (
    amax_split,
    amin_split,
    argmax_split,
    argmin_split,
    batch_norm_split,
    log_softmax_split,
    logsumexp_split,
    max_split,
    min_split,
    softmax_split,
)
from autoparallel.support.torch_private import assert_on_device

__all__ = [
    "amax_split",
    "amin_split",
    "argmax_split",
    "argmin_split",
    "batch_norm_split",
    "combined_parts",
    "convolution_inputs",
    "cross_entropy_classes",
    "cross_entropy_tokens",
    "embedding_rows",
    "gather_split",
    "grouped_mm_matrices",
    "index_select_split",
    "log_softmax_split",
    "logsumexp_split",
    "masked_lookup",
    "max_split",
    "min_split",
    "shortened",
    "softmax_split",
    "some",
    "weighted_mean",
]

_NONE, _MEAN, _SUM = 0, 1, 2
# Not one of torch's: the number of tokens that count, for the kernel of another mesh axis.
_COUNT = 3


def _require_below(index: torch.Tensor, size: int, what: str) -> None:
    """Out-of-range indices are an error in the unsplit op; with a mask they would be zeros."""
    inside = ((index >= 0) & (index < size)).all()
    if index.is_cuda:
        assert_on_device(inside)
    elif index.device.type != "meta" and not bool(inside):
        raise IndexError(f"{what} out of range: all must be in [0, {size})")


def embedding_rows(
    weight: torch.Tensor,
    index: torch.Tensor,
    padding: int = -1,
    scale: bool = False,
    sparse: bool = False,
    *,
    group: Group,
    size: int,
) -> torch.Tensor:
    """Rows of a table whose rows are split: own rows or zeros, a pending sum over the ranks.

    size: rows of the whole table. Raises IndexError for an index outside it.
    """
    with torch.no_grad():
        _require_below(index, size, "embedding index")
        start, stop = part_bounds(size, group.world_size, group.rank)
        local = index - start
        elsewhere = (local < 0) | (local >= stop - start)
        local = local.masked_fill(elsewhere, 0)
    if stop == start:
        rows = weight.new_zeros((*index.shape, weight.size(1))) + weight.sum()
        return pending_sum(rows, group)
    own_padding = padding - start if start <= padding < stop else -1
    rows = torch.embedding(weight, local, own_padding)
    return pending_sum(rows.masked_fill(elsewhere.unsqueeze(-1), 0), group)


def _places_here(index: torch.Tensor, size: int, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Places along a split dim of `size`: counted from this rank's part, and which are not in it.

    Those are given as place 0.
    """
    _require_below(index, size, "index")
    start, stop = part_bounds(size, group.world_size, group.rank)
    local = index - start
    elsewhere = (local < 0) | (local >= stop - start)
    return local.masked_fill(elsewhere, 0), elsewhere


def gather_split(
    x: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    sparse_grad: bool = False,
    *,
    group: Group,
    size: int,
) -> torch.Tensor:
    """x[a, index[a, i, b], b] along a split dim: own elements or zeros, a pending sum."""
    with torch.no_grad():
        local, elsewhere = _places_here(index, size, group)
    if not x.size(dim):
        shape = [min(counts) for counts in zip(x.shape, index.shape, strict=True)]
        shape[dim] = index.size(dim)
        return pending_sum(x.new_zeros(shape) + x.sum(), group)
    return pending_sum(x.gather(dim, local).masked_fill(elsewhere, 0), group)


def index_select_split(
    x: torch.Tensor, dim: int, index: torch.Tensor, *, group: Group, size: int
) -> torch.Tensor:
    """x[.., index[i], ..] along a split dim: own elements or zeros, a pending sum."""
    with torch.no_grad():
        local, elsewhere = _places_here(index, size, group)
    shape = [1] * x.dim()
    shape[dim] = index.numel()
    if not x.size(dim):
        whole = list(x.shape)
        whole[dim] = index.numel()
        return pending_sum(x.new_zeros(whole) + x.sum(), group)
    made = x.index_select(dim, local).masked_fill(elsewhere.reshape(shape), 0)
    return pending_sum(made, group)


def convolution_inputs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *options: Any,
    group: Group,
    size: int,
    **more: Any,
) -> torch.Tensor:
    """A convolution whose input channels are split: a pending sum with the bias on one rank.

    options, more: the op's other arguments.
    """
    run = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
    own = bias * (1 if group.rank == 0 else 0)
    return pending_sum(run(x, weight, own, *options, **more), group)


def grouped_mm_matrices(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, *, group: Group, size: int
) -> torch.Tensor:
    """Rows times the matrix of their group, the matrices split: own rows or zeros, a pending sum.

    x: (t, k), sorted by group. weight: (e / n, k, n). ends: (e,), where the rows of each end. size:
    e of the whole. The own rows come first, in their order, so that no size must be known to the
    host; what lies behind them is masked, both ways.
    """
    start, stop = part_bounds(size, group.world_size, group.rank)
    with torch.no_grad():
        places = torch.arange(x.size(0), device=x.device)
        first = ends[start - 1] if start else ends.new_zeros(())
        own_ends = ends[start:stop] - first
        mine = (places < own_ends[-1]).unsqueeze(1)
        here = (places + first) % max(x.size(0), 1)
        back = (places - first) % max(x.size(0), 1)
    rows = _grouped_mm(x[here].masked_fill(~mine, 0), weight, own_ends.to(ends.dtype))
    return pending_sum(rows.masked_fill(~mine, 0)[back], group)


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's grouped product; one product after the other for types and sizes it does not take."""
    sizes = (x.size(1), weight.size(1), weight.size(2))
    aligned = all(size * x.element_size() % 16 == 0 for size in sizes)
    if x.dtype == torch.bfloat16 and aligned:
        return functional.grouped_mm(x, weight, offs=ends)
    parts = []
    start = 0
    for matrix, stop in zip(weight.unbind(0), ends.tolist(), strict=True):
        parts.append(x[start:stop] @ matrix)
        start = stop
    parts.append(x.new_zeros((x.size(0) - start, weight.size(2))))
    return torch.cat(parts)


class _CrossEntropyClasses(torch.autograd.Function):
    """Loss per token with the classes split; two all-reduces, of one and of two numbers a token."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignored: int, group: Group, size: int
    ) -> torch.Tensor:
        start, stop = part_bounds(size, group.world_size, group.rank)
        kept = target != ignored
        _require_below(target.masked_fill(~kept, 0), size, "target class")
        local = target - start
        here = kept & (local >= 0) & (local < stop - start)
        local = local.masked_fill(~here, 0).unsqueeze(1)
        if stop > start:
            highest = logits.amax(1)
        else:
            highest = logits.new_full(target.shape, float("-inf"))
        highest = group.all_reduce(highest, "max")
        shifted = logits - highest.unsqueeze(1)
        exponents = shifted.exp()
        if stop > start:
            picked = shifted.gather(1, local).squeeze(1).masked_fill(~here, 0)
        else:
            picked = logits.new_zeros(target.shape)
        picked, total = group.all_reduce(torch.stack([picked, exponents.sum(1)])).unbind(0)
        ctx.save_for_backward(exponents.div_(total.unsqueeze(1)), local, here, kept)
        return (total.log() - picked).masked_fill(~kept, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        probabilities, local, here, kept = ctx.saved_tensors
        result = probabilities.clone()
        if result.size(1):
            result.scatter_add_(1, local, -here.to(result.dtype).unsqueeze(1))
        # What is ignored gets exactly nothing, also where a mean over no token sends infinities.
        result.mul_(grad.masked_fill(~kept, 0).unsqueeze(1))
        return result, None, None, None, None

    @staticmethod
    def spmd_typecheck(
        *, logits: torch.Tensor, target: torch.Tensor, ignored: int, group: Group, size: int
    ) -> Any:
        """Classes split in, one logical loss out."""
        import spmd_types
        from spmd_types import rules

        axis = group.process_group  # type: ignore[attr-defined]
        rules.ignore(target)
        others = "".join(chr(ord("d") + dim) for dim in range(logits.dim() - 2))
        summed = rules.einsum(f"tc{others}->t{others}", logits)
        return rules.all_reduce(summed, axis, src=spmd_types.V, dst=spmd_types.I)


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
    """Cross-entropy of (t, c / n, ..) logits, the same on every rank. size: classes of the whole.

    Raises IndexError for a target outside [0, size) that is not `ignored`.
    """
    if reduction == _COUNT:
        return (target != ignored).sum()
    losses: torch.Tensor = _CrossEntropyClasses.apply(logits, target, ignored, group, size)
    if reduction == _NONE:
        return losses
    total = losses.sum()
    return total / (target != ignored).sum() if reduction == _MEAN else total


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
    """Cross-entropy of (t / n, c, ..) logits: a pending sum; a mean is over all ranks' tokens.

    Or of logits split along a later dim. run: the op on this rank's tokens, where another axis
    splits the classes.
    """
    if reduction in (_MEAN, _COUNT):
        with torch.no_grad():
            if run is not None:
                own = run(logits, target, weight, _COUNT, ignored, smoothing)
            else:
                own = (target != ignored).sum()
            count = same_sum(own, group)
    if reduction == _COUNT:
        return count
    if run is not None:
        total = run(logits, target, weight, _SUM, ignored, smoothing)
    else:
        # The classes usually lie last in memory.
        rows = logits.movedim(1, -1).flatten(0, -2)
        total = functional.cross_entropy(
            rows, target.flatten(), ignore_index=ignored, reduction="sum"
        )
    if reduction == _MEAN:
        total = total / count
    return pending_sum(total, group)
