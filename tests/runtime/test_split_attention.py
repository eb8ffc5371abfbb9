"""What each rank computes of attention whose sequence is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoparallel.runtime.attention_blocks import Total, block, levelled, seen
from autoparallel.runtime.attention_work import Work, deal_of_sequence
from autoparallel.runtime.groups import AbsentGroup, SingleGroup
from autoparallel.runtime.split_attention import attention_queries


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_causal_mask_leaves_all_ranks_the_same_work(world_size: int, passes: bool) -> None:
    """With contiguous parts the last rank would have twice the mean. Nothing that is hidden is
    computed.
    """
    length = 24
    deal = deal_of_sequence(length, world_size, True)
    works = []
    for rank in range(world_size):
        work = Work(AbsentGroup(rank, world_size), True, 1.0, deal, deal, passes)
        seen = 0
        for step in range(work.steps):
            for _, rows, _, sight in work.blocks(step, None, torch.device("cpu")):
                queries = rows.stop - rows.start
                assert sight.mask is None
                assert not sight.causal or queries == sight.keys
                seen += queries * (queries + 1) // 2 if sight.causal else queries * sight.keys
        works.append(seen)
    assert works == [length * (length + 1) // 2 // world_size] * world_size


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 2, 7, 4), (1, 2, 5, 4), (1, 2, 5, 4)),
        ((1, 2, 7, 4), (3, 2, 5, 4), (3, 2, 5, 4)),
        ((3, 4, 7, 4), (3, 2, 5, 4), (3, 1, 5, 4)),
        ((3, 1, 7, 4), (3, 2, 5, 4), (3, 2, 5, 4)),
        ((3, 2, 7, 4), (5, 4), (3, 1, 5, 6)),
        ((2, 3, 2, 7, 4), (3, 2, 5, 4), (2, 5, 4)),
    ],
    ids=str,
)
def test_queries_keys_and_values_are_broadcast(shapes: tuple[tuple[int, ...], ...]) -> None:
    """As torch does it, which asks no fused kernel then."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    heads = [shape[-3] if len(shape) > 2 else 1 for shape in shapes]
    grouped = 1 < heads[1] < heads[0]
    whole = functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=grouped)
    result = attention_queries(
        *tensors, is_causal=True, enable_gqa=grouped, group=SingleGroup(), size=7
    )
    torch.testing.assert_close(result, whole, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(whole)
    pairs = (torch.autograd.grad((each * weights).sum(), tensors) for each in (result, whole))
    for gradient, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("least", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_queries_that_see_nothing_are_put_together_of_blocks(least: float) -> None:
    """Users hide keys by large numbers; of a query that sees none, torch gives the mean of all
    values, of whatever is left of its scores, or 0.
    """
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 4) for length in (3, 9, 9))
    mask = torch.zeros(1, 1, 3, 9).masked_fill(torch.rand(1, 1, 3, 9) > 0.5, least)
    mask[..., 1, :] = least
    level, added = levelled(query, mask)
    total = Total()
    for start, stop in ((0, 2), (2, 7), (7, 9)):
        sight = seen((0, 3), (start, stop), False, added, query.device)
        assert sight is not None
        pair = key[..., start:stop, :], value[..., start:stop, :]
        total.add(*block(level, *pair, sight, 0.5))
    assert total.result is not None
    whole = functional.scaled_dot_product_attention(query, key, value, mask)
    rows = [0, 2] if least == -torch.inf else [0, 1, 2]  # 0 is filled in at the end
    difference = (total.result - whole)[..., rows, :].abs().max()
    assert difference < (1e-3 if least == -1e4 else 1e-6)


def test_second_derivatives_where_a_rank_has_no_heads() -> None:
    """An outer axis may leave a rank none, which takes part as the others do."""
    tensors = [torch.ones(2, 0, 3, 4, requires_grad=True) for _ in range(3)]
    result = attention_queries(*tensors, is_causal=True, group=SingleGroup(), size=3)
    firsts = torch.autograd.grad(result.sum(), tensors, create_graph=True)
    sum(first.square().sum() for first in firsts).backward()
    assert [tuple(each.grad.shape) for each in tensors] == [(2, 0, 3, 4)] * 3


def test_second_derivatives_of_a_tensor_that_is_query_key_and_value() -> None:
    """Each place has its own gradient, and not that of all three."""

    def twice(attention: Any) -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(1, 2, 3, 4).requires_grad_()
        (first,) = torch.autograd.grad(attention(x).sin().sum(), x, create_graph=True)
        return [first, *torch.autograd.grad(first.pow(3).sum(), x)]

    def split(x: torch.Tensor) -> torch.Tensor:
        return attention_queries(x, x, x, is_causal=True, group=SingleGroup(), size=3)

    def plain(x: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    torch.testing.assert_close(twice(split), twice(plain), rtol=1e-10, atol=1e-12)
