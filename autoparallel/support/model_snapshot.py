"""A model as it was: whatever a forward writes to is put back when it was run for planning only."""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from autoparallel.support.memory_writes import Watch, memory_of, place_of
from autoparallel.support.rng_state import restore, snapshot

__all__ = ["same_globals", "untouched"]

_DEEPEST = 6  # containers and objects inside of others that are looked into


@contextlib.contextmanager
def untouched(model: nn.Module, *others: Any, values: bool = False) -> Iterator[None]:
    """In the end, however it comes, the model and all that it refers to are what they were.

    These are the dicts of its modules with children, tensors and hooks, containers and plain
    objects in attributes (and in closures of hooks), classes, where tensors lie, whether they are
    trained, their gradients, torch's global state, and random numbers. others: objects besides.
    values: also what operators have written to tensors. What they write to is copied before they
    do, the rest is not. Tracing needs no such copies: it works on tensors without data.
    """
    held = _Held()
    held.look(model)
    for other in others:
        held.look(other)
    with same_globals():
        try:
            with held.watched() if values else contextlib.nullcontext():
                yield
        finally:
            held.put_back()


class _Held(Watch):
    """All that can be reached from a model, as it is now."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}
        self.boxes: list[tuple[Any, Any]] = []
        self.classes: list[tuple[Any, type]] = []
        self.arrays: list[tuple[Any, Any]] = []
        self.tensors: list[_Tensor] = []
        self.memories: set[int] = set()
        self.copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def look(self, value: Any, depth: int = 0) -> None:
        """Note what `value` is and refers to."""
        if isinstance(value, _PLAIN) or id(value) in self.seen:
            return
        if isinstance(value, torch.Tensor):
            self.seen[id(value)] = value
            self.tensor(value)
        elif isinstance(value, nn.Module):
            # However deep: a tree of modules may be deeper than anything else.
            for module in value.modules():
                if id(module) not in self.seen:
                    self.seen[id(module)] = module
                    self.classes.append((module, type(module)))
                    self.box(vars(module), 0)
        elif depth <= _DEEPEST:
            self.seen[id(value)] = value
            self.inside(value, depth)

    def inside(self, value: Any, depth: int) -> None:
        """Note what is in a container, a function or a plain object."""
        if isinstance(value, (dict, list, set, collections.deque, bytearray)):
            self.box(value, depth)
        elif isinstance(value, (tuple, frozenset)):
            for item in value:
                self.look(item, depth + 1)
        elif isinstance(value, functools.partial):
            for item in (value.func, value.args, value.keywords):
                self.look(item, depth + 1)
        elif isinstance(value, types.MethodType):
            self.look(value.__self__, depth + 1)
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    self.look(cell.cell_contents, depth + 1)
        elif _is_array(value):
            self.arrays.append((value, value.copy()))
        elif not isinstance(value, _OPAQUE) and isinstance(getattr(value, "__dict__", None), dict):
            self.box(vars(value), depth)

    def box(self, value: Any, depth: int) -> None:
        """Note a container that can be written to, and what is in it."""
        kept = list(value.items()) if isinstance(value, dict) else list(value)
        self.boxes.append((value, kept))
        for item in value.values() if isinstance(value, dict) else kept:
            self.look(item, depth + 1)

    def tensor(self, tensor: torch.Tensor) -> None:
        """Note where a tensor lies, and its gradient."""
        self.tensors.append(_Tensor(tensor))
        memory = memory_of(tensor)
        if memory is not None and not tensor.is_meta:
            self.memories.add(memory)
        if tensor.is_leaf and tensor.grad is not None:
            self.look(tensor.grad)
        if vars(tensor):
            self.box(vars(tensor), 0)

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Within, memory is copied before it is written to."""
        return self.installed()

    def before(self, tensor: torch.Tensor, operator: str) -> None:
        self.handed_out(tensor)

    def handed_out(self, tensor: torch.Tensor) -> None:
        memory = memory_of(tensor)
        if memory in self.memories and memory not in self.copies:
            assert memory is not None
            storage = tensor.untyped_storage()
            self.copies[memory] = (storage, storage.clone())

    def put_back(self) -> None:
        """Make all of it what it was, but for what nobody has changed."""
        for module, kind in self.classes:
            if type(module) is not kind:
                module.__class__ = kind
        for box, kept in self.boxes:
            _refill(box, kept)
        for array, before in self.arrays:
            if array.shape == before.shape and array.flags.writeable:
                array[...] = before
        for tensor in self.tensors:
            tensor.put_back()
        for storage, before in self.copies.values():
            if storage.nbytes() != before.nbytes():
                storage.resize_(before.nbytes())
            storage.copy_(before)


class _Tensor:
    """A tensor as it is now, but for its values."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.kind, self.place = tensor, type(tensor), place_of(tensor)
        self.leaf = tensor.is_leaf
        self.trained = tensor.requires_grad
        self.gradient = tensor.grad if self.leaf else None
        self.alias = tensor.data  # keeps the memory

    def put_back(self) -> None:
        tensor = self.tensor
        if type(tensor) is not self.kind:
            tensor.__class__ = self.kind
        if place_of(tensor) != self.place:
            tensor.data = self.alias
        if self.leaf and tensor.is_leaf and tensor.requires_grad != self.trained:
            tensor.requires_grad_(self.trained)
        if self.leaf and tensor.grad is not self.gradient:
            tensor.grad = self.gradient


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# Objects of the interpreter and of torch whose insides are not a model's.
_OPAQUE = (type, types.ModuleType, types.GeneratorType, torch.UntypedStorage, torch.Generator)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _refill(box: Any, kept: list[Any]) -> None:
    """Bring a container back to what it held, in that order, if it holds anything else now."""
    if isinstance(box, dict):
        now = list(box.items())
        if len(now) != len(kept) or any(
            a[0] is not b[0] or a[1] is not b[1] for a, b in zip(now, kept, strict=True)
        ):
            box.clear()
            for key, value in kept:
                box[key] = value
        return
    now = list(box)
    if len(now) != len(kept) or any(a is not b for a, b in zip(now, kept, strict=True)):
        box.clear()
        box.update(kept) if isinstance(box, set) else box.extend(kept)


@contextlib.contextmanager
def same_globals() -> Iterator[None]:
    """In the end random numbers go on where they were, and torch's switches are as before."""
    numbers, switches = snapshot(), [read() for read, _ in _SWITCHES]
    filters = list(warnings.filters)
    try:
        yield
    finally:
        for (read, write), value in zip(_SWITCHES, switches, strict=True):
            if read() != value:
                write(value)
        if list(warnings.filters) != filters:
            warnings.filters[:] = filters  # type: ignore[index]
        restore(numbers)


def _default_device(device: torch.device) -> None:
    """Let new tensors lie on `device`; on the CPU without a mode that says so."""
    torch.set_default_device(None if device.type == "cpu" else device)


# How torch's global switches are read and set.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_device, _default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    *(
        (functools.partial(read, device), functools.partial(write, device))
        for device in ("cpu", "cuda")
        for read, write in (
            (torch.is_autocast_enabled, torch.set_autocast_enabled),
            (torch.get_autocast_dtype, torch.set_autocast_dtype),
        )
    ),
)
