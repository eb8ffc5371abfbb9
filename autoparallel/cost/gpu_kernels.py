"""Ops that are one kernel on GPUs and several ops on CPUs, which save other tensors.

Calls are run on CPU tensors to see what autograd saves of them. Where torch chooses by the device
what an op is made of, a stand-in takes its place: it makes and saves what the kernel of GPUs does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["gpu_kernel"]


class _RmsNorm(torch.autograd.Function):
    """Torch's root mean square norm on GPUs, of which the operands and a factor per row are kept.

    On CPUs the operand in float32, and what is multiplied by the weight, are kept as well: four
    times the bytes of a bfloat16 operand.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None
    ) -> torch.Tensor:
        """Return memory for the result."""
        rows = x.shape[: x.dim() - len(shape)]
        double = x.dtype == torch.float64
        factors = x.new_empty(
            (*rows, *(1 for _ in shape)), dtype=torch.float64 if double else torch.float32
        )
        ctx.save_for_backward(x, weight, factors)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Return memory for the gradients."""
        x, weight, _ = ctx.saved_tensors
        return (
            torch.empty_like(x) if ctx.needs_input_grad[0] else None,
            None,
            torch.empty_like(weight) if ctx.needs_input_grad[2] else None,
        )


def _rms_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """Return memory for the norm of rows; for what has no kernel, run the ops it is made of."""
    mixed = weight is not None and weight.dtype != x.dtype
    if mixed or x.is_complex():
        return torch.rms_norm(x, shape, weight, eps)
    result: torch.Tensor = _RmsNorm.apply(x, shape, weight)
    return result


_KERNELS: dict[str, Callable[..., Any]] = {"aten.rms_norm.default": _rms_norm}


def gpu_kernel(target: str) -> Callable[..., Any] | None:
    """Return what stands for the kernel that GPUs have for an op; None where they save as CPUs do.

    >>> gpu_kernel("aten.linear.default") is None
    True
    """
    return _KERNELS.get(target)
