"""Snapshots of models: whatever a forward writes to is restored after it ran for planning only."""

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

from autoparallel.errors import CaptureError
from autoparallel.support.bare_values import container_kind, plain_items
from autoparallel.support.memory_writes import Watch, memory_of, place_of
from autoparallel.support.object_state import moves_on, own_attributes, random_state, second_of
from autoparallel.support.rng_state import restore, snapshot
from autoparallel.support.torch_private import TorchDispatchMode, global_call_hooks

__all__ = ["lent", "memories_of", "same_globals", "untouched"]

_DEEPEST = 6  # levels of containers and objects inside of others that are looked into


@contextlib.contextmanager
def untouched(model: nn.Module, *others: Any, values: bool = False) -> Iterator[None]:
    """At the end, however it comes, the model and all that it refers to are what they were.

    model: any module, with or without weights. Restored are the dicts of its modules with children,
    tensors and hooks, containers and plain objects in attributes (and in closures and defaults of
    hooks), random generators, classes, the memory of tensors, whether they are trained, their
    gradients, torch's global state, and random numbers. others: further objects to restore.
    values: whether the numbers in tensors are restored as well. Memory is copied just before an
    operator first writes to it, and the rest is not copied. Tracing needs no such copies: it works
    on tensors without data.

    >>> layer = nn.Linear(2, 2)
    >>> with untouched(layer):
    ...     layer.calls = 1
    >>> hasattr(layer, "calls")
    False
    """
    reached = _Snapshot()
    reached.look(model)
    for other in others:
        reached.look(other)
    reached.lend()
    with same_globals(), _without_global_hooks():
        try:
            with reached.installed() if values else contextlib.nullcontext():
                yield
        finally:
            reached.put_back()


def memories_of(*owners: Any) -> set[int]:
    """Return the memories of the tensors that can be reached from modules and other objects.

    >>> layer = nn.Linear(2, 2)
    >>> memory_of(layer.weight) in memories_of([layer])
    True
    """
    reached = _Snapshot()
    for owner in owners:
        reached.look(owner)
    return reached.memories


