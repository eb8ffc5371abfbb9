"""Stand-ins: what an op that refuses nothing computes on, on a rank that holds nothing.

What comes of a stand-in is no part of the result, and must count as exactly nothing in the gradient
of every operand: a gradient of 0 times a derivative that is not finite would be nan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["shortened", "silenced", "some"]


class _StandIn(torch.autograd.Function):
    """Zeros in the place of a part without elements; no gradient comes back."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        ctx.shape = part.shape
        ctx.set_materialize_grads(False)
        return part.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        return None if grad is None else grad.new_zeros(ctx.shape), None


class _Silenced(torch.autograd.Function):
    """A tensor itself; its gradient is 0, whatever comes, where `silent` says so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, silent: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(silent)
        ctx.set_materialize_grads(False)
        return torch.ops.aten.alias(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        (silent,) = ctx.saved_tensors
        return None if grad is None else grad.masked_fill(silent, 0), None


def silenced(x: torch.Tensor, silent: torch.Tensor) -> torch.Tensor:
    """`x`, to which exactly no gradient comes back where `silent` (a truth value) says so."""
    if not x.requires_grad:
        return x
    made: torch.Tensor = _Silenced.apply(x, silent)
    return made


def some(
    operands: Sequence[torch.Tensor], split: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, ...]:
    """The operands of an op that refuses nothing; all stand in for others if one has nothing.

    split: per operand the dims of which this rank may hold nothing. There a stand-in has one place,
    of zeros. No operand then gets a gradient; yet each depends on what it stands for, so that the
    backward pass communicates on this rank as on others.
    """
    pairs = list(zip(operands, split, strict=True))
    if all(operand.size(dim) for operand, dims in pairs for dim in dims):
        return tuple(operands)
    made = []
    for operand, dims in pairs:
        shape = [1 if d in dims and not size else size for d, size in enumerate(operand.shape)]
        if shape != list(operand.shape):
            made.append(_StandIn.apply(operand, shape))
        else:
            made.append(silenced(operand, torch.ones((), dtype=torch.bool, device=operand.device)))
    return tuple(made)


def shortened(results: Any, held: Sequence[int], lengths: Sequence[Mapping[int, int]]) -> Any:
    """The results without what came of stand-ins, which is all of them where there were any.

    held: the sizes of which one is 0 where operands stand in for others. lengths: per result, its
    sizes by dim; what is left of a result is this rank's share of a pending sum: zeros.
    """
    if all(held):
        return results
    if isinstance(results, torch.Tensor):
        return _without(results, lengths[0])
    pairs = zip(results, lengths, strict=True)
    return tuple(_without(result, lengths) for result, lengths in pairs)


def _without(result: torch.Tensor, lengths: Mapping[int, int]) -> torch.Tensor:
    for dim, length in lengths.items():
        result = result if result.size(dim) == length else result.narrow(dim, 0, length)
    # A product with 0 would keep what is not a number.
    everything = torch.ones((), dtype=torch.bool, device=result.device)
    return result.masked_fill(everything, 0)
