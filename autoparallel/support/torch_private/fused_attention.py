"""Fused attention that also returns the logarithms of its sums, by which results of several blocks
of keys are put together.
"""

from __future__ import annotations

import torch

__all__ = ["attention_and_sums", "attention_gradients", "has_attention_sums"]

# The widest heads that the kernels for GPUs take, and what their width must be a multiple of.
_WIDEST, _MULTIPLE = 256, 8
# On GPUs, rows of masks begin at multiples of so many elements, and sums are kept for a multiple of
# so many queries.
_ALIGNED, _SUMS = 16, 32

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def has_attention_sums(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Say whether torch has a fused kernel for such tensors that returns its sums; without data it
    is that of CPUs.

    >>> has_attention_sums(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4))
    True
    """
    width = query.size(-1)
    if value.size(-1) != width or query.device.type not in ("cpu", "cuda", "meta"):
        return False
    half = query.dtype in (torch.float16, torch.bfloat16)
    return not query.is_cuda or (half and width <= _WIDEST and width % _MULTIPLE == 0)


def attention_and_sums(
    tensors: Tensors, mask: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention, (b, n, s, d), and the logarithms of its sums, (b, n, s).

    tensors: query (b, n, s, d), key and value (b, n, t, d), with elements, for which
    `has_attention_sums` says yes. mask: numbers of their type to be added to the scores, of which
    every dim may be 1; None for none. causal: whether a query sees keys up to its own place; there
    are as many of both then, and no mask.

    >>> x = torch.ones(1, 1, 2, 4)
    >>> attention_and_sums((x, x, x), None, False, 0.25)[1].exp() / 2  # e ** (4 * 0.25)
    tensor([[[2.7183, 2.7183]]])
    """
    query, key, value = map(_in_rows, tensors)
    tensors = query, key, value
    if not query.is_cuda:
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *tensors, 0.0, causal, attn_mask=_wide(mask, query, key), scale=scale
        )
        return result, sums
    if mask is None:
        some = torch.ops.aten._scaled_dot_product_flash_attention(
            *tensors, 0.0, causal, False, scale=scale
        )
    else:
        added = _aligned(mask, query, key)
        some = torch.ops.aten._scaled_dot_product_efficient_attention(
            *tensors, added, True, 0.0, causal, scale=scale
        )
    return some[0], some[1][..., : query.size(-2)]


def attention_gradients(
    tensors: Tensors,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    grad: torch.Tensor,
    result: torch.Tensor,
    sums: torch.Tensor,
) -> Tensors:
    """Return the gradients of query, key and value. The first arguments are `attention_and_sums`'.

    grad: of the result. result, sums: of a block of the keys, those of all keys: then the gradients
    are what the block has of them.

    >>> x = torch.ones(1, 1, 2, 4)
    >>> result, sums = attention_and_sums((x, x, x), None, False, 0.25)
    >>> attention_gradients((x, x, x), None, False, 0.25, result, result, sums)[2].sum()
    tensor(8.)
    """
    query, key, value = map(_in_rows, tensors)
    tensors, grad, result = (query, key, value), _in_rows(grad), _in_rows(result)
    if not query.is_cuda:
        some = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(grad, *tensors, result, sums, 0.0, causal),
            attn_mask=_wide(mask, query, key),
            scale=scale,
        )
        return some[0], some[1], some[2]
    # A random state, which is not read where nothing is dropped.
    if mask is None:
        state = query.new_zeros((2,), dtype=torch.uint64)
        longest = query.size(-2), key.size(-2)
        some = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(grad, *tensors, result, sums.contiguous(), None, None, *longest, 0.0, causal),
            *(state, state[:0]),
            scale=scale,
        )
        return some[0], some[1], some[2]
    number = torch.zeros((), dtype=torch.int64)
    sums = torch.constant_pad_nd(sums, (0, -query.size(-2) % _SUMS))
    some = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *(grad, *tensors, _aligned(mask, query, key), result, sums),
        *(number, number, 0.0, [True, True, True, False], causal),
        scale=scale,
    )
    return some[0], some[1], some[2]


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose elements of a row lie side by side: the kernels take that for granted,
    and read other memory where it is not so.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return a mask for each query and key."""
    return mask if mask is None else mask.expand(-1, -1, query.size(-2), key.size(-2))


def _aligned(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return a mask for each head, query and key, whose rows begin where GPUs want them."""
    keys = key.size(-2)
    mask = mask.expand(-1, -1, -1, keys)
    mask = torch.constant_pad_nd(mask, (0, -keys % _ALIGNED))[..., :keys]
    return mask.expand(*query.shape[:-1], keys)
