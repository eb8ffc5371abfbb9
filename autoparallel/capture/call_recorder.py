"""One run of the user's model on its example inputs records which modules it calls with what."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from autoparallel.capture.branch_ways import NoteWays, Way, Ways
from autoparallel.capture.forward_contexts import unprinted
from autoparallel.capture.intercepted_calls import CallWatch
from autoparallel.errors import CaptureError
from autoparallel.support.memory_writes import Watch
from autoparallel.support.model_snapshot import untouched
from autoparallel.support.module_copy import keep_attributes, shallow_copy
from autoparallel.support.pytree import Skeleton, flatten, rebuild
from autoparallel.support.rng_state import seeded
from autoparallel.support.torch_private import (
    TorchDispatchMode,
    is_functorch_wrapped_tensor,
    schema_of,
    tree_leaves,
)

__all__ = ["Call", "Recorded", "record"]


@dataclass
class Call:
    """The first call of a module in an example run.

    skeleton: the structure of its (args, kwargs) around the tensors. tensors: for each tensor a
    stand-in on the meta device, and the device of the real one. callers: paths of the modules that
    have called this one, in whichever call, in order; a dict for the sake of its order. repeated:
    whether one of its calls was in a checkpoint, and is made again in the backward pass. ways: that
    the call went where the forward branches on values.
    """

    skeleton: Skeleton
    tensors: list[tuple[torch.Tensor, torch.device]]
    callers: dict[str, None] = field(default_factory=dict)
    repeated: bool = False
    ways: dict[Way, tuple[Any, ...]] = field(default_factory=dict)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) as they were, with new tensors of arbitrary content."""
        tensors = [torch.empty_like(stand_in, device=device) for stand_in, device in self.tensors]
        args, kwargs = rebuild(self.skeleton, tensors)
        return args, kwargs

    @property
    def signature(self) -> tuple[Any, ...]:
        """A hashable value that is equal for calls that a tracer cannot tell apart."""
        looks = [(t.shape, t.stride(), t.dtype, device) for t, device in self.tensors]
        return (str(self.skeleton), *looks)


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int = 0
) -> Recorded:
    """Run the model once and return the calls of all modules in it.

    model: with weights, as its forward really runs. args, kwargs: its example inputs. seed: of the
    random numbers of this run, which are the same on every rank; torch's state is put back, as is
    whatever else the run writes to. The run is without gradients, which take memory, unless the
    forward reaches into the backward pass, and on a copy of the tree of modules, so that the hooks
    are never seen by the user's model.
    Raises CaptureError where the run fails.

    >>> run = record(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.ones(1, 2),), {})
    >>> list(run.calls), run.flops
    (['0', '1'], {'0': 8})
    """
    try:
        return _recorded(model, args, kwargs, seed, gradients=False)
    except _WantsGradientsError:
        return _recorded(model, args, kwargs, seed, gradients=True)


@dataclass(frozen=True)
class Recorded:
    """One example run.

    calls: those of all modules, by path, the first call first. flops: of the matrix products that
    each module computes itself, by path; "" is the model. ways: that the model went.
    """

    calls: Mapping[str, Call]
    flops: Mapping[str, int]
    ways: Ways


class _Ops(TorchDispatchMode):
    """Counts the FLOPs of matrix products, and follows what the inputs and weights decide on.

    owner: the path of the module that is at work. flops: by the modules' paths. varying: tensors
    whose numbers are others in the next call: inputs and parameters, random numbers, what is
    written to, and what is computed from these.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.owner = ""
        self.flops: dict[str, int] = {}
        self.varying: Any = WeakTensorKeyDictionary()

    def varies(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor's numbers are others in the next call."""
        return tensor in self.varying

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(function, "overloadpacket", None))
        if count is not None:
            flops = int(count(*args, **(kwargs or {}), out_val=result))
            self.flops[self.owner] = self.flops.get(self.owner, 0) + flops
        operands = _tensors((args, kwargs))
        written = getattr(schema_of(function), "is_mutable", True)
        drawn = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        if written or drawn or any(tensor in self.varying for tensor in operands):
            for tensor in (*_tensors(result), *(operands if written else ())):
                self.varying[tensor] = True
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Return the tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _WantsGradientsError(Exception):
    """A forward registers a hook on a tensor, which a run without gradients does not allow."""


