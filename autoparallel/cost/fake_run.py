"""One call of an op, run without data: its results, and the memory that its backward pass needs.

The call runs on fake CPU tensors with the strides that the real ones will have, because strides
decide what is saved (a product saves an operand that lies as it needs it, else a copy).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from typing import Any

import torch

from autoparallel.cost.backward_workspace import backward_workspace, nested_tensors
from autoparallel.cost.gpu_kernels import gpu_kernel
from autoparallel.graph.aliasing import shares_memory
from autoparallel.graph.graph import Ref, Sym
from autoparallel.graph.operators import operator_of
from autoparallel.rules.rule import ShardingRule
from autoparallel.runtime import kernels, rng
from autoparallel.runtime import random_ops as draws
from autoparallel.runtime.memory_order import in_memory_order
from autoparallel.support.fake_tensors import fake_mode
from autoparallel.support.torch_private import (
    FAKE_TENSOR_LOGGER,
    FakeTensorMode,
    OpOverload,
    has_meta_kernel,
    storage_key,
)

__all__ = ["FakeTensorSpec", "Observed", "contiguous", "observe"]
__all__ += ["runner", "skeleton"]

# Their backward pass is one kernel on a device, and several ops on tensors of no device.
_ONE_KERNEL_BACKWARD = {"aten::mish"}
# Ops that cannot run without data run on zeros, if they read no more elements than this.
_FEW_ELEMENTS = 1 << 20
# What torch's own ops saved, by all that decides it; so many, and then it is begun anew.
_known: dict[Any, Observed] = {}
_MOST_KNOWN = 1 << 14


@dataclass(frozen=True, slots=True)
class FakeTensorSpec:
    """A tensor without its data: all that decides how an op treats it.

    shape, strides: in elements. requires_grad: whether autograd records what is done to it.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes of its elements, gaps between them not counted."""
        return prod(self.shape) * self.dtype.itemsize


@cache
def contiguous(
    shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool = False
) -> FakeTensorSpec:
    """Return the spec of a tensor with its elements in order.

    >>> contiguous((2, 3), torch.float32).strides
    (3, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        # An empty dim has the stride that a dim of one element would have, as in torch.
        step *= max(size, 1)
    return FakeTensorSpec(shape, tuple(reversed(strides)), dtype, requires_grad)


def skeleton(structure: Any) -> Any:
    """Return nested arguments of a call without the names of what it reads.

    Equal for calls that are alike, so that each kind of call is run once.
    """
    kind = type(structure)
    if kind is Ref:
        return Ref
    if kind is tuple:
        return tuple([skeleton(item) for item in structure])
    return structure.hint if kind is Sym else (kind, structure)


@dataclass(frozen=True, slots=True)
class Observed:
    """The results and the saved memory of a call that was run. Storages are numbered.

    operands: how many storages are those of operands; they have the first numbers. results: specs
    of the resulting tensors. storages: of each result. sizes: bytes of the storages that the call
    allocated, by number less the number of operands. saved: storages that its backward needs.
    assumed: the call could not be run, and is taken to save all that it reads and returns.
    backward: bytes that its backward needs at its worst moment besides the gradients that it
    returns, if that was asked for.
    """

    operands: int
    results: tuple[FakeTensorSpec, ...]
    storages: tuple[int, ...]
    sizes: tuple[int, ...]
    saved: tuple[int, ...]
    assumed: bool = False
    backward: int = 0

    def size(self, storage: int) -> int:
        """Return the bytes of a storage that the call allocated."""
        return self.sizes[storage - self.operands]


def _drawing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a random op that leaves the user's generators as they are."""

    def run(*args: Any, **kwargs: Any) -> Any:
        # The fast mode draws from one stream, not a number for each element's index.
        source = rng.Generator(mode="fast")
        with rng.using(source):
            source.drawing = 0
            return function(*args, **kwargs)

    return run


def runner(
    target: str, rule: ShardingRule | None = None, device: str = "cpu"
) -> Callable[..., Any]:
    """Return the function that an emitted program calls for an op where no kernel runs it.

    target: the op. rule: of the call, which may name a function of ours; None if it has none.
    device: as of Hardware; what makes and saves the same takes the place of a GPU's kernel.
    """
    fused = gpu_kernel(target) if device == "gpu" else None
    if fused is not None:
        return partial(in_memory_order, fused) if rule and rule.function else fused
    if rule is not None and rule.random:
        return _drawing(getattr(draws, rule.random))
    return getattr(kernels, rule.function) if rule and rule.function else operator_of(target)


@cache
def _mode() -> FakeTensorMode:
    """Return the one fake-tensor mode: its cache serves all calls."""
    return fake_mode()


def _actual(structure: Any, operands: Any, device: str) -> Any:
    """Return nested arguments with operands for Refs, hints for Syms, and the device replaced."""
    if isinstance(structure, torch.Size):
        return structure
    if isinstance(structure, tuple):
        return [_actual(item, operands, device) for item in structure]
    if isinstance(structure, Ref):
        return next(operands)
    if isinstance(structure, Sym):
        return structure.hint
    return torch.device(device) if isinstance(structure, torch.device) else structure


def _stand_in(spec: FakeTensorSpec, device: str) -> torch.Tensor:
    """Return a tensor of that spec without data, or of zeros on device "zeros"."""
    if device == "zeros":
        # Strides may leave gaps or repeat elements: memory reaches to the last element.
        last = sum((n - 1) * step for n, step in zip(spec.shape, spec.strides, strict=True))
        tensor = torch.zeros(last + 1 if prod(spec.shape) else 0, dtype=spec.dtype, device="cpu")
        tensor = tensor.as_strided(spec.shape, spec.strides)
    else:
        place = "meta" if device == "meta" else "cpu"
        tensor = torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype, device=place)
    return tensor.requires_grad_(spec.requires_grad)


