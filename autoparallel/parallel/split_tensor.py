"""The user holds tensors of a split model that answer as the whole ones do.

Parameters, their gradients and outputs that stay split are DTensors. DTensor computes with others
of its kind, and it has gaps that are silent: it refuses a plain tensor beside it, has each rank
draw the same random numbers for another part, gives a rank's own term of a sum that is pending
where a number is read, and writes to a copy where a view was asked for. `SplitTensor` closes them:
torch tells it of every function that is called with it, and where DTensor has no right answer, the
function runs on the whole value, alike on all ranks, and what it wrote is put into the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy
import torch
from torch.distributed.tensor import DTensor, Replicate

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.cut_values import (
    at_start_of_memory,
    cut_value,
    without_sums,
)
from autoparallel.parallel.function_arguments import (
    replaced_tensors,
    tensors_among,
    without_own_device,
    written_argument,
)
from autoparallel.parallel.function_kinds import FunctionKind, kind_of
from autoparallel.parallel.given_gradients import derived
from autoparallel.parallel.pipelined_parameters import refuse_norms_of_stages
from autoparallel.parallel.recorded_gathers import recorded_part, recorded_whole
from autoparallel.parallel.refused_functions import (
    recorded_write,
    refuse_memory,
    refuse_recorded_write,
)
from autoparallel.parallel.split_views import (
    forget_values,
    is_stale,
    keep_view,
    note_view,
    placed,
    view_of,
    without_history,
)
from autoparallel.runtime.faults import explained, is_lost
from autoparallel.support.memory_writes import writes
from autoparallel.support.torch_private import (
    local_part,
    placed_alike,
    share_local_part,
    storage_key,
    with_function_overrides,
    without_function_overrides,
)

__all__ = [
    "GRADIENT",
    "SplitTensor",
    "WholeHook",
    "cut_like",
    "mark",
    "note_writes",
    "part_of",
    "whole_of",
]


# Torch's own attribute, past the one that split tensors have: `GRADIENT.__get__(parameter)` is the
# gradient as it lies there, a DTensor that nobody has read.
GRADIENT: Any = torch.Tensor.grad


class SplitTensor(DTensor):
    """A DTensor with which all of torch's functions give what they give with the whole tensor.

    One is made of a DTensor by `mark`, which leaves it the same object.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch that was called with split tensors; see `FunctionKind`."""
        refuse_norms_of_stages(func, args)
        try:
            with without_function_overrides():
                kind = kind_of(func)
                if kind is FunctionKind.PASSED:
                    return func(*args, **(kwargs or {}))
                return _run(kind, func, args, kwargs or {})
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise explained(error, f"a collective of {func.__name__}") from error

    @property
    def grad(self) -> Any:
        """The gradient, a split tensor. An optimizer asks for it many times in each step, and is
        answered here sooner than by way of `__torch_function__`.
        """
        with without_function_overrides():
            gradient = GRADIENT.__get__(self)
        return gradient if gradient is None else mark(gradient)

    @grad.setter
    def grad(self, gradient: Any) -> None:
        with without_function_overrides():
            GRADIENT.__set__(self, gradient if gradient is None else cut_like(gradient, self))

    @grad.deleter
    def grad(self) -> None:
        with without_function_overrides():
            GRADIENT.__set__(self, None)

    def full_tensor(self, **options: Any) -> torch.Tensor:
        """Return the whole value as DTensor does; a view's is that of the tensor it is of.

        Raises AutoParallelError where another rank is gone.
        """
        _follow(self)
        if local_part(self).layout is not torch.strided:
            return whole_of(self)
        try:
            return super().full_tensor(**options)
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise explained(error, "all_gather of full_tensor()") from error

    @staticmethod
    def __tensor_unflatten__(
        inner_tensors: Any, flatten_spec: Any, outer_size: Any, outer_stride: Any
    ) -> Any:
        """Return a split tensor of its parts: torch.compile takes it apart and expects its class
        again.
        """
        return mark(
            DTensor.__tensor_unflatten__(inner_tensors, flatten_spec, outer_size, outer_stride)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy that is split alike, with memory of its own."""
        if id(self) in memo:
            return memo[id(self)]
        with without_function_overrides():
            plain = _unmarked(self)
            # The table knows it by its id, which must not become another object's.
            memo.setdefault(id(memo), []).append(plain)
            copied: Any = mark(plain.__deepcopy__(memo))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files hold torch's own DTensor, which is read without this package."""
        with without_function_overrides():
            return _unmarked(self).__reduce_ex__(protocol)