class _Checkpoints(CallWatch):
    """Counts the checkpoints that a run is inside of."""

    depth = 0

    def reentrant(self, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Run the region of a reentrant checkpoint."""
        with self.region(None):
            return call()

    @contextlib.contextmanager
    def region(self, context: Any) -> Iterator[None]:
        """Count the region of a checkpoint while it runs."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


class _HookWatch(Watch):
    """Ends a run without gradients whose forward reaches into the backward pass."""

    def __init__(self) -> None:
        self.hit = False

    def hooked(self, tensor: torch.Tensor, name: str) -> None:
        """Raise _WantsGradientsError."""
        self.hit = True
        raise _WantsGradientsError


def _recorded(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seed: int,
    gradients: bool,
) -> Recorded:
    """Return one run, as `record` does.

    gradients: whether they are recorded. Raises _WantsGradientsError where they must be.
    """
    copied = shallow_copy(model)
    watch, checkpoints, products = _HookWatch(), _Checkpoints(), _Ops()
    calls: dict[str, Call] = {}
    stack: list[str] = [""]
    ways: dict[Way, tuple[Any, ...]] = {}
    # Of each call that is running: the ways that it goes, None where it is not the first.
    running: list[dict[Way, tuple[Any, ...]] | None] = [ways]

    def enter(path: str) -> Any:
        """Return the hook that notes the call of the module at `path` before it runs."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Note the first call, and each caller."""
            tensors, skeleton = flatten((args, kwargs))
            first = path not in calls
            # Inside of torch.func a tensor is one of a batch: it has not the shape of a call.
            if path not in calls and not any(map(is_functorch_wrapped_tensor, tensors)):
                stand_ins = [(torch.empty_like(t, device="meta"), t.device) for t in tensors]
                calls[path] = Call(_frozen(skeleton), stand_ins)
            products.owner = path
            if path in calls:
                calls[path].callers[stack[-1]] = None
                calls[path].repeated |= checkpoints.depth > 0
            stack.append(path)
            running.append(calls[path].ways if first and path in calls else None)

        return hook

    def note(way: Way, answer: Any) -> None:
        """Note an answer for all calls that are running."""
        for each in running:
            if each is not None:
                each[way] = (*each.get(way, ()), answer)

    def leave(*_: Any) -> None:
        """Go back to the caller when a module has run."""
        stack.pop()
        running.pop()
        products.owner = stack[-1]

    for path, module in copied.named_modules():
        if path:
            module.register_forward_pre_hook(enter(path), with_kwargs=True)
            # Also where the module raises: the caller may catch that and go on.
            module.register_forward_hook(leave, always_call=True)
    tensors, skeleton = flatten((args, dict(kwargs)))
    # Copies, because a forward may write to its inputs.
    copies = [_copied(tensor) for tensor in tensors]
    arguments = rebuild(skeleton, copies)
    for tensor in (*copies, *copied.parameters()):
        products.varying[tensor] = True
    watched = contextlib.nullcontext() if gradients else watch.installed(operators=False)
    recording = torch.enable_grad() if gradients else torch.no_grad()
    try:
        with (
            untouched(model, arguments, values=True),
            recording,
            seeded(seed),
            unprinted(),
            watched,
            checkpoints.installed(),
            products,
            NoteWays(note, products.varies),
        ):
            copied(*arguments[0], **arguments[1])
    except CaptureError:
        raise  # it reads what this run would use up
    except Exception as error:
        # A forward may differentiate by itself, and fail in a run that records no gradients.
        if watch.hit or not gradients:
            raise _WantsGradientsError from error
        raise CaptureError(
            f"the example run of {type(model).__name__} failed",
            why=f"{type(error).__name__}: {error}",
            fix="pass example_inputs with which the model runs",
        ) from error
    # The model may have caught it.
    if watch.hit:
        raise _WantsGradientsError
    return Recorded(calls, products.flops, ways)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of an input that looks to the forward as the input itself does."""
    copied = tensor.detach().clone().requires_grad_(tensor.requires_grad and tensor.is_leaf)
    return keep_attributes(tensor, copied)


def _frozen(skeleton: Skeleton) -> Skeleton:
    """Return the skeleton with copies of the objects in it that the run may change later."""
    sample = skeleton.sample
    plain = hasattr(sample, "__dict__") and not isinstance(sample, (type, nn.Module))
    if skeleton.kind == "constant" and plain and not callable(sample):
        with contextlib.suppress(Exception):
            sample = copy.deepcopy(sample)
    return Skeleton(skeleton.kind, sample, skeleton.keys, tuple(map(_frozen, skeleton.children)))
