"""Torch's records of a tensor: its memory, who holds it; and functions of many at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    pass

__all__ = [
    "assert_on_device",
    "copy_all_",
    "laid_end_to_end",
    "multiply_all_",
    "norms_of",
    "parts_of_norms",
    "references_to",
    "references_to_each",
    "storage_key",
    "wrapper_tensor",
]


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Fail where a tensor of one truth value is false, without a wait for the device.

    On a GPU the failure is reported by a later call.
    """
    torch._assert_async(condition, message)


def storage_key(held: torch.Tensor | torch.UntypedStorage) -> int:
    """Return the identity of a tensor's memory: equal for views of one another, fake ones too.

    It is the address of torch's record of the memory, which may be used again once that memory is
    gone (see StorageWeakRef).
    """
    storage = held.untyped_storage() if isinstance(held, torch.Tensor) else held
    return storage._cdata


def wrapper_tensor(
    kind: type[torch.Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Any:
    """Return a tensor of a subclass, with a shape, a type and a device but no memory of its own."""
    return torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)


@cache
def parts_of_norms() -> frozenset[Any]:
    """Return the functions with which torch's `clip_grad_norm_` and its loss scaling look at each
    gradient of many: what they find is put together over all gradients that they were given.
    """
    return frozenset(
        {
            torch.linalg.vector_norm,
            torch._foreach_norm,
            torch._amp_foreach_non_finite_check_and_unscale_,
        }
    )


def norms_of(
    tensors: Sequence[torch.Tensor], order: float, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return the p-norms of tensors, on a GPU by one kernel. dtype: in which they are summed."""
    return list(torch._foreach_norm(list(tensors), order, dtype=dtype))


def copy_all_(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each of some tensors into another one of its shape."""
    torch._foreach_copy_(list(targets), list(sources))


def laid_end_to_end(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a vector of the elements of some tensors of one type, in new memory."""
    if len(tensors) == 1:  # torch returns a view of it
        return torch.cat([tensors[0].reshape(-1)])
    vector: torch.Tensor = torch._C._nn.flatten_dense_tensors(list(tensors))
    return vector


def multiply_all_(tensors: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply tensors in place by one number, on a GPU by one kernel."""
    torch._foreach_mul_(list(tensors), factor)


def references_to(tensor: torch.Tensor) -> tuple[int, int]:
    """Return how many hold a tensor in C++, and how many do in Python, this call included.

    The numbers tell only in comparison with those of another tensor in the same place.
    """
    counted: Any = tensor
    return counted._use_count(), sys.getrefcount(tensor)


def references_to_each(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Return `references_to` each of some tensors, by a loop that runs in C.

    The numbers tell only in comparison with those of other tensors in the same place.
    """
    count: Any = torch.Tensor
    return list(zip(map(count._use_count, tensors), map(sys.getrefcount, tensors), strict=True))
