"""What one call of an op makes and keeps for its backward: seen by running it, without data.

It runs on stand-ins: fake CPU tensors with the strides that the real ones will have, because what
is kept depends on them (a product keeps an operand that lies as it needs it, else a copy).
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch

from autoparallel.graph.graph import Ref, Sym
from autoparallel.graph.operators import operator_of
from autoparallel.placement import Invariant
from autoparallel.runtime import kernels, rng
from autoparallel.runtime import random_ops as draws
from autoparallel.runtime.groups import Group
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.torch_private import (
    FAKE_TENSOR_LOGGER,
    FakeTensorMode,
    TorchDispatchMode,
    storage_key,
)

__all__ = ["FakeTensorSpec", "Observed", "StandInGroup", "contiguous", "observe"]
__all__ += ["random_arguments", "runner", "skeleton"]

# Ops that cannot run without data run on zeros, if they read no more elements than this.
_FEW = 1 << 20


@dataclass(frozen=True, slots=True)
class FakeTensorSpec:
    """A tensor without its data."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @property
    def nbytes(self) -> int:
        """Size of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@cache
def contiguous(
    shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool = False
) -> FakeTensorSpec:
    """A stand-in for a tensor with its elements in order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return FakeTensorSpec(shape, tuple(reversed(strides)), dtype, requires_grad)


def skeleton(structure: Any) -> Any:
    """Nested arguments of a call without the names of what it reads: equal for calls alike."""
    kind = type(structure)
    if kind is Ref:
        return Ref
    if kind is tuple:
        return tuple([skeleton(item) for item in structure])
    return structure.hint if kind is Sym else (kind, structure)


@dataclass(frozen=True, slots=True)
class Observed:
    """What a call was seen to do. Storages are numbered: those of the operands first.

    results: the tensors that it makes. storages: of each result. sizes: bytes of the storages that
    it made itself, by number less the number of operands. saved: storages that its backward needs.
    assumed: whether it could not be run, and was taken to keep all that it reads and makes.
    backward: bytes that its backward takes at its worst moment besides the gradients that it makes,
    if that was asked for.
    """

    operands: int
    results: tuple[FakeTensorSpec, ...]
    storages: tuple[int, ...]
    sizes: tuple[int, ...]
    saved: tuple[int, ...]
    assumed: bool = False
    backward: int = 0

    def size(self, storage: int) -> int:
        """Bytes of a storage that the call made."""
        return self.sizes[storage - self.operands]


