"""What the adapter knows of backward passes holds on this release of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from autoparallel.support import torch_private


def test_the_function_of_backward_hooks_is_known() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.register_full_backward_hook(lambda *_: None)
    y = layer(torch.ones(1, 2, requires_grad=True))
    assert torch_private.carries_backward_hooks(type(y.grad_fn)._forward_cls)
    assert not torch_private.carries_backward_hooks(torch.autograd.Function)


def test_a_function_that_is_applied_directly_is_recorded() -> None:
    """What its forward gets is what was passed, numbers and lists included."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factors):
            ctx.factors = factors
            return x * factors[0]

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factors[0], None

    x = torch.ones(2, requires_grad=True)
    result = torch_private.apply_directly(Scaled)(x, [3.0])
    result.sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_a_backward_pass_knows_itself() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch_private.in_backward()))
    loss = (x * x).sum()
    assert not torch_private.in_backward()
    loss.backward()
    assert seen == [True]
    assert not torch_private.in_backward()


def test_a_call_is_made_when_the_backward_pass_has_ended() -> None:
    order = []
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))

    def hook(grad):
        torch_private.at_end_of_backward(lambda: order.append("end"))

    x.register_hook(hook)
    x.register_post_accumulate_grad_hook(lambda _: order.append("x"))
    y.register_post_accumulate_grad_hook(lambda _: order.append("y"))
    (y.sin() * x).sum().backward()
    assert sorted(order[:2]) == ["x", "y"]
    assert order[2:] == ["end"]


def test_backward_passes_have_numbers() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch_private.backward_pass()))
    for _ in range(2):
        (x * x).sum().backward()
    assert torch_private.backward_pass() == -1
    assert len({-1, *seen}) == 3


class Kept(torch.autograd.Function):
    """The identity, whose backward notes its name and whether gradients are accumulated."""

    @staticmethod
    def forward(ctx, x, name, notes):
        ctx.name, ctx.notes = name, notes
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        node = ctx.next_functions[0][0]
        adds = torch_private.will_accumulate(node)
        assert torch_private.will_accumulate_all([node, node]) == adds
        ctx.notes.append((ctx.name, adds))
        return grad, None, None


def test_a_backward_pass_says_whether_it_accumulates() -> None:
    """And a node that keeps nothing serves any number of passes."""
    notes = []
    x = torch.ones(2, requires_grad=True)
    kept = Kept.apply(x, "x", notes)
    kept.sum().backward()
    kept.sum().backward(inputs=[x])
    torch.autograd.grad(kept.sum(), x)
    assert [adds for _, adds in notes] == [True, True, False]
    assert torch.equal(x.grad, torch.full((2,), 2.0))


def test_a_backward_pass_says_which_gradients_it_returns() -> None:
    """Of two leaves that one node passes gradients to."""
    notes = []

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x + y

        @staticmethod
        def backward(ctx, grad):
            nodes = [node for node, _ in ctx.next_functions]
            notes.append([torch_private.is_returned(node) for node in nodes])
            return grad, grad

    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    both = Both.apply(x, y)
    torch.autograd.grad(both.sum(), x, retain_graph=True)
    torch.autograd.grad(both.sum(), [x, y], retain_graph=True)
    both.sum().backward(inputs=[y], retain_graph=True)
    both.sum().backward()
    assert notes == [[True, False], [True, True], [False, False], [False, False]]


def test_a_node_runs_when_it_is_ready() -> None:
    """Before all that was recorded later, and in the order of the places."""
    notes = []
    x, y, z = (torch.ones(2, requires_grad=True) for _ in range(3))
    kept = [Kept.apply(x, "x", notes), Kept.apply(y, "y", notes)]
    for place, tensor in zip((2, 1), kept, strict=True):
        torch_private.run_when_ready(tensor, place)
    later = Kept.apply(z, "later", notes)
    torch.stack([later.sin(), *kept]).sum().backward()
    assert [name for name, _ in notes] == ["y", "x", "later"]


def test_a_node_runs_in_the_place_of_another() -> None:
    """Those that were recorded later come before it, and those that were recorded before after."""
    notes = []
    leaves = [torch.ones(2, requires_grad=True) for _ in range(3)]
    first, second = (
        Kept.apply(x, name, notes) for x, name in zip(leaves, ("first", "second"), strict=False)
    )
    moved = Kept.apply(leaves[2], "moved", notes)
    torch_private.run_in_place(moved, torch_private.place_in_backward(first))
    torch_private.run_in_place(first, 0)
    torch.stack([moved, first, second]).sum().backward()
    assert [name for name, _ in notes] == ["second", "moved", "first"]


def test_hooks_on_a_gradient_lie_in_dictionaries() -> None:
    """By the numbers of their handles. What is written there runs in place of the hook."""
    x = torch.ones(2, requires_grad=True)
    assert torch_private.gradient_hooks_of(x) == (None, None)
    assert not torch_private.have_gradient_hooks([x, torch.ones(1)])
    ran = []
    handle = x.register_hook(lambda grad: ran.append("first"))
    assert torch_private.have_gradient_hooks([torch.ones(1), x])
    x.register_post_accumulate_grad_hook(lambda x: ran.append("second"))
    on_tensor, after = torch_private.gradient_hooks_of(x)
    assert list(on_tensor) == [handle.id]
    assert len(after) == 1
    on_tensor[handle.id] = lambda grad: ran.append("other")
    x.sum().backward()
    assert ran == ["other", "second"]
    handle.remove()
    assert not torch_private.gradient_hooks_of(x)[0]


def test_hooks_on_saved_tensors_are_noticed() -> None:
    assert not torch_private.saved_tensors_hooks_are_set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert torch_private.saved_tensors_hooks_are_set()
    assert not torch_private.saved_tensors_hooks_are_set()


REGISTRATIONS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
)


@pytest.mark.parametrize("registration", REGISTRATIONS)
def test_a_registered_hook_is_in_a_dictionary_of_its_module_and_makes_a_handle(
    registration: str,
) -> None:
    """The handle is one more of those of the process, whatever else registers hooks."""
    module = nn.Linear(2, 2)
    dictionaries = torch_private.call_hooks_of([module])
    handles = torch_private.hook_handles_so_far()
    handle = getattr(module, registration)(lambda *_: None)
    assert sum(map(len, dictionaries)) == 1
    assert torch_private.hook_handles_so_far() == handles + 1
    handle.remove()
    assert sum(map(len, dictionaries)) == 0


def test_forward_gradients() -> None:
    from torch.autograd import forward_ad

    assert not torch_private.forward_gradients_are_on()
    with forward_ad.dual_level():
        assert torch_private.forward_gradients_are_on()
    assert not torch_private.forward_gradients_are_on()


def test_global_hooks() -> None:
    seen: list[int] = []
    modules: Any = nn.modules.module
    for place, kind in enumerate(("forward_pre", "forward", "full_backward_pre", "full_backward")):
        handle = getattr(modules, f"register_module_{kind}_hook")(lambda *_: seen.append(1))
        assert [len(hooks) for hooks in torch_private.global_call_hooks()] == [
            int(index == place) for index in range(4)
        ]
        handle.remove()
    optimizers: Any = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
    for place, register in enumerate(optimizers):
        before = [len(hooks) for hooks in torch_private.global_step_hooks()]
        handle = register(lambda *_: None)
        after = [len(hooks) for hooks in torch_private.global_step_hooks()]
        assert [b - a for a, b in zip(before, after, strict=True)] == [
            int(index == place) for index in range(2)
        ]
        handle.remove()
