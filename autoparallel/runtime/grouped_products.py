"""Products of sorted rows with the matrices of their groups, as ops: torch's own takes few types.

They are closed under differentiation: each one's gradients are made of the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

__all__ = ["grouped_outer", "grouped_product"]


def _is_aligned(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether torch's own kernel takes the tensors: of bfloat16, with rows that are
    multiples of 16 bytes, and at least one.
    """
    widths = (x.size(1), weight.size(1), weight.size(2))
    halves = x.dtype == weight.dtype == torch.bfloat16
    return halves and x.size(0) > 0 and all(width > 0 and width % 8 == 0 for width in widths)


@torch.library.custom_op("autoparallel::grouped_product", mutates_args=())
def grouped_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each row with the matrix of its group.

    x: (t, k), sorted by group. weight: (e, k, n). ends: (e,), where the rows of each group end, as
    int32. The result is (t, n); rows behind the last end are zeros.

    >>> x, weight = torch.ones(3, 1), torch.tensor([[[2.0]], [[5.0]]])
    >>> grouped_product(x, weight, torch.tensor([1, 2], dtype=torch.int32)).flatten()
    tensor([2., 5., 0.])
    """
    result = x.new_zeros((x.size(0), weight.size(2)))
    start = 0
    for matrix, stop in zip(weight.unbind(0), ends.tolist(), strict=True):
        if stop > start:
            torch.mm(x[start:stop], matrix, out=result[start:stop])
        start = stop
    return result


@grouped_product.register_fake
def _product_shape(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return rows without numbers, for a trace."""
    return x.new_empty((x.shape[0], weight.shape[2]))


@torch.library.custom_op("autoparallel::grouped_outer", mutates_args=())
def grouped_outer(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return, for each group, the sum of x[i] y[i]^T over its rows: (e, k, n).

    x: (t, k). y: (t, n). ends: (e,), where the rows of each group end, as int32.

    >>> x, y = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [4.0]])
    >>> grouped_outer(x, y, torch.tensor([2, 3], dtype=torch.int32)).flatten()
    tensor([3., 4.])
    """
    result = x.new_zeros((ends.size(0), x.size(1), y.size(1)))
    start = 0
    for matrix, stop in zip(result.unbind(0), ends.tolist(), strict=True):
        if stop > start:
            torch.mm(x[start:stop].t(), y[start:stop], out=matrix)
        start = stop
    return result


@grouped_outer.register_fake
def _outer_shape(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return matrices without numbers, for a trace."""
    return x.new_empty((ends.shape[0], x.shape[1], y.shape[1]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep the operands for the backward pass."""
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, grad: torch.Tensor) -> Any:
    """Return the gradients of rows and matrices."""
    x, weight, ends = ctx.saved_tensors
    rows = matrices = None
    if ctx.needs_input_grad[0]:
        rows = grouped_product(grad, weight.transpose(1, 2), ends)
    if ctx.needs_input_grad[1]:
        matrices = grouped_outer(x, grad, ends)
    return rows, matrices, None


def _outer_gradients(ctx: Any, grad: torch.Tensor) -> Any:
    """Return the gradients of both rows."""
    x, y, ends = ctx.saved_tensors
    left = right = None
    if ctx.needs_input_grad[0]:
        left = grouped_product(y, grad.transpose(1, 2), ends)
    if ctx.needs_input_grad[1]:
        right = grouped_product(x, grad, ends)
    return left, right, None


grouped_product.register_autograd(_product_gradients, setup_context=_remember)
grouped_outer.register_autograd(_outer_gradients, setup_context=_remember)


class _WithContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient lies in memory as torch's grouped product wants it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return x itself, seen anew."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient with its elements in order."""
        return grad.contiguous()

    @staticmethod
    def spmd_typecheck(*, x: torch.Tensor) -> Any:
        """Return the type of the result for the checker of `spmd_types`: that of x."""
        return x


def multiply(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each row with the matrix of its group, by torch's kernel where it takes them.

    The arguments are those of `grouped_product`; what lies behind the last end may be anything.

    >>> x, weight = torch.ones(2, 1), torch.tensor([[[2.0]], [[5.0]]])
    >>> multiply(x, weight, torch.tensor([1, 2], dtype=torch.int32)).flatten()
    tensor([2., 5.])
    """
    if _is_aligned(x, weight):
        made: torch.Tensor = functional.grouped_mm(x, weight, offs=ends)
        result: torch.Tensor = _WithContiguousGradient.apply(made)
        return result
    return grouped_product(x, weight, ends)
