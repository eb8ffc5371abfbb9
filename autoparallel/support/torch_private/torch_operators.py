"""Ops as torch defines them: their schemas, their kernels and their bindings in Python."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    pass

__all__ = [
    "NN_BINDINGS",
    "custom_op_functions",
    "differentiates_custom_op",
    "dispatch_registrations",
    "has_backward",
    "has_meta_kernel",
    "has_torch_binding",
    "is_composite",
    "is_custom_op",
    "nn_binding",
    "schema_of",
    "truncated_normal_replaced",
]

# Functions of torch that are written in Python and take what their ops take, in the same order.
_ALIKE = frozenset({"norm", "split"})

# The text by which a program calls those of torch's Python bindings that have no public name.
NN_BINDINGS = "torch._C._nn"


def schema_of(operation: Any) -> Any:
    """Return the schema of an op: its arguments, its results, its writes. None for other functions.

    >>> schema_of(torch.ops.aten.relu.default).name
    'aten::relu'
    """
    return getattr(operation, "_schema", None)


def is_composite(operation: Any) -> bool:
    """Return whether torch defines the op by other ops, which `operation.decompose` runs."""
    return bool(operation._can_decompose())


def has_meta_kernel(operation: Any) -> bool:
    """Return whether an op has a kernel of its own for tensors without device, and is not made of
    others.

    operation: an overload, such as torch.ops.aten.mm.default.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name = operation.name()
    return has(name, "Meta") and not has(name, "CompositeImplicitAutograd")


def dispatch_registrations(name: str) -> str:
    """Return the dispatcher's text about the kernels of an op. name: as in "aten::add.Tensor"."""
    return torch._C._dispatch_dump(name)


def _custom_op(name: str) -> Any:
    """Return the definition of an op that was made by torch.library.custom_op, else None."""
    return import_module("torch._library.custom_ops").OPDEFS.get(name)


def is_custom_op(name: str) -> bool:
    """Return whether an op was made by torch.library.custom_op. name: as in "mylib::scale"."""
    return _custom_op(name) is not None


def custom_op_functions(name: str) -> tuple[Any, Any, Any, Any] | None:
    """Return the Python functions of a torch.library.custom_op, None for other ops.

    name: as in "mylib::scale". They are the kernel, the fake kernel, the function that sets up the
    context, and the backward; each is None where the op has none.
    """
    definition = _custom_op(name)
    if definition is None:
        return None
    return (
        definition._init_fn,
        definition._abstract_fn,
        definition._setup_context_fn,
        definition._backward_fn,
    )


def differentiates_custom_op(function: Any) -> bool:
    """Return whether torch.library has made an autograd.Function to differentiate an op."""
    return bool(function.__module__ == "torch._library.autograd")


def has_backward(name: str) -> bool:
    """Return False for an op that is known to have no backward, as custom ops alone may be."""
    functions = custom_op_functions(name)
    return functions is None or functions[3] is not None


def nn_binding(name: str) -> Any:
    """Return the Python binding of an op in `NN_BINDINGS`; None where it has none there."""
    return getattr(torch._C._nn, name, None)


def has_torch_binding(name: str) -> bool:
    """Return whether `torch.<name>` is the op's own Python binding, and no function around it.

    >>> has_torch_binding("relu"), has_torch_binding("unique"), has_torch_binding("cdist")
    (True, False, False)
    """
    # Functions written in Python around a binding may take other arguments: cdist has a text where
    # its op has a number.
    around = isinstance(getattr(torch, name, None), FunctionType) and name not in _ALIKE
    return hasattr(torch._C._VariableFunctions, name) and not around


_replacing = threading.RLock()


@contextmanager
def truncated_normal_replaced(replacement: Callable[..., Any]) -> Iterator[None]:
    """Let `nn.init.trunc_normal_` call a function in its place, one thread after the other.

    replacement: is given what it may call otherwise, the tensor, mean, deviation, least and
    greatest number, and the generator by keyword.
    """
    with _replacing:
        original = torch.nn.init._no_grad_trunc_normal_

        def replaced(
            tensor: Any, mean: Any, std: Any, a: Any, b: Any, generator: Any = None
        ) -> Any:
            return replacement(original, tensor, mean, std, a, b, generator=generator)

        torch.nn.init._no_grad_trunc_normal_ = replaced
        try:
            yield
        finally:
            torch.nn.init._no_grad_trunc_normal_ = original
