"""Tensors of which a dim that is not the first lies outermost in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["in_memory_order", "in_rows", "outer_dim", "to_back", "to_front"]


def outer_dim(tensor: torch.Tensor) -> int:
    """Return the dim that lies outermost in the memory of a tensor without gaps whose other dims
    follow in their order; 0 where that is the first one, and where there is none.

    The last dim is none: then the elements of a row would not lie side by side.

    >>> outer_dim(torch.zeros(2, 3, 4)), outer_dim(torch.zeros(3, 2, 4).transpose(0, 1))
    (0, 1)
    """
    if tensor.dim() < 3 or torch.compiler.is_compiling() or tensor.is_contiguous():
        return 0
    sizes, strides = tensor.shape, tensor.stride()
    if len(sizes) == 3 and strides == (sizes[2], sizes[0] * sizes[2], 1):
        return 1  # to look at the strides takes a part of the time that a view takes
    if tensor.transpose(0, 1).is_contiguous():
        return 1
    for dim in range(2, tensor.dim() - 1):
        if tensor.movedim(dim, 0).is_contiguous():
            return dim
    return 0


def to_front(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a tensor with a dim as its first one.

    >>> to_front(torch.zeros(2, 3, 4, 5), 2).shape
    torch.Size([4, 2, 3, 5])
    """
    # To exchange two dims takes a third of the time that it takes to move one.
    return tensor.transpose(0, 1) if dim == 1 else tensor.movedim(dim, 0)


def to_back(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a tensor with its first dim as another one: the inverse of `to_front`.

    >>> to_back(torch.zeros(4, 2, 3, 5), 2).shape
    torch.Size([2, 3, 4, 5])
    """
    return tensor.transpose(0, 1) if dim == 1 else tensor.movedim(0, dim)


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose rows, along the last dim, lie one behind the other in some order.

    What a product keeps for its backward pass is then the tensor, or a copy of it, and not the
    larger one that it may be a part of; and no gradient copies it again.

    >>> in_rows(torch.zeros(2, 3, 8)[..., :4]).is_contiguous()
    True
    >>> in_rows(torch.zeros(3, 2, 4)[:2].transpose(0, 1)).is_contiguous()  # one row was cut off
    True
    """
    if x.dim() < 3 or x.is_contiguous():
        return x
    is_whole = outer_dim(x) and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if is_whole else x.contiguous()


def in_memory_order(
    function: Callable[..., torch.Tensor], x: torch.Tensor, shape: Any, *arguments: Any
) -> torch.Tensor:
    """Return a norm over the last dims in the memory order of its operand.

    function: takes the operand, the sizes of these dims, and further arguments. Torch's norms copy
    an operand into the order of its dims, and so does every op that reads the result with others.

    >>> x = torch.randn(3, 2, 4).transpose(0, 1)
    >>> in_memory_order(torch.layer_norm, x, [4]).stride() == x.stride()
    True
    """
    dim = outer_dim(x)
    if not 0 < dim < x.dim() - len(shape):
        return function(x, shape, *arguments)
    return to_back(function(to_front(x, dim), shape, *arguments), dim)
