"""Watches that report writes to tensors: by operators, by `.data = t`, by handles of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoparallel.support.replaced_functions import refuse_replaced
from autoparallel.support.torch_private import (
    OpOverload,
    TorchDispatchMode,
    current_dispatch_mode,
    current_function_mode,
    schema_of,
    storage_key,
    tree_leaves,
)

__all__ = ["Watch", "memory_of", "paused", "place_of", "writes"]


def memory_of(tensor: torch.Tensor) -> int | None:
    """Return a number for the memory that a tensor lies in; None where it has none.

    Views have the number of their base. Lazy and functional tensors, and those of some subclasses,
    have no memory of their own.

    >>> x = torch.ones(4)
    >>> memory_of(x) == memory_of(x[1:]), memory_of(x) == memory_of(x.clone())
    (True, False)
    """
    try:
        return storage_key(tensor)
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tensors which are the same elements of the same memory.

    It has the shape, type, device, memory, offset and strides; it is () for a parameter without a
    shape yet.

    >>> x = torch.ones(4)
    >>> place_of(x) == place_of(x.view(4)), place_of(x[:2]) == place_of(x[2:])
    (True, False)
    """
    if nn.parameter.is_lazy(tensor):
        return ()
    looks = (tuple(tensor.shape), tensor.dtype, tensor.device)
    memory = memory_of(tensor)
    return looks if memory is None else (*looks, memory, tensor.storage_offset(), tensor.stride())


def writes(function: Any) -> bool:
    """Return whether a function writes to its first argument, by torch's convention for names.

    >>> writes(torch.Tensor.add_), writes(torch.Tensor.add), writes(torch.ops.aten.add_.Tensor)
    (True, False, True)
    """
    name = str(function.__name__).partition(".")[0]
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


class Watch:
    """A Watch is told of writes to tensors; its methods do nothing until they are overridden.

    It hears of the writes of one thread, within `installed`.

    >>> class Counter(Watch):
    ...     writes = 0
    ...     def after(self, tensor):
    ...         self.writes += 1
    >>> counter, x = Counter(), torch.ones(2)
    >>> with counter.installed():
    ...     _ = x.add_(1)
    >>> counter.writes
    1
    """

    def before(self, tensor: torch.Tensor, operator: str) -> None:
        """React to an operator, by its name, that is about to write to `tensor`."""

    def after(self, tensor: torch.Tensor) -> None:
        """React to an operator that has written to `tensor`."""

    def handed_out(self, tensor: torch.Tensor) -> None:
        """React to a handle of the memory that is about to be given away: an array, an address."""

    def assigned(self, tensor: torch.Tensor, value: Any) -> bool:
        """React to `tensor.data = value`. Return True if it is done here, in place of torch."""
        return False

    def trained(self, tensor: torch.Tensor, value: bool) -> None:
        """React to `tensor.requires_grad = value`."""

    def asked(self, tensor: torch.Tensor, name: str) -> Any:
        """Return what a property of a tensor is; NotImplemented leaves the answer to torch.

        name: `grad`, `is_leaf`, `grad_fn`, `retains_grad` or `_version`.
        """
        return NotImplemented

    def gradient_assigned(self, tensor: torch.Tensor) -> None:
        """React to `tensor.grad = value`."""

    def hooked(self, tensor: torch.Tensor, name: str) -> None:
        """React to a call that reaches into the backward pass: of `register_hook`, for example.

        name: of the method or attribute. `grad_fn` is one, as hooks may be registered there.
        """

    @contextlib.contextmanager
    def installed(self, operators: bool = True) -> Iterator[None]:
        """Report the writes that this thread makes within.

        operators: False leaves out what operators write, and with it the cost of seeing each of
        them; handles and assignments are reported all the same.
        """
        calls = _Calls(self)
        with calls, _Operators(self, calls) if operators else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Silence the watch that was installed last; within, it reports nothing and costs nothing."""
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
    """An _Operators mode reports the tensors that operators write to, by their schemas."""

    supports_higher_order_operators = True

    def __init__(self, watch: Watch, calls: _Calls) -> None:
        """Report to `watch`, while `calls` ignores what the watch itself does."""
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
    """Return (position, name) of the arguments that an operator writes to.

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
    """Return the functions that give memory away to code whose writes no operator shows."""
    names = ("numpy", "__array__", "untyped_storage", "storage", "data_ptr", "__dlpack__")
    return frozenset(getattr(torch.Tensor, name) for name in names)


class _Calls(TorchFunctionMode):
    """A _Calls mode reports the writes that are no operators: assignments and handles."""

    def __init__(self, watch: Watch) -> None:
        """Report to `watch`."""
        super().__init__()
        self.watch, self.idle = watch, False

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Ignore calls within, which the watch itself makes."""
        before, self.idle = self.idle, True
        try:
            yield
        finally:
            self.idle = before

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        refuse_replaced(function)
        name = _properties().get(function) if args and not self.idle else None
        if name is not None:
            answer = self.watch.asked(args[0], name)
            if answer is not NotImplemented:
                return answer
        report = _reports().get(function) if args and not self.idle else None
        if report is not None and report(self.watch, *args, **(kwargs or {})):
            return None
        return function(*args, **(kwargs or {}))


@cache
def _properties() -> dict[Any, str]:
    """Return by the function that reads a property the property's name."""
    kind: Any = torch.Tensor
    names = ("grad", "is_leaf", "grad_fn", "retains_grad", "_version")
    return {getattr(kind, name).__get__: name for name in names}


@cache
def _reports() -> dict[Any, Callable[..., bool]]:
    """Return by function of torch its report, which returns True where the call is done by it."""
    kind: Any = torch.Tensor

    def handle(watch: Watch, tensor: torch.Tensor, *_: Any, **__: Any) -> bool:
        watch.handed_out(tensor)
        return False

    def assign(watch: Watch, tensor: torch.Tensor, value: Any) -> bool:
        return watch.assigned(tensor, value)

    def gradient(watch: Watch, tensor: torch.Tensor, *_: Any) -> bool:
        watch.gradient_assigned(tensor)
        return False

    def train(watch: Watch, tensor: torch.Tensor, requires_grad: bool = True) -> bool:
        watch.trained(tensor, requires_grad)
        return False

    def hook(name: str) -> Callable[..., bool]:
        def report(watch: Watch, tensor: torch.Tensor, *_: Any, **__: Any) -> bool:
            # A parameter has no grad_fn; torch asks for it where a module is given a parameter.
            if name != "grad_fn" or not isinstance(tensor, torch.nn.Parameter):
                watch.hooked(tensor, name)
            return False

        return report

    reports: dict[Any, Callable[..., bool]] = dict.fromkeys(_handles(), handle)
    # A mode of functions is given the setter of a property as the function.
    reports[kind.data.__set__] = assign
    reports[kind.grad.__set__] = gradient
    reports[kind.requires_grad.__set__] = train
    reports[kind.requires_grad_] = train
    reports[kind.grad_fn.__get__] = hook("grad_fn")
    for name in ("register_hook", "register_post_accumulate_grad_hook", "retain_grad"):
        reports[getattr(kind, name)] = hook(name)
    return reports
