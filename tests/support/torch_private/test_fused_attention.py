"""Attention in blocks, and its gradients, are as the adapter says."""

from __future__ import annotations

import pytest
import torch

from autoparallel.support import torch_private


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_blocks_is_put_together_by_its_sums(masked: bool) -> None:
    """A block's gradients are right with the result and the sums of all keys."""
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(2, 3, n, 4).double() for n in (5, 7, 7, 5))
    mask = torch.randn(1, 1, 5, 7).double() if masked else None
    assert torch_private.has_attention_sums(query, value)
    assert not torch_private.has_attention_sums(query, value[..., :3])
    leaves = [each.requires_grad_() for each in (query, key, value)]
    whole = torch.nn.functional.scaled_dot_product_attention(*leaves, mask, scale=0.3)
    scores = query @ key.mT * 0.3 + (0 if mask is None else mask)
    expected = torch.autograd.grad(whole, leaves, grad)
    with torch.no_grad():
        parts = [slice(0, 4), slice(4, 7)]
        cuts = [None if mask is None else mask[..., part] for part in parts]
        blocks = [(query, key[..., part, :], value[..., part, :]) for part in parts]
        pairs = [
            torch_private.attention_and_sums(block, cut, False, 0.3)
            for block, cut in zip(blocks, cuts, strict=True)
        ]
        sums = torch.logaddexp(pairs[0][1], pairs[1][1])
        torch.testing.assert_close(sums, scores.logsumexp(-1))
        result = sum(part * (each - sums).exp().unsqueeze(-1) for part, each in pairs)
        torch.testing.assert_close(result, whole)
        gradients = [
            torch_private.attention_gradients(block, cut, False, 0.3, grad, whole, sums)
            for block, cut in zip(blocks, cuts, strict=True)
        ]
    torch.testing.assert_close(gradients[0][0] + gradients[1][0], expected[0])
    for at in (1, 2):
        torch.testing.assert_close(torch.cat([each[at] for each in gradients], 2), expected[at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operands_may_lie_in_any_order(dtype: torch.dtype) -> None:
    """Torch's kernel reads the elements of a row side by side, whatever the strides say."""
    torch.manual_seed(0)
    query, key, value, mask, grad = (
        torch.randn(2, 3, *sizes, dtype=dtype) for sizes in ((5, 4), (7, 4), (7, 4), (5, 7), (5, 4))
    )
    result, sums = torch_private.attention_and_sums((query, key, value), mask, False, 0.3)
    given = [query, key, value, mask, grad, result, sums]
    expected = _forward_and_back(given)
    turned = [each.mT.contiguous().mT for each in given]
    spread = [each[:, :, :1, :1].expand(each.shape) for each in given[:6]]
    for at in range(len(given)):
        again = _forward_and_back([*given[:at], turned[at], *given[at + 1 :]])
        torch.testing.assert_close(again, expected)
    for at in range(len(spread)):
        whole = [*given[:at], spread[at].contiguous(), *given[at + 1 :]]
        again = _forward_and_back([*given[:at], spread[at], *given[at + 1 :]])
        torch.testing.assert_close(again, _forward_and_back(whole))


def _forward_and_back(given: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the attention of query, key, value and mask, its sums, and the three gradients for a
    gradient of the result, the result and the sums."""
    *tensors, mask, grad, result, sums = given
    query, key, value = tensors
    ends = mask, False, 0.3
    forward = torch_private.attention_and_sums((query, key, value), *ends)
    back = torch_private.attention_gradients((query, key, value), *ends, grad, result, sums)
    return [*forward, *back]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_run_without_data(masked: bool, dtype: torch.dtype) -> None:
    """In place of row after row, and with results of the same shapes, types and strides."""
    given = [torch.randn(2, 3, n, 4, dtype=dtype) for n in (5, 7, 7, 5)]
    mask = torch.randn(1, 1, 5, 7, dtype=dtype) if masked else None
    assert torch_private.has_attention_sums(given[0].to("meta"), given[2].to("meta"))

    def run(device: str) -> list[torch.Tensor]:
        query, key, value, grad = (each.to(device) for each in given)
        cut = None if mask is None else mask.to(device)
        result, sums = torch_private.attention_and_sums((query, key, value), cut, False, 0.3)
        gradients = torch_private.attention_gradients(
            (query, key, value), cut, False, 0.3, grad, result, sums
        )
        return [result, sums, *gradients]

    for here, nowhere in zip(run("cpu"), run("meta"), strict=True):
        assert (here.shape, here.dtype) == (nowhere.shape, nowhere.dtype)
        assert here.stride() == nowhere.stride()