def _run(
    function: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    stands: Sequence[FakeTensorSpec],
    device: str,
    backward: bool,
) -> Observed:
    """Run a call on one kind of stand-ins and return what was seen.

    stands: specs of the operands. device: "fake", "meta" or "zeros". backward: whether to run the
    backward pass too. Raises whatever the op raises.
    """
    operands = [_stand_in(stand, device) for stand in stands]
    source = iter(operands)
    place = "meta" if device == "meta" else "cpu"
    positional = [_actual(arg, source, place) for arg in args]
    named = {name: _actual(item, source, place) for name, item in kwargs.items()}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = nested_tensors(function(*positional, **named))
    # Storages are numbered in the order of operands, results, saved tensors. `alive` keeps them, so
    # that no address is used twice while they are numbered.
    numbers: dict[int, int] = {}
    alive = []
    sizes = []
    for tensor in (*operands, *results, *saved):
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage_key(storage) not in numbers:
            if len(alive) > len(operands):
                sizes.append(storage.nbytes())
            numbers[storage_key(storage)] = len(numbers)
    of = [numbers[storage_key(storage)] for storage in alive]
    count = len(operands)
    # The graph of autograd goes on holding what the backward needs; these lists must not.
    saved.clear()
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
        backward=backward_workspace(results, operands) if backward else 0,
    )


@cache
def _devices_for(function: Any) -> tuple[str, ...]:
    """Return what to run a function on, in order; see `observe`.

    Shapes, order in memory and what autograd saves are the same on every device where a kernel for
    tensors of no device tells the first two, as torch takes them from it for all devices, and of
    views. Ops that are made of others may choose these by the device, as attention does.
    """
    alike = isinstance(function, OpOverload) and function.namespace == "aten"
    alike = alike and function.name() not in _ONE_KERNEL_BACKWARD
    if alike and (shares_memory(str(function)) or has_meta_kernel(function)):
        return ("meta", "fake", "zeros")
    return ("fake", "zeros")


def observe(
    function: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    operands: Sequence[FakeTensorSpec],
    expected: Sequence[FakeTensorSpec],
    devices: Sequence[str] = (),
    backward: bool = False,
) -> Observed:
    """Run a call without data and return its results and the memory that it saves.

    function: what runs it, see `runner`. args, kwargs: nested tuples with a Ref for each operand,
    in order. operands: their specs. expected: specs of the results by the graph, for calls that
    cannot be run. devices: what to try, in order: "fake" (CPU tensors without data), "meta"
    (tensors of no device), "zeros" (CPU tensors, if they are small); left out, it is what tells the
    most, or "meta" first where that tells the same, which is a quarter of the work. backward:
    whether to run its backward too.
    Where no device works, the call is assumed to save all operands and results. Never raises.
    Torch's own ops and our kernels are run once for all plans: what they save follows from these
    arguments. Others may be defined anew under the same name.
    """
    key = None
    if _is_known(function):
        written = skeleton(args), skeleton(tuple(kwargs.items()))
        key = (
            function,
            written,
            tuple(operands),
            tuple(expected),
            tuple(devices),
            backward,
            _settings(),
        )
        if key in _known:
            return _known[key]
    seen = _observed(function, args, kwargs, operands, expected, devices, backward)
    if key is not None and not seen.assumed:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = seen
    return seen


def _is_known(function: Callable[..., Any]) -> bool:
    """Return whether a function is always the same one: an op of torch's, or a kernel of ours."""
    if isinstance(function, OpOverload):
        return bool(function.namespace == "aten")
    return getattr(kernels, getattr(function, "__name__", ""), None) is function


def _settings() -> tuple[Any, ...]:
    """Return the settings of torch that decide what its own ops make and save."""
    attention = torch.backends.cuda
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        attention.flash_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        attention.math_sdp_enabled(),
    )


def _observed(
    function: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    operands: Sequence[FakeTensorSpec],
    expected: Sequence[FakeTensorSpec],
    devices: Sequence[str],
    backward: bool,
) -> Observed:
    """Run a call, see `observe`."""
    # Autograd records only where it would in the model; without gradients nothing is saved.
    enabled = any(stand.requires_grad for stand in operands)
    few = sum(prod(stand.shape) for stand in operands) <= _FEW_ELEMENTS
    for device in devices or _devices_for(function):
        if device == "zeros" and not few:
            continue
        try:
            with _undisturbed(enabled), _mode() if device == "fake" else nullcontext():
                return _run(function, args, kwargs, operands, device, backward)
        except Exception:  # any op may refuse to run without data, in any way
            continue
    count = len(operands)
    # What could not be seen is assumed at its worst: everything is saved.
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
    """Shield a run from the modes that the caller is in, and the logs from its failures.

    Failures are for `observe` to see: warnings and fake tensors' log are off within.
    """
    log = logging.getLogger(FAKE_TENSOR_LOGGER)
    disabled, log.disabled = log.disabled, True
    try:
        with (
            warnings.catch_warnings(),
            # Inference mode would keep autograd from saving anything.
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", enabled=False),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = disabled