class _Snapshot(Watch):
    """A _Snapshot holds all that can be reached from a model, as it is when it is looked at."""

    def __init__(self) -> None:
        """Begin empty; `look` adds a model and its surroundings."""
        # By identity. The objects are kept, so that no other gets the identity of one that is gone.
        self.seen: dict[int, Any] = {}
        self.boxes: list[tuple[Any, Any]] = []
        self.classes: list[tuple[Any, type]] = []
        self.settings: dict[type, dict[str, Any]] = {}
        self.arrays: list[tuple[Any, Any]] = []
        self.generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self.slots: list[tuple[Any, dict[str, Any]]] = []
        self.drawn: list[Callable[[], None]] = []
        self.iterators: dict[int, Any] = {}
        self.tensors: list[_Tensor] = []
        self.memories: set[int] = set()
        self.copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def look(self, value: Any, depth: int = 0) -> None:
        """Note the state of `value` and of all that it refers to, each object once."""
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
                    self.settings_of(type(module))
                    self.box(vars(module), 0)
        elif depth <= _DEEPEST:
            self.seen[id(value)] = value
            self.inside(value, depth)

    def inside(self, value: Any, depth: int) -> None:
        """Note the contents of a container, a function or a plain object."""
        if isinstance(value, (dict, list, set, collections.deque, bytearray)):
            self.box(value, depth)
        elif isinstance(value, (tuple, frozenset)):
            for item in plain_items(value):
                self.look(item, depth + 1)
        elif isinstance(value, functools.partial):
            for item in (value.func, value.args, value.keywords):
                self.look(item, depth + 1)
        elif isinstance(value, types.MethodType):
            self.look(value.__self__, depth + 1)
        elif isinstance(value, types.FunctionType):
            for item in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                self.look(item, depth + 1)
            self.box(vars(value), depth)
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    self.look(cell.cell_contents, depth + 1)
        elif _is_array(value):
            self.arrays.append((value, value.copy()))
        elif isinstance(value, torch.Generator):
            self.generators.append((value, value.get_state()))
        elif (drawn := random_state(value)) is not None:
            self.drawn.append(drawn[1])
        elif moves_on(value):
            self.iterators[id(value)] = lent(value)
        elif not isinstance(value, _OPAQUE):
            if isinstance(getattr(value, "__dict__", None), dict):
                self.box(vars(value), depth)
            self.slot(value, depth)

    def settings_of(self, kind: type) -> None:
        """Note the attributes of a user's class, and of those that it inherits from."""
        for base in kind.__mro__:
            if base not in self.settings and base.__module__.partition(".")[0] not in _NOBODYS:
                self.settings[base] = _settings(base)
                for value in self.settings[base].values():
                    if isinstance(value, (list, dict, set, collections.deque)):
                        self.look(value)

    def slot(self, value: Any, depth: int) -> None:
        """Note the attributes of an object that are in slots, and not in its dictionary."""
        own = own_attributes(value)
        kept = {
            name: item for name, item in own.items() if name not in getattr(value, "__dict__", ())
        }
        if kept:
            self.slots.append((value, kept))
        for item in kept.values():
            self.look(item, depth + 1)

    def lend(self) -> None:
        """Put copies in the place of iterators, whose position nobody can set back."""
        for box, contents in self.boxes:
            for index, content in enumerate(contents):
                item = content[1] if isinstance(box, dict) else content
                if id(item) in self.iterators and isinstance(box, (dict, list, collections.deque)):
                    box[content[0] if isinstance(box, dict) else index] = self.iterators[id(item)]

    def box(self, value: Any, depth: int) -> None:
        """Note a container that can be written to, and its contents."""
        items = plain_items(value)
        self.boxes.append((value, items))
        for item in items:
            self.look(item[1] if isinstance(value, dict) else item, depth + 1)

    def tensor(self, tensor: torch.Tensor) -> None:
        """Note the memory of a tensor, its gradient, and attributes that it was given."""
        self.tensors.append(_Tensor(tensor))
        memory = memory_of(tensor)
        if memory is not None and not tensor.is_meta:
            self.memories.add(memory)
        if tensor.is_leaf and tensor.grad is not None:
            self.look(tensor.grad)
        self.box(vars(tensor), 0)

    def before(self, tensor: torch.Tensor, operator: str) -> None:
        """Copy the memory that an operator is about to write to."""
        self.handed_out(tensor)

    def handed_out(self, tensor: torch.Tensor) -> None:
        """Copy memory that may be written to from now on, once, and only if the model has it."""
        memory = memory_of(tensor)
        if memory in self.memories and memory not in self.copies:
            assert memory is not None
            storage = tensor.untyped_storage()
            self.copies[memory] = (storage, storage.clone())

    def put_back(self) -> None:
        """Restore all of it; what nobody has changed is left alone."""
        for module, kind in self.classes:
            if type(module) is not kind:
                module.__class__ = kind
        for kind, settings in self.settings.items():
            now = _settings(kind)
            for name in now:
                if name not in settings:
                    delattr(kind, name)
            for name, value in settings.items():
                if now.get(name, self) is not value:
                    setattr(kind, name, value)
        for box, contents in self.boxes:
            _refill(box, contents)
        for array, before in self.arrays:
            if array.shape == before.shape and array.flags.writeable:
                array[...] = before
        for generator, state in self.generators:
            generator.set_state(state)
        for restore_numbers in self.drawn:
            restore_numbers()
        for owner, kept in self.slots:
            for name, item in kept.items():
                if own_attributes(owner).get(name, self) is not item:
                    object.__setattr__(owner, name, item)
        for tensor in self.tensors:
            tensor.put_back()
        for storage, before in self.copies.values():
            # A write may also have resized the memory.
            if storage.nbytes() != before.nbytes():
                storage.resize_(before.nbytes())
            storage.copy_(before)


def lent(iterator: Any) -> Any:
    """Return a copy of an iterator at its position, or a stand-in where there can be none.

    >>> numbers = iter([1, 2])
    >>> next(lent(numbers)), next(numbers)
    (1, 1)
    """
    return second_of(iterator) or _lent(iterator)


