"""Variances over a split dim, where numbers are special."""

from __future__ import annotations

import pytest
import torch
from calls import Call, fixed

from autoparallel.discovery.strategy_validation import derived, why_wrong
from autoparallel.rules.lookup import find_rule

OVERLOADS = {
    "aten.std.default": (),
    "aten.std.correction": ((0, 1),),
    "aten.std_mean.correction": ((0,),),
}


@pytest.mark.parametrize("target", OVERLOADS)
def test_equal_numbers_have_no_gradient(target: str) -> None:
    """That of a root at 0 would be nan."""
    numbers = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
    example = Call(target, (numbers, *OVERLOADS[target])).example()
    author = find_rule(target)
    assert author is not None
    rule = author(example.call)
    assert all(gradient.isfinite().all() for gradient in example.gradients.values())
    splits = [s for s in derived(example, rule, 2) if s.kernel is not None]
    assert splits
    assert not any(why_wrong(example, strategy, 2) for strategy in splits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_in_single_precision(dtype: torch.dtype) -> None:
    """As torch does: numbers far from 0 whose sum of squares would overflow."""
    numbers = (fixed(40, 30) * 8 + 200).to(dtype)
    example = Call("aten.var.default", (numbers,)).example()
    author = find_rule("aten.var.default")
    assert author is not None
    splits = [s for s in derived(example, author(example.call), 3) if s.kernel is not None]
    assert splits
    one_step = torch.finfo(dtype).eps
    assert not any(why_wrong(example, strategy, 3, None, one_step) for strategy in splits)
