"""Derivatives of what a rank that holds nothing computes are there as on the others."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional

from autoparallel.runtime.kernels import attention, embedding, repeat

SHAPES = [(0, 4, 5, 3), (2, 0, 5, 3), (2, 4, 0, 3), (0, 5, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_gradients_reach_what_they_depend_on(shape: tuple[int, ...]) -> None:
    """Else the rank leaves out what the others send. Torch 2.13 gives them no graph."""
    query, key, value = (torch.ones(shape, requires_grad=True) for _ in range(3))
    result = attention(query, key, value)
    assert result.shape == shape
    weight = torch.ones_like(result, requires_grad=True)
    gradients = torch.autograd.grad(result, (query, key, value), weight, create_graph=True)
    for (name, one), other in product(zip("qkv", gradients, strict=True), (query, key, weight)):
        (second,) = torch.autograd.grad(one.sum(), other, retain_graph=True, allow_unused=True)
        assert second is not None, name


@pytest.mark.parametrize("heads", [4, 2])
def test_where_there_is_something_it_is_torchs(heads: int) -> None:
    query, key, value = torch.randn(2, 4, 5, 3), *torch.randn(2, 2, heads, 5, 3).unbind()
    options = {"is_causal": True, "enable_gqa": heads != 4}
    expected = functional.scaled_dot_product_attention(query, key, value, None, 0.0, **options)
    assert torch.equal(attention(query, key, value, None, 0.0, **options), expected)


def test_heads_that_are_shared() -> None:
    """Of a batch of nothing, each key is repeated for its queries."""
    query, key = torch.ones(0, 4, 5, 3), torch.ones(0, 2, 5, 3)
    assert attention(query, key, key, enable_gqa=True).shape == (0, 4, 5, 3)


@pytest.mark.parametrize("rows", [0, 2])
def test_look_ups(rows: int) -> None:
    """Torch 2.13 cannot reshape what comes back for no tokens."""
    weight = torch.randn(5, 3, requires_grad=True)
    index = torch.arange(4 * rows).view(rows, 4) % 5
    result = embedding(weight, index, 1)
    assert torch.equal(result, functional.embedding(index, weight, 1))
    given = torch.ones_like(result, requires_grad=True)
    (first,) = torch.autograd.grad(result, weight, given, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), given)
    assert second.shape == result.shape


@pytest.mark.parametrize("times", [(0, 3), (2, 0), (0, 0), (2, 3), (3,)])
def test_repetitions(times: tuple[int, ...]) -> None:
    """Of no repetitions, torch 2.13 gives zeros that depend on nothing as the gradient."""
    x = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    result = repeat(x, times)
    assert torch.equal(result, x.tile(times))
    given = torch.randn_like(result, requires_grad=True)
    (first,) = torch.autograd.grad(result, x, given, create_graph=True)
    assert torch.allclose(first, torch.autograd.grad(x.tile(times), x, given)[0])
    (second,) = torch.autograd.grad(first.square().sum(), given)
    assert second.shape == result.shape