def _lent(iterator: Any) -> _Lent:
    """Return a stand-in for an iterator, which goes by the name of its type in messages."""
    name = type(iterator).__name__
    kind: type[_Lent] = type(name, (_Lent,), {})
    return kind(name)


class _Lent:
    """A stand-in for an iterator that cannot be copied, and must not be used up for planning.

    kind: the name of its type.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Any:
        return self

    def __next__(self, *_: Any) -> Any:
        """Raise CaptureError."""
        raise CaptureError(
            f"the forward goes on with a {self.kind} that the model keeps",
            why="it cannot be copied or set back, and to run the forward for planning uses it up",
            fix="pass what it gives as an argument, or keep a list and a position",
        )

    send = __next__


class _Tensor:
    """A _Tensor is a tensor as it is when it is made, but for its numbers."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Note the tensor's class, memory, gradient, and whether it is trained."""
        self.tensor, self.kind, self.place = tensor, type(tensor), place_of(tensor)
        self.leaf = tensor.is_leaf
        self.trained = tensor.requires_grad
        self.gradient = tensor.grad if self.leaf else None
        self.alias = tensor.data  # keeps the memory, also if the model lets it go

    def put_back(self) -> None:
        """Restore the tensor, in the order in which torch allows it: memory before gradient."""
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
# Packages whose classes no forward changes.
_NOBODYS = ("torch", "builtins", "autoparallel")
# Objects of the interpreter and of torch whose insides are not a model's. A fake tensor refers to
# the mode that it is of, and that to all sizes of a trace and where in the code each came from.
_OPAQUE = (
    *(type, types.ModuleType, types.GeneratorType, torch.UntypedStorage, torch.Generator),
    TorchDispatchMode,
)


def _settings(kind: type) -> dict[str, Any]:
    """Return the attributes of a class but for those that Python knows itself."""
    return {name: value for name, value in vars(kind).items() if not name.startswith("__")}


def _is_array(value: Any) -> bool:
    """Return whether it is a numpy array; numpy is not imported to find out."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _refill(box: Any, contents: list[Any]) -> None:
    """Restore the contents of a container in their order, if it holds anything else now.

    Contents are compared by identity: equality of tensors is a tensor, and equal is not the same.
    """
    now, pairs = plain_items(box), isinstance(box, dict)
    if len(now) == len(contents):
        for one, other in zip(now, contents, strict=True):
            if not (one[0] is other[0] and one[1] is other[1] if pairs else one is other):
                break
        else:
            return
    kind = container_kind(box)
    kind.clear(box)
    if pairs:
        for key, value in contents:
            kind.__setitem__(box, key, value)
    else:
        (kind.update if isinstance(box, set) else kind.extend)(box, contents)


@contextlib.contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Have no hooks on the calls of all modules within: they are not the model's."""
    kept = [(hooks, dict(hooks)) for hooks in global_call_hooks()]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


@contextlib.contextmanager
def same_globals() -> Iterator[None]:
    """At the end random numbers go on where they were, and torch's switches are as before.

    The switches are those of _SWITCHES, and Python's filters of warnings.

    >>> with same_globals():
    ...     torch.set_default_dtype(torch.float64)
    >>> torch.get_default_dtype()
    torch.float32
    """
    numbers, switches = snapshot(), [read() for read, _ in _SWITCHES]
    filters = list(warnings.filters)
    try:
        yield
    finally:
        # Only what has changed is written, because some switches warn or take time when written.
        for (read, write), value in zip(_SWITCHES, switches, strict=True):
            if read() != value:
                write(value)
        if list(warnings.filters) != filters:
            warnings.filters[:] = filters  # type: ignore[index]
        restore(numbers)


def _default_device(device: torch.device) -> None:
    """Let new tensors lie on `device`; on the CPU without a mode that says so."""
    torch.set_default_device(None if device.type == "cpu" else device)


# Torch's global switches, each with the functions that read and write it.
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