class StandInGroup(Group):
    """Ranks that are not there: collectives return memory of the right size."""

    def __init__(self, world_size: int, rank: int = 0) -> None:
        self.rank, self.world_size = rank, world_size

    def all_reduce(self, tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        return torch.zeros_like(tensor, memory_format=torch.contiguous_format)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_zeros((self.world_size, *tensor.shape))

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_zeros(tensor.shape[1:])

    def all_to_all(
        self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        return [tensors[0].new_zeros(shape) for shape in shapes]


def _drawing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A random op that draws nothing from the user's generators, and nothing number by number."""

    def run(*args: Any, **kwargs: Any) -> Any:
        source = rng.Generator(mode="fast")
        with rng.using(source):
            source.drawing = 0
            return function(*args, **kwargs)

    return run


def runner(target: str, random: str = "", kernel: str = "") -> Callable[..., Any]:
    """What an emitted program calls for an op: it itself, ours if it is random, or a kernel."""
    if kernel:
        return getattr(kernels, kernel)
    return _drawing(getattr(draws, random)) if random else operator_of(target)


def random_arguments(shape: tuple[int, ...]) -> dict[str, Any]:
    """What a random op is told besides its own arguments: of a whole of this shape, unsplit."""
    alone = StandInGroup(1)
    ranks = Ranks(("",), (alone,), alone)
    return {"key": 0, "shape": torch.Size(shape), "placements": (Invariant(),), "ranks": ranks}


@cache
def _mode() -> FakeTensorMode:
    return FakeTensorMode()


def _tensors(structure: Any) -> list[torch.Tensor]:
    if isinstance(structure, torch.Tensor):
        return [structure]
    if isinstance(structure, (tuple, list)):
        return [tensor for item in structure for tensor in _tensors(item)]
    return []


def _actual(structure: Any, operands: Any, device: str) -> Any:
    if isinstance(structure, torch.Size):
        return structure
    if isinstance(structure, tuple):
        return [_actual(item, operands, device) for item in structure]
    if isinstance(structure, Ref):
        return next(operands)
    if isinstance(structure, Sym):
        return structure.hint
    return torch.device(device) if isinstance(structure, torch.device) else structure


def _stand_in(stand: FakeTensorSpec, device: str) -> torch.Tensor:
    if device == "zeros":
        last = sum((n - 1) * step for n, step in zip(stand.shape, stand.strides, strict=True))
        made = torch.zeros(last + 1 if prod(stand.shape) else 0, dtype=stand.dtype, device="cpu")
        made = made.as_strided(stand.shape, stand.strides)
    else:
        place = "meta" if device == "meta" else "cpu"
        made = torch.empty_strided(stand.shape, stand.strides, dtype=stand.dtype, device=place)
    return made.requires_grad_(stand.requires_grad)


class _Made(TorchDispatchMode):
    """Counts the bytes of storages that are made within and not yet freed. most: at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = {storage_key(tensor) for tensor in _tensors(args)}
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            key = storage_key(storage)
            if key not in before and key not in self.known:
                self.known[key] = storage.nbytes()
                weakref.finalize(storage, self.known.pop, key)
        self.most = max(self.most, sum(self.known.values()))
        return found


def _besides(results: list[torch.Tensor], operands: list[torch.Tensor]) -> int:
    """Bytes that the backward of a call takes at its worst moment besides gradients that it makes.

    0 where it cannot be run without data.
    """
    ends = [tensor for tensor in results if tensor.requires_grad and tensor.grad_fn is not None]
    starts = [tensor for tensor in operands if tensor.requires_grad]
    if not ends or not starts:
        return 0
    given = [torch.empty_like(tensor) for tensor in ends]
    made = _Made()
    try:
        with torch.no_grad(), made:
            found = torch.autograd.grad(ends, starts, given, allow_unused=True)
    except Exception:  # any op may refuse to run without data, in any way
        return 0
    own = {storage_key(tensor) for tensor in found if tensor is not None}
    handed_on = sum(nbytes for key, nbytes in made.known.items() if key in own)
    return max(made.most - handed_on, 0)


def _run(
    function: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    stands: Sequence[FakeTensorSpec],
    device: str,
    backward: bool,
) -> Observed:
    operands = [_stand_in(stand, device) for stand in stands]
    source = iter(operands)
    place = "meta" if device == "meta" else "cpu"
    given = [_actual(arg, source, place) for arg in args]
    named = {name: _actual(item, source, place) for name, item in kwargs.items()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = _tensors(function(*given, **named))
    numbers: dict[int, int] = {}
    alive = []
    sizes = []
    for tensor in (*operands, *results, *kept):
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage_key(storage) not in numbers:
            if len(alive) > len(operands):
                sizes.append(storage.nbytes())
            numbers[storage_key(storage)] = len(numbers)
    of = [numbers[storage_key(storage)] for storage in alive]
    count = len(operands)
    kept.clear()
    alive.clear()
    return Observed(
        count,
        tuple(
            FakeTensorSpec(tuple(t.shape), tuple(t.stride()), t.dtype, t.requires_grad)
            for t in results
        ),
        tuple(of[count : count + len(results)]),
        tuple(sizes),
        tuple(sorted(set(of[count + len(results) :]))),
        backward=_besides(results, operands) if backward else 0,
    )


def observe(
    function: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    operands: Sequence[FakeTensorSpec],
    expected: Sequence[FakeTensorSpec],
    devices: Sequence[str] = ("fake", "zeros"),
    backward: bool = False,
) -> Observed:
    """Run a call and see what it makes and keeps.

    args, kwargs: nested tuples with a Ref for each operand, in order. expected: what its results
    are by the graph, for calls that cannot be run. devices: what to try, in order: "fake" (CPU
    tensors without data), "meta" (tensors of no device), "zeros" (CPU tensors, if they are small).
    backward: whether to run its backward too.
    """
    enabled = any(stand.requires_grad for stand in operands)
    few = sum(prod(stand.shape) for stand in operands) <= _FEW
    for device in devices:
        if device == "zeros" and not few:
            continue
        try:
            with _undisturbed(enabled), _mode() if device == "fake" else nullcontext():
                return _run(function, args, kwargs, operands, device, backward)
        except Exception:  # any op may refuse to run without data, in any way
            continue
    count = len(operands)
    grad = enabled and any(stand.requires_grad for stand in expected)
    saved = range(count + len(expected)) if grad else ()
    return Observed(
        count,
        tuple(replace(stand, requires_grad=grad and stand.requires_grad) for stand in expected),
        tuple(range(count, count + len(expected))),
        tuple(stand.nbytes for stand in expected),
        tuple(saved),
        assumed=True,
    )


@contextmanager
def _undisturbed(grad: bool) -> Iterator[None]:
    """Whatever modes the caller is in; what goes wrong is for the caller to see, not for logs."""
    log = logging.getLogger(FAKE_TENSOR_LOGGER)
    disabled, log.disabled = log.disabled, True
    try:
        with (
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", enabled=False),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = disabled
