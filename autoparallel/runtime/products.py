"""Products of activations with weights, and their gradients, each by a formula of its own.

Programs in which collectives run beside products compute the gradients of a product's two factors
at different times, so that torch's own backward pass, which computes both at once, is not used.
"""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.runtime.groups import Group
from autoparallel.support.torch_private import nn_binding

__all__ = ["MOST_PIECES", "Linear", "Mm", "bias_gradient", "piece_count", "summed_product"]

# A program may have put another function under the name; what that does is in the graph already.
_LINEAR = nn_binding("linear")


class Linear:
    """y[..., n] = sum_k x[..., k] w[n, k] + b[n]. of_x_and: of_x, added to what is there."""

    @staticmethod
    def matrix(weight: torch.Tensor) -> torch.Tensor:
        return weight.t()

    @staticmethod
    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = _LINEAR(x, weight, bias)
        return result

    @staticmethod
    def of_x(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return grad.matmul(weight.conj())

    @staticmethod
    def of_x_and(of_x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return _added(of_x, grad, weight.conj())

    @staticmethod
    def of_weight(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return _rows(grad).t().mm(_rows(x).conj())


class Mm:
    """C[m, n] = sum_k A[m, k] B[k, n]. of_x_and: of_x, added to what is there."""

    @staticmethod
    def matrix(weight: torch.Tensor) -> torch.Tensor:
        return weight

    @staticmethod
    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.mm(x, weight)

    @staticmethod
    def of_x(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return grad.mm(weight.t().conj())

    @staticmethod
    def of_x_and(of_x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return _added(of_x, grad, weight.t().conj())

    @staticmethod
    def of_weight(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return x.t().conj().mm(grad)


def _added(total: torch.Tensor, grad: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return total + grad @ matrix; in the memory of total, where nothing is recorded."""
    if torch.is_grad_enabled() or not total.is_contiguous():
        return total + grad.matmul(matrix)
    _rows(total).addmm_(_rows(grad), matrix)
    return total


def bias_gradient(grad: torch.Tensor, dims: int | None) -> torch.Tensor | None:
    """Return the gradient of a bias of so many dims that was added to all rows; None without."""
    if dims is None:
        return None
    # A sum over no dims is one over all of them.
    return grad.sum(tuple(range(grad.dim() - dims))) if grad.dim() > dims else grad


# A product is summed over the ranks in pieces of at least so many bytes, and in so many pieces at
# most: each piece pays the latency of a collective, which takes longer than that on slow links.
_PIECE_NBYTES, MOST_PIECES = 2**20, 4


def piece_count(nbytes: int) -> int:
    """Return in how many pieces a product of so many bytes on a rank is summed over the ranks.

    >>> piece_count(2**19), piece_count(2**21), piece_count(2**30)
    (1, 2, 4)
    """
    return max(1, min(MOST_PIECES, nbytes // _PIECE_NBYTES))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a matrix of its rows, of which there may be none, and which may be
    empty.
    """
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


def summed_product(kind: Any, x: torch.Tensor, weight: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the sum over the ranks of a product: pieces of it are summed while others are
    computed.
    """
    rows = _rows(x)
    matrix = kind.matrix(weight)
    total = x.new_empty((len(rows), matrix.size(1)))
    count = piece_count(total.nbytes)
    waits = []
    for part, result in zip(rows.chunk(count), total.chunk(count), strict=True):
        torch.mm(part, matrix, out=result)
        waits.append(group.start_all_reduce_(result))
    for wait in waits:
        wait()
    return total.view(*x.shape[:-1], matrix.size(1))
