"""Modes and transforms that see what is called, and contexts in which they do not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    pass

__all__ = [
    "current_dispatch_mode",
    "current_function_mode",
    "default_device_kind",
    "in_function_transform",
    "outside_transforms",
    "plain_ops_of",
    "replaced_transforms",
    "users_dispatch_modes",
    "users_function_modes",
    "with_function_overrides",
    "without_function_modes",
    "without_function_overrides",
    "without_modes",
]


def current_dispatch_mode() -> Any:
    """Return the innermost mode that sees ops, None where there is none."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode()


def current_function_mode() -> Any:
    """Return the innermost mode that sees calls of torch's functions, None where there is none."""
    from torch.overrides import _get_current_function_mode

    return _get_current_function_mode()


def default_device_kind() -> str:
    """Return the type of the device on which tensors lie that are made without saying where.

    >>> with torch.device("meta"):
    ...     default_device_kind()
    'meta'
    """
    if not torch._C._len_torch_function_stack():
        return "cpu"
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    modes = reversed(_get_current_function_mode_stack())
    return next((mode.device.type for mode in modes if isinstance(mode, DeviceContext)), "cpu")


def users_function_modes() -> list[Any]:
    """Return the modes that see calls of torch's functions, but for those of torch itself, such as
    that of a default device, and of this project.
    """
    if not torch._C._len_torch_function_stack():
        return []
    from torch.overrides import _get_current_function_mode_stack

    return [mode for mode in _get_current_function_mode_stack() if _is_users(mode)]


def users_dispatch_modes() -> list[Any]:
    """Return the modes that see ops, but for those of torch itself and of this project."""
    if not torch._C._len_torch_dispatch_stack():
        return []
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return [mode for mode in _get_current_dispatch_mode_stack() if _is_users(mode)]


def _is_users(mode: Any) -> bool:
    known = ("torch", __name__.partition(".")[0])
    return type(mode).__module__.partition(".")[0] not in known


def without_modes() -> AbstractContextManager[Any]:
    """Return a context in which no mode sees ops: neither a tracer's nor one of fake tensors."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def without_function_modes() -> AbstractContextManager[Any]:
    """Return a context in which no mode sees calls of torch's functions."""
    return torch._C.DisableTorchFunction()


# A context in which `__torch_function__` of tensor subclasses is not called. It is entered many
# times in a step, and a function around it would take as long as it does.
without_function_overrides: Callable[[], AbstractContextManager[Any]] = (
    torch._C.DisableTorchFunctionSubclass
)


def with_function_overrides() -> AbstractContextManager[Any]:
    """Return a context in which `__torch_function__` is called, also within one in which it is
    not.
    """
    return torch._C._EnableTorchFunction()


def in_function_transform() -> bool:
    """Return whether a transform of torch.func, such as grad or vmap, is at work here."""
    return _interpreter_stack()() is not None


@cache
def _interpreter_stack() -> Callable[[], Any]:
    """Return the function that tells of the transforms; an import takes longer than the answer."""
    from torch._C._functorch import peek_interpreter_stack

    return peek_interpreter_stack


def outside_transforms() -> AbstractContextManager[Any]:
    """Return a context in which no transform of torch.func is at work.

    What is computed there is a constant for the transforms around it.
    """
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    if not in_function_transform():
        return nullcontext()
    context: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return context


# What runs the transforms of a thread in place of torch, the innermost last, by the thread.
_transform_runs: dict[int, list[Callable[..., Any]]] = {}
_transforms_lock = threading.Lock()


@contextmanager
def replaced_transforms(run: Callable[..., Any]) -> Iterator[None]:
    """Return a context in which `vmap`, `grad`, `grad_and_value` and `jvp` of torch.func, in this
    thread, are run by `run`.

    run: called with the function by which torch would run the transform, and its arguments. Also
    where the user's module has imported the transform by a name of its own.
    """
    thread = threading.get_ident()
    with _transforms_lock:
        if not _transform_runs:
            for module, name in _places_of_transforms():
                setattr(module, name, _run_instead(getattr(module, name)))
        _transform_runs.setdefault(thread, []).append(run)
    try:
        yield
    finally:
        with _transforms_lock:
            _transform_runs[thread].pop()
            if not _transform_runs[thread]:
                del _transform_runs[thread]
            if not _transform_runs:
                for module, name in _places_of_transforms():
                    setattr(module, name, getattr(module, name).__wrapped__)


def _places_of_transforms() -> list[tuple[Any, str]]:
    """Return the modules of torch and the names there of the functions that run transforms."""
    from torch._functorch import apis, eager_transforms

    names = ("grad_impl", "grad_and_value_impl", "_jvp_with_argnums")
    return [(apis, "vmap_impl"), *((eager_transforms, name) for name in names)]


def _run_instead(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch that what replaces it in its thread runs, if there is any."""

    @wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        runs = _transform_runs.get(threading.get_ident())
        return runs[-1](original, *args, **kwargs) if runs else original(*args, **kwargs)

    return run


def plain_ops_of(
    function: Callable[..., Any], tensors: Sequence[torch.Tensor]
) -> torch.fx.GraphModule:
    """Return what a function does as a program of plain ops, which a trace around it does not see.

    None of them writes to a tensor. function: of tensors, returns a list; of modes that see calls
    of torch's functions, the user's are left, and those that it enters itself. tensors: what it is
    called with, without data.
    """
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
    from torch.utils._device import DeviceContext

    modes = [
        torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())
    ]
    # Those of the user's, and that of a default device, change what the function computes.
    kept = [mode for mode in modes if _is_users(mode) or isinstance(mode, DeviceContext)]
    _enter(kept)
    try:
        with disable_proxy_modes_tracing():
            # Nothing else may be taken apart: an op's own derivative knows what its parts do not,
            # such as how the mean that a norm hands to its backward pass follows from its input.
            # But a copy that writes to nothing has none.
            instead = {torch.ops.aten.copy.default: _copied}
            return make_fx(torch.func.functionalize(function), instead)(*tensors)
    finally:
        for _ in kept:
            torch._C._pop_torch_function_stack()
        _enter(modes)


def _enter(modes: Sequence[Any]) -> None:
    """Have modes see calls of torch's functions. modes: the innermost first."""
    for mode in reversed(modes):
        torch._C._push_on_torch_function_stack(mode)


def _copied(into: torch.Tensor, source: torch.Tensor, _: bool = False) -> torch.Tensor:
    """Return what a tensor is after another one was copied into it."""
    return source.to(into.dtype).expand(into.shape)
