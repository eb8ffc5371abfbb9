"""Results on the meta device are remembered where they follow from what is looked at."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoparallel.support import torch_private


class _Counts(TorchDispatchMode):
    """Counts the ops that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _looks(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.is_meta, tensor.storage_offset()


def _twice(forward: Callable[[], torch.Tensor]) -> tuple[list[torch.Tensor], list[str]]:
    """Return the results of two calls, and the ops that were run for the second."""
    with _Counts() as counts, torch_private.remembering_meta_results():
        first = forward()
        del counts.names[:]
        return [first, forward()], counts.names


X = torch.ones(6, 8, device="meta")
FORWARDS: dict[str, Callable[[], torch.Tensor]] = {
    "sum": lambda: X + 1,
    "transposed": lambda: X.t() * X.t(),
    "several results": lambda: torch.sort(X, dim=1)[1],
    "type": lambda: X.double() / 2,
    "whole numbers": lambda: torch.arange(6, device="meta") / 2,
    "product": lambda: F.linear(X, X),
    "norm": lambda: F.layer_norm(X, (8,)),
    "concatenation": lambda: torch.cat([X, X.double()]),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_second_call_is_not_run_and_looks_the_same(name: str) -> None:
    expected = FORWARDS[name]()
    results, run = _twice(FORWARDS[name])
    assert [_looks(result) for result in results] == [_looks(expected)] * 2
    assert results[0].untyped_storage() is not results[1].untyped_storage()
    # Views and new tensors without data cost nothing; what is computed is remembered.
    views = ("aten.t.", "aten.view.", "aten.arange.", "aten._unsafe_view.", "aten.detach.")
    made = ("aten.empty_strided.",)
    assert [name for name in run if not name.startswith(views + made)] == []


def test_kinds_of_operands_are_told_apart() -> None:
    """Types, strides and the kind of a number decide what comes of an op."""
    cases = [
        (x, number)
        for x in (X, X.double(), X.int(), X.t(), X[:, ::2])
        for number in (2, 2.0, True, 1, 1.0)
    ]
    expected = [_looks(x * number) for x, number in cases]
    with torch_private.remembering_meta_results():
        assert [_looks(x * number) for x, number in cases] == expected
        whole = torch.ones(3, dtype=torch.int64, device="meta")
        assert (whole / 2).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (whole / 2).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_views_and_writes_are_run() -> None:
    """A view shares the memory of what it is of, and a write is to its operand."""
    with torch_private.remembering_meta_results():
        for _ in range(2):
            x = torch.ones(4, device="meta")
            view = x.view(2, 2)
            assert torch_private.storage_key(view) == torch_private.storage_key(x)
            assert x.resize_(8).shape == x.shape == (8,)


def test_autograd_records_as_ever() -> None:
    layer = nn.Linear(8, 8, device="meta")
    with torch_private.remembering_meta_results():
        result = layer(layer(X))
    names: set[str] = set()
    todo = [result.grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [below for below, _ in node.next_functions if below is not None]
    assert names == {"AddmmBackward0", "TBackward0", "AccumulateGrad"}


def test_random_numbers_and_tensors_with_data_are_run() -> None:
    with _Counts() as counts, torch_private.remembering_meta_results():
        for _ in range(2):
            X.bernoulli()
            torch.ones(2) + 1
    assert counts.names.count("aten.bernoulli.default") == 2
    assert counts.names.count("aten.add.Tensor") == 2


def test_calls_of_programs_within_are_let_through() -> None:
    """Higher-order operators refuse modes that do not say so."""
    from torch.utils.checkpoint import checkpoint

    with torch_private.remembering_meta_results():
        for _ in range(2):
            flag = torch.tensor(True)
            result = torch.cond(flag, lambda x: x + 1, lambda x: x - 1, (torch.ones(2),))
            assert result.tolist() == [2.0, 2.0]
            layer = nn.Linear(8, 8, device="meta")
            assert checkpoint(layer, X, use_reentrant=False).shape == X.shape


def test_ops_that_return_less_than_tensors_are_run() -> None:
    """A gradient that nobody wants is None, and an assertion returns nothing."""
    images, kernel = torch.ones(2, 4, 8, device="meta"), torch.ones(4, 4, 3, device="meta")
    backward, options = torch.ops.aten.convolution_backward, ([1], [1], [1], False, [0], 1)
    with torch_private.remembering_meta_results():
        for _ in range(2):
            given = backward(images, images, kernel, None, *options, [True, True, False])
            assert [item is None for item in given] == [False, False, True]
            torch._assert_async(images.all())
