"""Ops have the schemas, kernels and derivatives that the adapter says they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autoparallel.support import torch_private

aten = torch.ops.aten


@torch.library.custom_op("private_names::scale", mutates_args=())
def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@torch.library.custom_op("private_names::plain", mutates_args=())
def plain(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def fake_scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


def keep_factor(ctx, inputs, output) -> None:
    ctx.factor = inputs[1]


def scale_backward(ctx, grad):
    return grad * ctx.factor, None


scale.register_fake(fake_scale)
scale.register_autograd(scale_backward, setup_context=keep_factor)


def test_an_op_has_one_schema_that_says_what_it_writes() -> None:
    schema = torch_private.schema_of(aten.add_.Tensor)
    assert schema.is_mutable
    assert [argument.name for argument in schema.arguments] == ["self", "other", "alpha"]
    assert schema.arguments[0].alias_info.is_write
    assert schema.arguments[1].alias_info is None
    assert schema.arguments[2].default_value == 1
    assert str(schema).startswith("aten::add_.Tensor(Tensor(a!) self")
    assert schema.name == "aten::add_"
    assert not torch_private.schema_of(aten.add.Tensor).is_mutable
    assert str(torch_private.schema_of(aten.split.Tensor).returns[0].type).startswith("List[")
    assert torch_private.schema_of(len) is None
    assert torch_private.schema_of(None) is None


def test_composite_ops_are_those_that_run_others() -> None:
    """hstack is defined by cat; cat by no other op."""
    assert torch_private.is_composite(aten.hstack.default)
    assert not torch_private.is_composite(aten.cat.default)
    x = torch.ones(2)
    assert torch.equal(aten.hstack.default.decompose([x, x]), torch.ones(4))


def test_the_dispatcher_tells_kernels_apart() -> None:
    """The text changes when an op is given another kernel."""
    library = torch.library.Library("private_names", "FRAGMENT")
    library.define("registered(Tensor x) -> Tensor")
    before = torch_private.dispatch_registrations("private_names::registered")
    library.impl("registered", lambda x: x.clone(), "CPU")
    after = torch_private.dispatch_registrations("private_names::registered")
    assert before != after
    assert "CPU" in after
    assert "CPU" not in before


def test_a_custom_op_shows_its_functions() -> None:
    assert torch_private.is_custom_op("private_names::scale")
    assert not torch_private.is_custom_op("aten::sin")
    functions = torch_private.custom_op_functions("private_names::scale")
    assert functions is not None
    kernel, fake, context, backward = functions
    assert kernel.__name__ == "scale"
    assert fake is fake_scale
    assert (context, backward) == (keep_factor, scale_backward)
    rest = torch_private.custom_op_functions("private_names::plain")
    assert rest is not None
    assert rest[1:] == (None, None, None)
    assert torch_private.custom_op_functions("aten::sin") is None


def test_functions_that_differentiate_custom_ops_are_recognized() -> None:
    """Torch makes one for each op, with the op's name in its own."""
    y = torch.ops.private_names.scale(torch.ones(2, requires_grad=True), 2.0)
    made = type(y.grad_fn)._forward_cls
    assert "private_names" in made.__name__
    assert torch_private.differentiates_custom_op(made)

    class Own(torch.autograd.Function):
        pass

    assert not torch_private.differentiates_custom_op(Own)


def test_custom_ops_say_whether_they_have_a_backward() -> None:
    assert torch_private.has_backward("private_names::scale")
    assert not torch_private.has_backward("private_names::plain")
    assert torch_private.has_backward("aten::sin")


def test_python_bindings_are_told_from_functions_around_them() -> None:
    """torch.split is written in Python around the op; torch.nn's ops have a module of their own."""
    assert torch_private.has_torch_binding("mm")
    assert torch_private.has_torch_binding("sin")
    assert not torch_private.has_torch_binding("linear")
    assert torch_private.nn_binding("linear") is nn.functional.linear
    assert torch_private.nn_binding("sin") is None
    binding = eval(f"{torch_private.NN_BINDINGS}.max_pool2d_with_indices", {"torch": torch})
    x = torch.rand(1, 4, 4)
    for made, expected in zip(
        binding(x, 2), aten.max_pool2d_with_indices.default(x, 2), strict=True
    ):
        assert torch.equal(made, expected)


def test_kernels_for_tensors_without_device() -> None:
    own = [aten.mm.default, aten.add.Tensor, aten.sum.dim_IntList]
    assert all(map(torch_private.has_meta_kernel, own))
    others = [aten.linear.default, aten.matmul.default, aten.slice.Tensor, aten.softmax.int]
    assert not any(map(torch_private.has_meta_kernel, others))


def test_truncated_normal_replaced() -> None:
    """Within, the function is asked for every fill; afterwards torch's own is back."""
    seen = []

    def note(original: Any, tensor: torch.Tensor, *bounds: float, generator: Any) -> torch.Tensor:
        seen.append((bounds, generator))
        return original(tensor, *bounds, generator=generator)

    weight = torch.empty(100)
    with torch_private.truncated_normal_replaced(note):
        torch.nn.init.trunc_normal_(weight, std=3.0, a=-1.0, b=2.0)
    assert seen == [((0.0, 3.0, -1.0, 2.0), None)]
    assert -1.0 <= float(weight.min()) < 0 < float(weight.max()) <= 2.0
    torch.nn.init.trunc_normal_(weight)
    assert len(seen) == 1
