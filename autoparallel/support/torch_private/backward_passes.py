"""Backward passes that run: their order and their ends; and hooks on gradients and modules."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    pass

__all__ = [
    "apply_directly",
    "at_end_of_backward",
    "backward_pass",
    "call_hooks_of",
    "carries_backward_hooks",
    "forward_gradients_are_on",
    "global_call_hooks",
    "global_step_hooks",
    "gradient_hooks_of",
    "have_gradient_hooks",
    "hook_handles_so_far",
    "in_backward",
    "is_returned",
    "place_in_backward",
    "run_in_place",
    "run_when_ready",
    "saved_tensors_hooks_are_set",
    "will_accumulate",
    "will_accumulate_all",
]


def in_backward() -> bool:
    """Return whether this thread runs inside of a backward pass."""
    return backward_pass() != -1


def apply_directly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` for calls outside of transforms of torch.func, which it looks for,
    operand by operand, before each of them.

    >>> class Double(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         return x * 2
    ...     @staticmethod
    ...     def backward(ctx, grad):
    ...         return grad * 2
    >>> x = torch.ones(2, requires_grad=True)
    >>> apply_directly(Double)(x).sum().backward()
    >>> x.grad
    tensor([2., 2.])
    """
    direct: Any = super(torch.autograd.Function, function)
    apply: Callable[..., Any] = direct.apply
    return apply


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now has ended.

    Raises RuntimeError outside of a backward pass.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)


def backward_pass() -> int:
    """Return the number of the backward pass that runs now in this thread, -1 where none does."""
    return torch._C._current_graph_task_id()


def will_accumulate(node: Any) -> bool:
    """Return whether the backward pass that runs now adds to the `grad` of a leaf.

    node: the leaf's own node, AccumulateGrad. torch.autograd.grad returns gradients instead.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it says that it does not tell of leaves under torch.autograd.grad
        return False


def will_accumulate_all(nodes: Sequence[Any]) -> bool:
    """Return whether `will_accumulate` holds for all nodes, by a loop that runs in C."""
    try:
        return all(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:  # as there
        return False


def is_returned(node: Any) -> bool:
    """Return whether the torch.autograd.grad that runs now returns the gradient of a leaf.

    node: the leaf's own node, AccumulateGrad. Others get none in that pass.
    """
    try:
        torch._C._will_engine_execute_node(node)
    except RuntimeError:  # as in `will_accumulate`
        return True
    return False


def run_when_ready(tensor: torch.Tensor, place: int = 0) -> None:
    """Have a backward pass run the node that made a tensor as soon as its gradients are there.

    Nodes that were recorded last are run first; this one runs before all of those. place: among
    such nodes that are ready at once, the lowest runs first.
    """
    node: Any = tensor.grad_fn
    node._set_sequence_nr(2**64 - 1 - place)


def place_in_backward(tensor: torch.Tensor) -> int:
    """Return the number of the node that made a tensor; higher ones run earlier in a backward
    pass.
    """
    node: Any = tensor.grad_fn
    place: int = node._sequence_nr()
    return place


def run_in_place(tensor: torch.Tensor, place: int) -> None:
    """Have a backward pass run the node that made a tensor as if it were recorded with that number.

    place: from `place_in_backward`, of some other node.
    """
    node: Any = tensor.grad_fn
    node._set_sequence_nr(place)


def gradient_hooks_of(parameter: torch.Tensor) -> tuple[Any, Any]:
    """Return the dictionaries of the hooks on a leaf's gradient, None where there never was one.

    The first holds those that may change the gradient, the second those that run when it was added.
    """
    return parameter._backward_hooks, parameter._post_accumulate_grad_hooks


def have_gradient_hooks(parameters: Sequence[torch.Tensor]) -> bool:
    """Return whether any of some leaves has hooks on its gradient, by loops that run in C."""
    return any(map(_ON_TENSOR, parameters)) or any(map(_AFTER, parameters))


_ON_TENSOR = operator.attrgetter("_backward_hooks")
_AFTER = operator.attrgetter("_post_accumulate_grad_hooks")


def saved_tensors_hooks_are_set() -> bool:
    """Return whether torch.autograd.graph.saved_tensors_hooks are in force here."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def forward_gradients_are_on() -> bool:
    """Return whether forward-mode derivatives are computed here, as within a `dual_level`."""
    return torch.autograd.forward_ad._current_level >= 0


def global_call_hooks() -> tuple[dict[int, Any], ...]:
    """Return the dictionaries of the hooks that run around the calls of all modules."""
    module: Any = torch.nn.modules.module
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return tuple([getattr(module, f"_global_{kind}") for kind in kinds])


def global_step_hooks() -> tuple[dict[int, Any], ...]:
    """Return the dictionaries of the hooks that run around the steps of all optimizers."""
    from torch.optim import optimizer

    module: Any = optimizer
    return module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks


def call_hooks_of(modules: Iterable[torch.nn.Module]) -> tuple[dict[int, Any], ...]:
    """Return the dictionaries in which modules keep the hooks around a call and its backward."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return tuple([vars(module)[kind] for module in modules for kind in kinds])


def carries_backward_hooks(function: Any) -> bool:
    """Return whether it is the Function by which hooks run around a module's backward pass."""
    from torch.nn.modules._functions import BackwardHookFunction

    return function is BackwardHookFunction


def hook_handles_so_far() -> int:
    """Return how many handles this process has made: every registered hook makes one."""
    return torch.utils.hooks.RemovableHandle.next_id
