"""Hooks on the gradients of a model's parameters are carried over to the split model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from autoparallel.errors import AutoParallelError
from autoparallel.support.torch_private import gradient_hooks_of

__all__ = ["carry_gradient_hooks"]


def carry_gradient_hooks(model: nn.Module, split: nn.Module) -> None:
    """Register the hooks of the model's parameters on those of a split copy, in the same order.

    A hook runs there once in every backward pass, and gets the finished gradient, or the parameter,
    as a DTensor. One that is removed from the model's parameter later runs no more.
    Raises AutoParallelError for a hook that waits for several parameters of the model.

    >>> model, split = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> handle = model.weight.register_hook(lambda grad: grad * 0 + 5)
    >>> carry_gradient_hooks(model, split)
    >>> split(nn.Parameter(model.bias.detach())).sum().backward()
    >>> split.weight.grad
    tensor([[5.]])
    """
    done: set[int] = set()
    parameters = dict(split.named_parameters(remove_duplicate=False))
    for path, original in model.named_parameters(remove_duplicate=False):
        parameter = parameters[path]
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        on_tensor, after = gradient_hooks_of(original)
        for number, hook in (on_tensor or {}).items():
            _require_alone(hook, path)
            parameter.register_hook(_while_registered(hook, number, on_tensor))
        for number, hook in (after or {}).items():
            parameter.register_post_accumulate_grad_hook(_while_registered(hook, number, after))


def _while_registered(hook: Callable[..., Any], number: int, hooks: Any) -> Callable[..., Any]:
    """Return a hook that does nothing once the handle of the given one has removed it.

    number: its key among the original's hooks.
    """

    def carried(given: Any) -> Any:
        """Run the hook if the user has not removed it."""
        return hook(given) if number in hooks else None

    return carried


def _require_alone(hook: Any, path: str) -> None:
    """Raise AutoParallelError for a hook of torch.autograd.graph.register_multi_grad_hook.

    It counts the gradients of the tensors that it was registered for, which get none any more.
    """
    if getattr(hook, "__module__", "") == "torch.autograd.graph":
        raise AutoParallelError(
            "a hook on several parameters cannot be carried over",
            where=path,
            why="torch.autograd.graph.register_multi_grad_hook waits for gradients of the "
            "parameters as they were before the model was split",
            fix="register it for the parameters of the split model",
        )
