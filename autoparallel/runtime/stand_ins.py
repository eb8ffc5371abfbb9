"""Stand-ins: the operands on which an op computes on a rank that holds no elements.

An op that is split may leave a rank with nothing, and many of torch's ops refuse a dim of size 0.
They are given one place of zeros there instead. A stand-in's result is no part of the op's result,
and must count as exactly nothing in the gradient of every operand: a gradient of 0 times a
derivative that is not finite would be nan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autoparallel.support.torch_private import run_when_ready

__all__ = ["silenced", "stand_ins_for", "without_stand_ins"]


class _StandIn(torch.autograd.Function):
    """Zeros in the place of a part without elements, to which no gradient comes back."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return zeros of `shape`."""
        ctx.shape = part.shape
        ctx.set_materialize_grads(False)
        return part.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        """Return no elements, as the part had none.

        What is returned depends on the gradient, as on ranks that hold something, so that the
        derivative of the backward pass communicates alike on all of them.
        """
        return None if grad is None else _StandIn.apply(grad, ctx.shape), None


class _Silenced(torch.autograd.Function):
    """A tensor itself, whose gradient is 0, whatever comes, where `silent` says so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, silent: torch.Tensor) -> torch.Tensor:
        """Return x, as a new tensor on the same memory."""
        ctx.save_for_backward(silent)
        ctx.set_materialize_grads(False)
        return torch.ops.aten.alias(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        """Return the gradient, or zeros where it is silenced."""
        (silent,) = ctx.saved_tensors
        # Filled, not multiplied: 0 times inf or nan would be nan.
        return None if grad is None else grad.masked_fill(silent, 0), None


def silenced(x: torch.Tensor, silent: torch.Tensor) -> torch.Tensor:
    """Return `x`, to which exactly no gradient comes back where `silent` says so.

    silent: a tensor of one truth value, which may be known on the device only.

    >>> x = torch.ones(2, requires_grad=True)
    >>> (silenced(x, torch.tensor(True)) * float("inf")).sum().backward()
    >>> x.grad
    tensor([0., 0.])
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return _at_once(_Silenced.apply(x, silent))


def _at_once(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose gradient passes the step that made it as soon as it comes.

    Other ranks have no such step. Here it must not change the order in which gradients arrive at
    parameters, because some are reduced on arrival, on all ranks together. In a compiled program
    they all arrive together.
    """
    if not torch.compiler.is_compiling() and tensor.grad_fn is not None:
        run_when_ready(tensor)
    return tensor


def stand_ins_for(
    operands: Sequence[torch.Tensor], split: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, ...]:
    """Return the operands of an op that refuses a dim of size 0; all stand in for others if one has
    no elements.

    operands: of this rank. split: per operand the dims of which this rank may hold nothing. There a
    stand-in has one place, of zeros. No operand then gets a gradient; yet each depends on the
    operand that it stands for, so that the backward pass communicates on this rank as on others.

    >>> operands = stand_ins_for([torch.ones(0, 2), torch.ones(3)], [[0], []])
    >>> [tuple(operand.shape) for operand in operands]
    [(1, 2), (3,)]
    """
    pairs = list(zip(operands, split, strict=True))
    if all(operand.size(dim) for operand, dims in pairs for dim in dims):
        return tuple(operands)
    stand_ins = []
    for operand, dims in pairs:
        shape = [1 if d in dims and not size else size for d, size in enumerate(operand.shape)]
        if shape != list(operand.shape):
            stand_ins.append(_at_once(_StandIn.apply(operand, shape)))
        else:
            stand_ins.append(
                silenced(operand, torch.ones((), dtype=torch.bool, device=operand.device))
            )
    return tuple(stand_ins)


def without_stand_ins(
    results: Any, held: Sequence[int], lengths: Sequence[Mapping[int, int]]
) -> Any:
    """Return an op's results without the elements that came of stand-ins.

    results: a tensor or several. held: the sizes of the operands' split dims; one of them is 0
    where operands stand in for others, and then nothing of the results counts. lengths: per result,
    the sizes by dim that it would have without stand-ins. It is cut to them and filled with zeros,
    which are this rank's share of a pending sum.

    >>> without_stand_ins(torch.ones(1, 2), [0], [{0: 0}]).shape
    torch.Size([0, 2])
    >>> without_stand_ins(torch.ones(1, 2), [0], [{}])
    tensor([[0., 0.]])
    """
    if all(held):
        return results
    if isinstance(results, torch.Tensor):
        return _without(results, lengths[0])
    pairs = zip(results, lengths, strict=True)
    return tuple(_without(result, lengths) for result, lengths in pairs)


def _without(result: torch.Tensor, lengths: Mapping[int, int]) -> torch.Tensor:
    """Return zeros of a result's shape, cut to `lengths` by dim."""
    for dim, length in lengths.items():
        result = result if result.size(dim) == length else result.narrow(dim, 0, length)
    # A product with 0 would keep what is not a number.
    everything = torch.ones((), dtype=torch.bool, device=result.device)
    return result.masked_fill(everything, 0)
