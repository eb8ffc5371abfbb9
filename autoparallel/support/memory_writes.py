"""Watch writes to the memory of tensors, whoever makes them: operators, `.data = t`, handles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoparallel.support.torch_private import (
    OpOverload,
    TorchDispatchMode,
    current_dispatch_mode,
    current_function_mode,
    schema_of,
    storage_key,
    tree_leaves,
)

__all__ = ["Watch", "memory_of", "paused", "place_of"]


def memory_of(tensor: torch.Tensor) -> int | None:
    """A number for the memory that the tensor lies in; None where it has none to speak of."""
    try:
        return storage_key(tensor)
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same elements of the same memory."""
    if nn.parameter.is_lazy(tensor):
        return ()
    looks = (tuple(tensor.shape), tensor.dtype, tensor.device)
    memory = memory_of(tensor)
    return looks if memory is None else (*looks, memory, tensor.storage_offset(), tensor.stride())


class Watch:
    """What is done when memory is written to. Every method may be overridden; they do nothing."""

    def before(self, tensor: torch.Tensor, operator: str) -> None:
        """An operator is about to write to `tensor`."""

    def after(self, tensor: torch.Tensor) -> None:
        """An operator has written to `tensor`."""

    def handed_out(self, tensor: torch.Tensor) -> None:
        """A handle of the memory is about to be given away, as a numpy array or an address."""

    def assigned(self, tensor: torch.Tensor, value: Any) -> bool:
        """`tensor.data = value` was asked for. Returns whether it was done here."""
        return False

    def trained(self, tensor: torch.Tensor, value: bool) -> None:
        """`tensor.requires_grad = value` was asked for."""

    @contextlib.contextmanager
    def installed(self, operators: bool = True) -> Iterator[None]:
        """Within, this thread's writes are reported; without operators, what else there is."""
        calls = _Calls(self)
        with calls, _Operators(self, calls) if operators else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Within, a watch that was installed last reports nothing, and costs nothing."""
    operators, calls = current_dispatch_mode(), current_function_mode()
    if not isinstance(operators, _Operators) or not isinstance(calls, _Calls):
        yield
        return
    # Modes that the user has put above ours are the user's to take away.
    operators.__exit__(None, None, None)
    calls.__exit__(None, None, None)
    try:
        yield
    finally:
        calls.__enter__()
        operators.__enter__()


class _Operators(TorchDispatchMode):
    """Reports what operators write to, by their schemas."""

    supports_higher_order_operators = True

    def __init__(self, watch: Watch, calls: _Calls) -> None:
        super().__init__()
        self.watch, self.calls = watch, calls

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        places = _written(function) if isinstance(function, OpOverload) else ()
        if not places:
            return function(*args, **kwargs)
        operands = [args[at] if at < len(args) else kwargs.get(name) for at, name in places]
        written = [leaf for leaf in tree_leaves(operands) if isinstance(leaf, torch.Tensor)]
        with self.calls.ignored():
            for tensor in written:
                self.watch.before(tensor, str(function))
        result = function(*args, **kwargs)
        with self.calls.ignored():
            for tensor in written:
                self.watch.after(tensor)
        return result


@cache
def _written(function: Any) -> tuple[tuple[int, str], ...]:
    """(position, name) of the arguments that an operator writes to.

    The schemas of batch norms do not say that they write to running statistics.
    """
    return tuple(
        (at, argument.name)
        for at, argument in enumerate(schema_of(function).arguments)
        if argument.name in ("running_mean", "running_var")
        or (argument.alias_info is not None and argument.alias_info.is_write)
    )


@cache
def _handles() -> frozenset[Any]:
    """Functions that give the memory away to whom no operator sees."""
    names = ("numpy", "__array__", "untyped_storage", "storage", "data_ptr", "__dlpack__")
    return frozenset(getattr(torch.Tensor, name) for name in names)


class _Calls(TorchFunctionMode):
    """Reports what is no operator."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch, self.idle = watch, False

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Within, calls are the watch's own."""
        before, self.idle = self.idle, True
        try:
            yield
        finally:
            self.idle = before

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = _special().get(function) if args and not self.idle else None
        if found is not None and found(self.watch, *args, **(kwargs or {})):
            return None
        return function(*args, **(kwargs or {}))


@cache
def _special() -> dict[Any, Callable[..., bool]]:
    """By function, what is reported before it; true where the call was made already."""
    kind: Any = torch.Tensor

    def handle(watch: Watch, tensor: torch.Tensor, *_: Any, **__: Any) -> bool:
        watch.handed_out(tensor)
        return False

    def assign(watch: Watch, tensor: torch.Tensor, value: Any) -> bool:
        return watch.assigned(tensor, value)

    def train(watch: Watch, tensor: torch.Tensor, requires_grad: bool = True) -> bool:
        watch.trained(tensor, requires_grad)
        return False

    found: dict[Any, Callable[..., bool]] = dict.fromkeys(_handles(), handle)
    found[kind.data.__set__] = assign
    found[kind.requires_grad.__set__] = train
    found[kind.requires_grad_] = train
    return found
