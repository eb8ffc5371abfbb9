"""What the user holds of a split model is a tensor that answers as the whole one does.

Parameters, their gradients and outputs that stay split are DTensors. DTensor computes with others
of its kind, and it has gaps that are silent: it refuses a plain tensor beside it, has each rank
draw the same random numbers for another part, gives a rank's own term of a sum that is pending
where a number is read, and writes to a copy where a view was asked for. `SplitTensor` closes them:
torch tells it of every function that is called with it, and where DTensor has no right answer, the
function runs on the whole value, alike on all ranks, and what it wrote is put into the parts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.distributed_layouts import layout_of
from autoparallel.parallel.function_kinds import FunctionKind, kind_of, writes
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.torch_private import (
    distributed_tensor_like,
    local_part,
    share_local_part,
    storage_key,
    without_function_overrides,
)

__all__ = ["SplitTensor", "cut_like", "mark", "note_writes", "part_of", "whole_of"]


class SplitTensor(DTensor):
    """A DTensor with which all of torch's functions give what they give with the whole tensor.

    One is made of a DTensor by `mark`, which leaves it the same object.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch that was called with split tensors; see `FunctionKind`."""
        with without_function_overrides():
            kind = kind_of(func)
            if kind is FunctionKind.PASSED:
                return func(*args, **(kwargs or {}))
            return _run(kind, func, args, kwargs or {})

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
    """Return a DTensor in the same memory; a parameter if it is one, with its gradient."""
    twin = distributed_tensor_like(local_part(tensor), tensor)
    twin.requires_grad_(tensor.requires_grad)
    if isinstance(tensor, torch.nn.Parameter):
        twin = cast("DTensor", torch.nn.Parameter(twin, tensor.requires_grad))
    if tensor.is_leaf and tensor.grad is not None:
        grad: Any = tensor.grad
        twin.grad = distributed_tensor_like(local_part(grad), grad)
    vars(twin).update(vars(tensor))
    return twin


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among a function's arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return arguments or results with another tensor for each."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)([_replaced(item, change) for item in value])
    if type(value) is dict:
        return {key: _replaced(item, change) for key, item in value.items()}
    # A result such as that of `max` is a tuple with names.
    if isinstance(value, tuple):
        return type(value)([_replaced(item, change) for item in value])
    return value


def _run(kind: FunctionKind, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function that computes, on parts or on whole values."""
    if kind is FunctionKind.MARKED:
        return _replaced(function(*args, **kwargs), mark)
    if kind is FunctionKind.VIEWS and len(args) == 2 and args[0] is args[1]:
        # p.expand_as(p) is how one asks for the node that adds to a parameter's gradient.
        return mark(function(*args, **kwargs))
    if kind is FunctionKind.MEMORY:
        return _memory(function, args, kwargs)
    if kind is FunctionKind.GRADIENT:
        return function(args[0], *(cut_like(item, args[0]) for item in args[1:]))
    tensors = list(_tensors((args, kwargs)))
    recorded = torch.is_grad_enabled()
    split = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    whole = (
        kind is FunctionKind.WHOLE
        # DTensor takes a number in a tensor for equal on all ranks.
        or any(tensor.ndim or (recorded and tensor.requires_grad) for tensor in plain)
        # What a parameter's gradient comes back as must be placed as the parameter is.
        or (recorded and any(tensor.is_leaf and tensor.requires_grad for tensor in split))
    )
    if getattr(function, "__module__", "") == "torch.nn.init":
        with torch.no_grad():  # as these functions do themselves
            return _on_whole(function, args, kwargs)
    if whole:
        return _on_whole(function, args, kwargs)
    for tensor in split:
        if "_copied" in vars(tensor) and writes(function):
            raise AutoParallelError(
                f"{function.__name__} would write to a copy of a part of a split tensor",
                why="the view that was taken of it spans the parts of several ranks",
                fix="write to the tensor itself: tensor[index] = value, under torch.no_grad()",
            )
    try:
        result = function(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        # Nothing has run then: torch looks for a way to split an op before it runs it.
        if "sharding" not in str(error).lower():
            raise
        return _on_whole(function, args, kwargs)
    if kind is FunctionKind.VIEWS:
        _note_copies(result, split[0])
    if writes(function):
        note_writes(_tensors(_target(args, kwargs)))
    return _replaced(result, mark)


def _target(args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a function, to which it writes if it writes to any."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _note_copies(result: Any, source: DTensor) -> None:
    """Mark views that share no memory with the tensor that they are of."""
    for tensor in _tensors(result):
        if isinstance(tensor, DTensor):
            same = storage_key(local_part(tensor)) == storage_key(local_part(source))
            if not same or "_copied" in vars(source):
                vars(tensor)["_copied"] = True


def _on_whole(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function on the whole values of split tensors, and keep what it writes to them.

    It is a collective call, as all that reads whole values.
    """
    if writes(function):
        _refuse_recorded(function, _target(args, kwargs))
    shown: dict[int, tuple[DTensor, torch.Tensor, int]] = {}

    def show(tensor: Any) -> Any:
        if not isinstance(tensor, DTensor):
            return tensor
        if id(tensor) not in shown:
            with torch.inference_mode(False):
                value = whole_of(tensor)
            shown[id(tensor)] = (tensor, value, value._version)
        return shown[id(tensor)][1]

    result = function(*_replaced(args, show), **_replaced(kwargs, show))
    originals = {id(value): tensor for tensor, value, _ in shown.values()}
    for tensor, value, version in shown.values():
        if value._version != version:
            _keep(function, tensor, value)
    if isinstance(result, numpy.ndarray):
        # What is written to it would not reach the parts.
        result.flags.writeable = False
    return _replaced(result, lambda tensor: originals.get(id(tensor), tensor))


def _keep(function: Any, tensor: DTensor, value: torch.Tensor) -> None:
    """Write the rank's part of a whole value that was written to."""
    if value.requires_grad:
        _refuse_recorded(function, tensor)
    with torch.no_grad(), torch.inference_mode(False):
        part = cut_like(value.detach(), tensor)
        if part.placements == tensor.placements and part.shape == tensor.shape:
            local_part(tensor).copy_(local_part(part))
        else:
            share_local_part(tensor, part)


def _refuse_recorded(function: Any, target: Any) -> None:
    """Raise an error for a function that writes to a split tensor where autograd records it."""
    for tensor in _tensors(target):
        if not torch.is_grad_enabled() or not isinstance(tensor, DTensor):
            continue
        if tensor.is_leaf and tensor.requires_grad:
            # In torch's own words, because it is the user's mistake, and not one of splitting.
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation."
            )
        if tensor.requires_grad:
            raise AutoParallelError(
                f"{function.__name__} writes to a split tensor in place, which autograd records",
                why="it was run on the whole value, of which each rank keeps a part",
                fix="use the function that returns its result: tensor = tensor.add(other)",
            )


def _memory(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Refuse libraries that read a split tensor's memory; torch itself knows that it has none."""
    frame: Any = sys._getframe(3)
    # Torch's own Python, or a mode that watches calls, may stand between.
    between = ("__torch_function__", "handle_torch_function", function.__name__)
    while frame.f_back is not None and frame.f_code.co_name in between:
        frame = frame.f_back
    caller = str(frame.f_globals.get("__name__"))
    if caller.startswith(("torch.", "autoparallel.")):
        return function(*args, **kwargs)
    raise AutoParallelError(
        f"{caller} asks for the memory of a split tensor",
        why="this rank holds a part of it, which is not what the whole tensor's memory would be",
        fix="pass whole tensors: autoparallel.full_state_dict(model), on every rank; or "
        "tensor.full_tensor()",
    )


def whole_of(tensor: DTensor) -> torch.Tensor:
    """Return the whole value, in memory of its own, through which gradients flow to the parts.

    A collective call.
    """
    value: torch.Tensor = _Whole.apply(tensor)
    return value


def cut_like(value: Any, like: Any) -> Any:
    """Return the rank's part of a whole tensor as a DTensor that is split as another one is.

    What is no whole tensor of its size, or is split already, stays as it is. Where the other one is
    a sum that is pending, the result is whole on every rank.
    """
    if (
        not isinstance(value, torch.Tensor)
        or isinstance(value, DTensor)
        or not isinstance(like, DTensor)
        or value.shape != like.shape
    ):
        return value
    return mark(_cut(value, like.device_mesh, _without_sums(like.placements)))


def part_of(value: torch.Tensor, mesh: Any, placements: Any) -> Any:
    """Return the rank's part of a whole tensor, as a split tensor of which gradients come back."""
    return mark(_Part.apply(value, mesh, tuple(placements)))


def note_writes(tensors: Iterable[Any]) -> None:
    """Tell autograd that the parts of split tensors were written to, as DTensor does not.

    A backward pass that has kept the values from before then fails, in torch's words.
    """
    parts = [local_part(tensor) for tensor in tensors if isinstance(tensor, DTensor)]
    torch.autograd.graph.increment_version([part for part in parts if not part.is_inference()])


def _without_sums(placements: Any) -> Any:
    """Return placements with every pending sum made."""
    return tuple(Replicate() if isinstance(one, Partial) else one for one in placements)


def _cut(value: torch.Tensor, mesh: Any, placements: Any) -> DTensor:
    """Return the rank's part of a whole tensor that is the same on all ranks, as a DTensor."""
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    like = DTensor.from_local(
        torch.empty(0, device="meta", dtype=value.dtype), mesh, placements, run_check=False,
        shape=value.shape, stride=torch.empty(value.shape, device="meta").stride(),
    )  # fmt: skip
    layout, here = layout_of(like), mesh.get_coordinate()
    if layout is None or here is None:
        return everywhere.redistribute(mesh, placements)
    part = take_layout_part(value, layout, tuple(mesh.shape), tuple(here))
    # A part that is a view would keep the whole in memory.
    local = part.clone(memory_format=torch.contiguous_format)
    cut: DTensor = distributed_tensor_like(local, like)
    return cut


class _Whole(torch.autograd.Function):
    """The whole value of a split tensor; its gradient is cut as the tensor is."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> torch.Tensor:
        """Gather the parts, and make the sums that are pending."""
        ctx.set_materialize_grads(False)
        ctx.mesh, ctx.placements = tensor.device_mesh, _without_sums(tensor.placements)
        local = local_part(tensor)
        whole: torch.Tensor = distributed_tensor_like(local.detach(), tensor).full_tensor()
        return whole.clone() if storage_key(whole) == storage_key(local) else whole

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        """Cut the gradient, which is whole and the same on all ranks."""
        return None if grad is None else part_of(grad, ctx.mesh, ctx.placements)


class _Part(torch.autograd.Function):
    """The rank's part of a whole value, as a split tensor; its gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, mesh: Any, placements: Any) -> DTensor:
        """Cut the value."""
        ctx.set_materialize_grads(False)
        return _cut(value.detach(), mesh, placements)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Gather the gradient of the part."""
        return (None if grad is None else _Whole.apply(grad)), None, None
