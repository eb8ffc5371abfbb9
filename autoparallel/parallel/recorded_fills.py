"""Initializers run on tensors without data, and a record says what they do to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoparallel.support.torch_private import (
    OpOverload,
    TorchDispatchMode,
    current_dispatch_mode,
    schema_of,
    storage_key,
    tree_leaves,
    tree_map,
    truncated_normal_replaced,
)

__all__ = ["FillRecorder", "RecordedCall", "Region", "UnrecordableError", "replayed"]

# Operators that replace every element of their first operand.
_OVERWRITING = frozenset({
    "fill_", "zero_", "normal_", "uniform_", "exponential_", "log_normal_", "cauchy_", "geometric_",
    "bernoulli_", "random_",
})  # fmt: skip

_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


class UnrecordableError(Exception):
    """An initializer does what a record cannot say; its text says what that is."""


@dataclass(frozen=True, slots=True)
class Region:
    """A Region says which elements of a storage a tensor shows.

    storage: a number that stands for the storage. shape, stride, offset: of the tensor, in
    elements. dtype: of its elements.
    """

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Region:
        """Return the region that a tensor shows.

        Raises UnrecordableError for a conjugated or negated view.
        """
        if tensor.is_conj() or tensor.is_neg():
            raise UnrecordableError("it writes through a view that conjugates or negates")
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        return cls(storage_key(tensor), shape, stride, int(tensor.storage_offset()), tensor.dtype)

    def shown(self, storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
        """Return the tensor that shows this region of a storage with data."""
        empty = torch.empty(0, dtype=self.dtype, device=device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A RecordedCall is one operator that an initializer ran.

    function: the operator. args, kwargs: its arguments, in which a Region stands for each tensor
    without data. written: the regions that it writes to. created: the regions of its results that
    are new tensors, None for any other result. overwrites: whether it replaces every element of its
    first operand, each without a look at the others. elementwise: whether it changes every element
    of its first operand so. draws: whether it draws random numbers.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    written: tuple[Region, ...]
    created: tuple[Region | None, ...]
    overwrites: bool
    elementwise: bool
    draws: bool

    def operands(self) -> list[Region]:
        """Return the regions that stand among its arguments."""
        leaves = tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Region)]


class FillRecorder(TorchDispatchMode):
    """Within this mode, every operator on tensors without data (the meta device) is recorded.

    calls: what was recorded, in order. A tensor with data that stands among the operands is copied
    into the record, since the initializer may go on writing to it.
    Raises UnrecordableError within the initializer, or torch's own error, for an operator whose
    result depends on data, such as `tensor.item()`.

    >>> with torch.device("meta"):
    ...     weight = torch.empty(3)
    >>> with FillRecorder([weight]) as recorder:
    ...     _ = weight.normal_().mul_(2)
    >>> [call.function.__name__ for call in recorder.calls]
    ['normal_.default', 'mul_.Tensor']
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Begin with an empty record. tensors: those of the model."""
        super().__init__()
        self.calls: list[RecordedCall] = []
        # A storage that is freed would give its number to another one.
        self._alive = list(tensors)
        self._known = {storage_key(tensor) for tensor in self._alive}
        self._also = contextlib.ExitStack()

    def __enter__(self) -> FillRecorder:
        """Begin to record in this thread."""
        super().__enter__()
        self._also.enter_context(_AsWithData())
        self._also.enter_context(truncated_normal_replaced(_truncated_normal))
        return self

    def __exit__(self, *error: Any) -> None:
        """Record no more."""
        self._also.close()
        super().__exit__(*error)

    def truncated_normal(self, tensor: torch.Tensor, *bounds: float) -> torch.Tensor:
        """Note that a tensor is filled with truncated normal numbers.

        bounds: mean, deviation, least and greatest number.
        Torch draws them in a loop that looks at the numbers; each is drawn alone all the same.
        """
        region = Region.of(tensor)
        fill = nn.init.trunc_normal_
        self.calls.append(
            RecordedCall(fill, (region, *bounds), {}, (region,), (), True, True, True)
        )
        return tensor

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and note it."""
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)]
        # Operands are copied before the operator may write to them.
        recorded = tree_map(_recorded_operand, (args, kwargs))
        result = function(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if _is_tensor(leaf)]
        if not any(_has_no_data(tensor) for tensor in (*operands, *results)):
            return result
        if not isinstance(function, OpOverload):
            raise UnrecordableError(f"it runs {function}")
        if any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))):
            raise UnrecordableError("it draws from a generator of its own")
        meta = [tensor for tensor in operands if _has_no_data(tensor)]
        if any(storage_key(tensor) not in self._known for tensor in meta):
            raise UnrecordableError(f"{function} reads a tensor whose data are nowhere")
        written = tuple(_written(function, *recorded))
        known = {storage_key(tensor) for tensor in meta}
        created = tuple(
            Region.of(tensor) if _has_no_data(tensor) and storage_key(tensor) not in known else None
            for tensor in results
        )
        self._alive += [tensor for tensor in results if _has_no_data(tensor)]
        self._known.update(region.storage for region in created if region is not None)
        # A view shows what its base holds, and needs no record: regions say where they lie.
        if written or any(created):
            self.calls.append(_call(function, recorded, written, created))
        return result