def mark(tensor: Any) -> Any:
    """Make a split tensor of a DTensor, the same object, and return it; others stay as they are."""
    if type(tensor) is DTensor:
        tensor.__class__ = SplitTensor
    return tensor


def _unmarked(tensor: SplitTensor) -> DTensor:
    """Return a DTensor to copy or to write to a file, in the same memory or in memory of its own.

    A parameter's is one without a gradient, as torch's copies of parameters are.
    """
    twin = at_start_of_memory(tensor)
    twin.requires_grad_(tensor.requires_grad)
    if isinstance(tensor, torch.nn.Parameter):
        twin = cast("DTensor", torch.nn.Parameter(twin, tensor.requires_grad))
    elif tensor.is_leaf and tensor.grad is not None:
        twin.grad = at_start_of_memory(tensor.grad)
    vars(twin).update(without_history(vars(tensor)))
    return twin


def _run(kind: FunctionKind, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function that computes, on parts or on whole values."""
    if function is torch.Tensor.to:
        args, kwargs = without_own_device(args, kwargs)
    if kind is FunctionKind.MARKED:
        result = replaced_tensors(function(*args, **kwargs), mark)
        if function.__name__ == "detach":
            keep_view(result, view_of(args[0]))
        return result
    if kind is FunctionKind.DERIVES:
        return replaced_tensors(derived(function, args, kwargs, SplitTensor), mark)
    if kind is FunctionKind.DATA:
        data = mark(function(*args, **kwargs))
        keep_view(data, view_of(args[0]))
        vars(data)["_unrecorded"] = True
        return data
    if kind is FunctionKind.NEW:
        return function(local_part(args[0]), *args[1:], **kwargs)
    if kind is FunctionKind.HOOKS:
        return function(args[0], *map(WholeHook, args[1:]), **kwargs)
    if kind is FunctionKind.VIEWS and len(args) == 2 and args[0] is args[1]:
        # p.expand_as(p) is how one asks for the node that adds to a parameter's gradient.
        return mark(function(*args, **kwargs))
    if kind is FunctionKind.MEMORY:
        return refuse_memory(function, args, kwargs)
    if kind is FunctionKind.GRADIENT:
        return function(args[0], *(cut_like(item, args[0]) for item in args[1:]))
    if kind is FunctionKind.ASSIGNED:
        function(*args)
        _share(*args)
        return None
    tensors = list(tensors_among((args, kwargs)))
    if any(_dense(tensor) is not tensor for tensor in tensors):
        args, kwargs = replaced_tensors((args, kwargs), _dense)
        return function(*args, **kwargs)
    recorded = torch.is_grad_enabled()
    split = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    for tensor in split:
        _follow(tensor)
    plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    whole = (
        kind is FunctionKind.WHOLE
        or kwargs.get("out") is not None
        # DTensor takes a number in a tensor for equal on all ranks.
        or any(tensor.ndim or (recorded and tensor.requires_grad) for tensor in plain)
        # What a parameter's gradient comes back as must be placed as the parameter is.
        or (recorded and any(tensor.is_leaf and tensor.requires_grad for tensor in split))
    )
    if getattr(function, "__module__", "") == "torch.nn.init":
        with torch.no_grad():  # as these functions do themselves
            return _on_whole(function, args, kwargs)
    target = written_argument(args, kwargs)
    if writes(function) and isinstance(target, DTensor) and view_of(target) is not None:
        return _written_through(function, target, args, kwargs)
    if whole:
        return _views_on_whole(kind, function, args, kwargs)
    try:
        result = function(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        # Nothing has run then: torch looks for a way to split an op before it runs it.
        if not any(words in str(error).lower() for words in _NO_WAY):
            raise
        return _views_on_whole(kind, function, args, kwargs)
    if kind is FunctionKind.VIEWS:
        for place, view in placed(result):
            _note_copy(view, function, args, kwargs, place)
    if writes(function):
        note_writes(tensors_among(written_argument(args, kwargs)))
    return replaced_tensors(result, mark)


def _dense(tensor: Any) -> Any:
    """Return what a rank has of a sparse tensor, which is all of it; others stay as they are.

    DTensor takes a sparse tensor for a dense one.
    """
    if isinstance(tensor, DTensor) and local_part(tensor).layout is not torch.strided:
        return local_part(tensor)
    return tensor


# What torch says of an op that DTensor cannot split, before anything runs.
_NO_WAY = ("sharding", "not supported with dtensor")


def _note_copy(view: Any, function: Any, args: Any, kwargs: dict[str, Any], place: Any) -> None:
    """Have a view remember how it was taken if it shares no memory with the tensor it is of."""
    source = written_argument(args, kwargs)
    if isinstance(view, DTensor) and isinstance(source, DTensor):
        same = storage_key(local_part(view)) == storage_key(local_part(source))
        if args and (not same or view_of(source) is not None):
            note_view(view, source, function, args[1:], kwargs, place)


def _views_on_whole(kind: FunctionKind, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function on whole values; views of them are made split tensors that follow theirs.

    Where autograd records, nobody may write to a view of a parameter, and it stays whole.
    """
    result = _on_whole(function, args, kwargs)
    source = args[0] if args else None
    recorded = torch.is_grad_enabled() and isinstance(source, DTensor) and source.requires_grad
    if kind is not FunctionKind.VIEWS or not isinstance(source, DTensor) or recorded:
        return result
    everywhere = [Replicate()] * source.device_mesh.ndim
    views = []
    for place, view in placed(result):
        tracked = torch.is_grad_enabled() and view.requires_grad
        if not isinstance(view, DTensor) and not tracked:
            view = mark(cut_value(view.detach(), source.device_mesh, everywhere))
            note_view(view, source, function, args[1:], kwargs, place)
        views.append(view)
    return type(result)(views) if isinstance(result, (list, tuple)) else views[0]


def _written_through(function: Any, target: DTensor, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function that writes to a view, on the whole value of the tensor that it is of."""
    view = view_of(target)
    assert view is not None
    base = view.base
    refuse_recorded_write(function, base)
    recorded = torch.is_grad_enabled() and any(
        one.requires_grad for one in tensors_among((args, kwargs))
    )
    if recorded and "_unrecorded" not in vars(base):
        raise recorded_write(function)
    with torch.inference_mode(False), torch.no_grad():
        whole = whole_of(base)
        value = view.of_whole(whole)
        given = replaced_tensors(
            (args, kwargs), lambda tensor: value if tensor is target else tensor
        )
        result = _on_whole(function, *given)
    _keep(function, base, whole)
    _show(target, value)
    keep_view(target, view)
    return target if result is value else result


def _follow(tensor: DTensor) -> None:
    """Bring a view that is a copy up to date."""
    view = view_of(tensor)
    if view is not None and is_stale(tensor):
        with torch.inference_mode(False), torch.no_grad():
            _show(tensor, view.of_whole(whole_of(view.base)))
        keep_view(tensor, view)


def _share(tensor: DTensor, value: Any) -> None:
    """Have a split tensor hold the parts of another one, of which torch gives it the type alone."""
    if isinstance(value, DTensor):
        _follow(value)
        with torch.inference_mode(False), torch.no_grad():
            given: Any = value.detach()
            if not placed_alike(given, tensor):
                given = given.redistribute(tensor.device_mesh, tensor.placements)
            share_local_part(tensor, given)
            note_writes([tensor])


def _show(tensor: DTensor, value: torch.Tensor) -> None:
    """Have a split tensor hold the rank's part of a whole value."""
    forget_values(tensor)
    with torch.inference_mode(False), torch.no_grad():
        part = cut_like(value.detach(), tensor)
        if not isinstance(part, DTensor):
            raise AutoParallelError(
                f"a split tensor of size {tuple(tensor.shape)} becomes one of {tuple(value.shape)}",
                why="a function has changed its size in place, and its parts have theirs",
                fix="use the function that returns its result: tensor = tensor.t()",
            )
        if part.placements == tensor.placements and part.shape == tensor.shape:
            local_part(tensor).copy_(local_part(part))
        else:
            share_local_part(tensor, part)


def _on_whole(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function on the whole values of split tensors, and keep what it writes to them.

    It is a collective call, as all that reads whole values.
    """
    if writes(function):
        refuse_recorded_write(function, written_argument(args, kwargs))
    shown: dict[int, tuple[DTensor, torch.Tensor, int]] = {}
    recorded = torch.is_grad_enabled()

    def show(tensor: Any) -> Any:
        if not isinstance(tensor, DTensor):
            return tensor
        if id(tensor) not in shown:
            # To leave inference mode is to switch gradients on.
            with torch.inference_mode(False), torch.set_grad_enabled(recorded):
                value = whole_of(tensor)
            shown[id(tensor)] = (tensor, value, value._version)
        return shown[id(tensor)][1]

    result = function(*replaced_tensors(args, show), **replaced_tensors(kwargs, show))
    originals = {id(value): tensor for tensor, value, _ in shown.values()}
    for tensor, value, version in shown.values():
        if value._version != version:
            _keep(function, tensor, value)
    if isinstance(result, numpy.ndarray):
        # What is written to it would not reach the parts.
        result.flags.writeable = False
    return replaced_tensors(result, lambda tensor: originals.get(id(tensor), tensor))


def _keep(function: Any, tensor: DTensor, value: torch.Tensor) -> None:
    """Write the rank's part of a whole value that was written to."""
    if value.grad_fn is not None:
        refuse_recorded_write(function, tensor)
        if "_unrecorded" not in vars(tensor):
            raise recorded_write(function)
    _show(tensor, value)


class WholeHook:
    """A hook of the user's on a split tensor, which computes with the whole tensor's words.

    Torch runs hooks in the backward pass, where functions of torch are not told of split tensors.
    What it returns in place of a gradient is split as the gradient is.
    """

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self.hook = hook

    def __call__(self, tensor: Any) -> Any:
        with with_function_overrides():
            result = self.hook(mark(tensor))
        return cut_like(result, tensor)


def whole_of(tensor: DTensor) -> torch.Tensor:
    """Return the whole value, in memory of its own, through which gradients flow to the parts.

    A collective call.
    """
    return recorded_whole(tensor, SplitTensor)


def cut_like(value: Any, like: Any) -> Any:
    """Return the rank's part of a tensor as a DTensor that is split as another one is.

    What is no tensor of its size, or is split alike, stays as it is. What is split in another way,
    or is a sum that is pending, is gathered first. Where the other one is a sum that is pending,
    the result is whole on every rank.
    """
    if (
        not isinstance(value, torch.Tensor)
        or not isinstance(like, DTensor)
        or value.shape != like.shape
    ):
        return value
    placements = without_sums(like.placements)
    if not isinstance(value, DTensor):
        return mark(cut_value(value, like.device_mesh, placements))
    if value.device_mesh != like.device_mesh or value.placements == placements:
        return value
    if torch.is_grad_enabled() and value.requires_grad:
        return part_of(whole_of(value), like.device_mesh, placements)
    return mark(cut_value(whole_of(value), like.device_mesh, placements))


def part_of(value: torch.Tensor, mesh: Any, placements: Any) -> Any:
    """Return the rank's part of a whole tensor, as a split tensor of which gradients come back."""
    return recorded_part(value, mesh, placements, SplitTensor)


def note_writes(tensors: Iterable[Any]) -> None:
    """Tell autograd that the parts of split tensors were written to, as DTensor does not.

    A backward pass that has kept the values from before then fails, in torch's words.
    """
    split = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    for tensor in split:
        forget_values(tensor)
    parts = [local_part(tensor) for tensor in split]
    torch.autograd.graph.increment_version([part for part in parts if not part.is_inference()])
