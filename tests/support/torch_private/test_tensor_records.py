"""The adapter knows a tensor's memory, its holders, and sums over many tensors."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from autoparallel.support import torch_private


def test_an_assertion_on_the_device_fails_for_false() -> None:
    torch_private.assert_on_device(torch.tensor(True), "too large")
    with pytest.raises(RuntimeError):
        torch_private.assert_on_device(torch.tensor(False), "too large")


def test_the_memory_of_a_tensor_is_known_by_its_key() -> None:
    """Views have the key of what they are views of, also without data."""
    x, other = torch.zeros(2, 3), torch.zeros(2, 3)
    assert torch_private.storage_key(x) == torch_private.storage_key(x.t()[1:])
    assert torch_private.storage_key(x) == torch_private.storage_key(x.untyped_storage())
    assert torch_private.storage_key(x) != torch_private.storage_key(other)
    with torch_private.FakeTensorMode():
        fake, second = torch.empty(2, 3), torch.empty(2, 3)
        assert torch_private.storage_key(fake) == torch_private.storage_key(fake.view(6))
        assert torch_private.storage_key(fake) != torch_private.storage_key(second)


def test_a_weak_reference_keeps_the_key_of_memory_from_another() -> None:
    """The memory is freed, but nothing that is made later is taken for it."""
    x = torch.zeros(1000)
    key = torch_private.storage_key(x)
    reference = torch_private.StorageWeakRef(x.untyped_storage())
    assert not reference.expired()
    del x
    gc.collect()
    assert reference.expired()
    later = [torch.zeros(1000) for _ in range(100)]
    assert key not in {torch_private.storage_key(tensor) for tensor in later}


def test_a_wrapper_tensor_has_a_size_and_no_memory() -> None:
    class Described(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    size = torch.Size((10**6, 10**6))
    made = torch_private.wrapper_tensor(Described, size, torch.float64, torch.device("cpu"))
    assert isinstance(made, Described)
    assert (made.shape, made.dtype, made.device) == (size, torch.float64, torch.device("cpu"))


def test_who_holds_a_gradient_as_well_is_counted() -> None:
    """In C++, such as the other term of a sum for which it waits, or in Python."""

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
            ctx.name = name
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            counts[ctx.name] = torch_private.references_to(grad)
            each[ctx.name] = torch_private.references_to_each([grad])[0]
            return grad, None

    counts: dict[str, tuple[int, int]] = {}
    each: dict[str, tuple[int, int]] = {}
    leaf, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    given = torch.ones(2)
    (Counted.apply(leaf, "alone") * 2).sum().backward()
    (Counted.apply(leaf, "first") + Counted.apply(other, "second")).pow(2).sum().backward()
    Counted.apply(leaf, "given").backward(given)
    for counted in (counts, each):
        alone = counted.pop("alone")
        # The second runs first. When the first one does, nobody else has the gradient any more.
        assert counted.pop("first") == alone
        assert all(count != alone for count in counted.values())


def test_all_tensors_of_a_list() -> None:
    tensors = [torch.tensor([3.0, -4.0]), torch.ones(2, 2)]
    for order, expected in ((2.0, [5.0, 2.0]), (1.0, [7.0, 4.0]), (float("inf"), [4.0, 1.0])):
        norms = torch_private.norms_of(tensors, order, torch.float64)
        assert [float(norm) for norm in norms] == expected
        assert all(norm.dtype == torch.float64 for norm in norms)
    torch_private.multiply_all_(tensors, torch.tensor(2.0))
    assert tensors[0].tolist() == [6.0, -8.0]
    assert torch_private.laid_end_to_end(tensors).tolist() == [6.0, -8.0, 2.0, 2.0, 2.0, 2.0]
    alone = torch_private.laid_end_to_end(tensors[:1])
    assert alone.data_ptr() != tensors[0].data_ptr()  # one tensor is copied, too
    torch_private.copy_all_(tensors, [torch.zeros(2), torch.ones(2, 2)])
    assert [tensor.sum().item() for tensor in tensors] == [0.0, 4.0]


def test_parts_of_norms() -> None:
    """Clipping and loss scaling of torch call one of them with the gradients."""
    called: set[Any] = set()

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.add(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    parameter = nn.Parameter(torch.ones(3))
    for clip in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.get_total_norm):
        called.clear()
        parameter.grad = torch.ones(3).as_subclass(Watched)
        clip([parameter if clip is torch.nn.utils.clip_grad_norm_ else parameter.grad], 1.0)
        assert called & torch_private.parts_of_norms()
    assert hasattr(torch, "_amp_foreach_non_finite_check_and_unscale_")