class _AsWithData(TorchFunctionMode):
    """Within this mode, initializers do with meta tensors what they do with others.

    Torch's orthogonal, sparse and Dirac initializers return at once where `tensor.is_meta`. Numbers
    of Python that become a meta tensor are forgotten, unless they pass through an operator.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Say that tensors have data, and make those of numbers with data first."""
        kwargs = kwargs or {}
        if function == _IS_META:
            return False
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None:
            made = function(*args, **{**kwargs, "device": "cpu"})
            return made.to(device)
        return function(*args, **kwargs)


def _truncated_normal(otherwise: Any, tensor: torch.Tensor, *bounds: float, generator: Any) -> Any:
    """Note the fill if it is for a tensor without data of a record in this thread, else do it."""
    recorder = current_dispatch_mode()
    if isinstance(recorder, FillRecorder) and _has_no_data(tensor) and generator is None:
        return recorder.truncated_normal(tensor, *bounds)
    return otherwise(tensor, *bounds, generator=generator)


def _call(
    function: Any, operands: Any, written: tuple[Region, ...], created: tuple[Region | None, ...]
) -> RecordedCall:
    """Return the record of an operator, with what its name and torch's tags say of it.

    operands: its arguments, by position and by keyword.
    """
    overwrites = function.overloadpacket.__name__ in _OVERWRITING
    draws = torch.Tag.nondeterministic_seeded in function.tags
    args, kwargs = operands
    in_place = len(written) == 1 and bool(args) and args[0] is written[0]
    changes = torch.Tag.pointwise in function.tags and in_place and not draws
    changes = changes or overwrites
    return RecordedCall(function, args, kwargs, written, created, overwrites, changes, draws)


def _has_no_data(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on the meta device.

    Its `is_meta` is answered otherwise within a record.
    """
    return tensor.device.type == "meta"


def _is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor."""
    return isinstance(value, torch.Tensor)


def _recorded_operand(value: Any) -> Any:
    """Return an operand as the record keeps it: a Region, a copy of a tensor, or the value."""
    if not isinstance(value, torch.Tensor):
        return value
    return Region.of(value) if _has_no_data(value) else value.detach().clone()


def _written(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[Region]:
    """Yield the regions that an operator writes to, by its schema."""
    for at, argument in enumerate(schema_of(function).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            for leaf in tree_leaves(value):
                if isinstance(leaf, Region):
                    yield leaf


def replayed(
    wanted: int,
    calls: Sequence[RecordedCall],
    places: Mapping[int, Sequence[int]],
    storage_of: Callable[[int], torch.UntypedStorage],
    seeds: Mapping[int, int],
    device: torch.device,
) -> torch.UntypedStorage:
    """Return a storage as the recorded calls leave it, computed whole.

    wanted: the storage's number. places: by storage, of the calls that write to it or create it.
    storage_of: gives the memory with which a storage begins that no
    call creates. seeds: of each call that draws random numbers, by its place in `calls`.
    device: where to compute. Only those calls run that the storage depends on.
    """
    chosen: set[int] = set()
    waiting, seen = [wanted], {wanted}
    while waiting:
        # A call that writes to a storage after it was read is run too, and changes nothing.
        for at in set(places.get(waiting.pop(), ())) - chosen:
            chosen.add(at)
            more = {region.storage for region in calls[at].operands()} - seen
            waiting += more
            seen |= more
    memory: dict[int, torch.UntypedStorage] = {}

    def with_data(value: Any) -> Any:
        if isinstance(value, Region):
            if value.storage not in memory:
                memory[value.storage] = storage_of(value.storage)
            return value.shown(memory[value.storage], device)
        if isinstance(value, torch.device) and value.type == "meta":
            return device
        return value.to(device) if isinstance(value, torch.Tensor) and value.dim() else value

    for at in sorted(chosen):
        call = calls[at]
        args, kwargs = tree_map(with_data, (call.args, dict(call.kwargs)))
        if call.draws:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seeds[at])
                result = call.function(*args, **kwargs)
        else:
            result = call.function(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for region, tensor in zip(call.created, results, strict=True):
            if region is not None:
                memory[region.storage] = _laid_out(tensor, region).untyped_storage()
    return memory[wanted]


def _laid_out(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """Return a result in the memory order that the record expects of it."""
    if (tuple(tensor.stride()), tensor.storage_offset()) == (region.stride, region.offset):
        return tensor
    size = (
        region.offset
        + 1
        + sum((length - 1) * step for length, step in zip(region.shape, region.stride, strict=True))
    )
    memory = torch.empty(max(size, 0), dtype=tensor.dtype, device=tensor.device)
    shown = memory.as_strided(region.shape, region.stride, region.offset)
    shown.copy_(tensor)
    return shown
