"""Steps of optimizers for which DTensor has no kernel, or not the unsplit numbers.

Most optimizers of torch compute each element of a parameter by itself. They step on the parts that
the rank holds, which is the same as on DTensors and takes a quarter of the time for many
parameters; a subclass, or one with hooks on its steps, may look at more, and steps on DTensors.
Muon multiplies whole matrices in bfloat16, whose sums over ranks would be rounded otherwise, and
Adafactor takes norms in a way that DTensor refuses: they step on whole parameters, on every rank.
LBFGS lays all parameters end to end, and is refused.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.distributed_layouts import layout_of
from autoparallel.parallel.pipelined_parameters import pipelines_of
from autoparallel.parallel.refused_collectives import refuse_collectives
from autoparallel.parallel.split_tensor import GRADIENT, cut_like, note_writes
from autoparallel.parallel.split_views import forget_values
from autoparallel.parallel.steps_on_parts import StepsOnParts
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.torch_private import (
    global_step_hooks,
    local_part,
    without_function_overrides,
)

__all__ = ["note_originals", "watch_steps"]


class _Way(Enum):
    """The tensors on which an optimizer steps: DTensors, the rank's parts, or whole parameters."""

    DISTRIBUTED = "distributed"
    PARTS = "parts"
    WHOLE = "whole"
    REFUSED = "refused"


# The ways of torch's optimizers, by class. Subclasses step as their base does.
_WAYS = {
    "LBFGS": _Way.REFUSED,
    "Muon": _Way.WHOLE,
    "Adafactor": _Way.WHOLE,
    "Rprop": _Way.PARTS,
}
# Those that may step on parts, if nobody looks at what they step on.
_ELEMENTWISE = frozenset(
    ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")
)
# Those whose fused kernel does not take DTensors.
_FUSED = {"SGD": _Way.PARTS, "Adagrad": _Way.PARTS}

# The package, of which some hooks are.
_OURS = __name__.partition(".")[0] + "."

# The parameters of models that were split, with their paths.
_originals: WeakIdKeyDictionary = WeakIdKeyDictionary()
_log = logging.getLogger(__name__)
# By parameter, the module that was last split of a model that has it, and how many that has.
_taken: WeakIdKeyDictionary = WeakIdKeyDictionary()
# The meshes of parameters that are this package's.
_meshes: weakref.WeakSet[DeviceMesh] = weakref.WeakSet()


def watch_steps(mesh: DeviceMesh) -> None:
    """Have torch's optimizers step rightly on parameters that are DTensors on this mesh.

    It costs one look-up per step for other optimizers.
    """
    _meshes.add(mesh)
    refuse_collectives()
    _watch()


def note_originals(model: nn.Module, split: nn.Module) -> None:
    """Remember the parameters of a model that was split: an optimizer that has these trains none.

    split: the parallel module, which has others.
    """
    _tell_of_shared(model, split)
    own = {id(parameter) for parameter in split.parameters()}
    for path, parameter in model.named_parameters():
        if id(parameter) not in own:
            _originals[parameter] = path
    _watch()


def _tell_of_shared(model: nn.Module, split: nn.Module) -> None:
    """Warn where a model shares some of its parameters with another one that was split before.

    Each split module has copies of its own, which are trained apart. A model that is split again
    shares all of them, and is meant to be another one.
    """
    named = dict(model.named_parameters())
    others: dict[int, tuple[str, int, list[str]]] = {}
    for path, parameter in named.items():
        other, count = _taken.get(parameter, (None, 0))
        earlier = None if other is None else other()
        if earlier is not None and earlier is not split:
            others.setdefault(id(earlier), (type(earlier).__name__, count, []))[2].append(path)
    for kind, count, paths in others.values():
        if len(paths) == len(named) == count:
            continue
        _log.warning(
            "%s of %s %s also in %s, which was split before: each split module has its own, and "
            "they are trained apart; to share them, split one module that holds both",
            ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if paths[3:] else ""),
            type(model).__name__, "are" if paths[1:] else "is", kind,
        )  # fmt: skip
    for parameter in named.values():
        _taken[parameter] = (weakref.ref(split), len(named))


def _held(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the parameters that an optimizer has."""
    return [item for group in optimizer.param_groups for item in group["params"]]


def _refuse_originals(optimizer: torch.optim.Optimizer) -> None:
    """Raise AutoParallelError for a step without gradients of parameters from before a split."""
    held = _held(optimizer)
    if any(item.grad is not None for item in held):
        return
    paths = [_originals[item] for item in held if item in _originals]
    if paths:
        raise AutoParallelError(
            f"{type(optimizer).__name__} has the parameters of the model before it was split",
            where=", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if paths[3:] else ""),
            why="the split module has parameters of its own, and these get no gradients",
            fix="make the optimizer of the split module's parameters, after the model is split",
        )


@cache
def _watch() -> None:
    """Register the hooks on every optimizer's step; only the first of these calls does."""
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


@dataclass
class _Swapped:
    """An optimizer's parameters while others stand in their place.

    groups: the lists of the optimizer's groups. pairs: each parameter and its stand-in, a whole
    one.
    """

    groups: list[list[Any]] = field(default_factory=list)
    pairs: list[tuple[DTensor, nn.Parameter]] = field(default_factory=list)


_swapped: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Swapped] = weakref.WeakKeyDictionary()


# Those that have stepped on parts, and those that are doing so.
_on_parts: weakref.WeakKeyDictionary[torch.optim.Optimizer, StepsOnParts] = (
    weakref.WeakKeyDictionary()
)
_stepping: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _way_of(optimizer: torch.optim.Optimizer) -> _Way:
    """Return the way in which an optimizer steps."""
    own = type(optimizer)
    for kind in own.__mro__:
        if kind.__module__.startswith("torch.optim"):
            if kind.__name__ in _WAYS:
                return _WAYS[kind.__name__]
            if kind.__name__ in _FUSED and any(g.get("fused") for g in optimizer.param_groups):
                return _FUSED[kind.__name__]
    seen = _is_watched(optimizer) or optimizer.defaults.get("differentiable")
    torchs = own.__module__.startswith("torch.optim") and own.__name__ in _ELEMENTWISE
    if torchs and not seen and not torch.compiler.is_compiling():
        return _Way.PARTS
    return _Way.DISTRIBUTED


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the user's hooks run around an optimizer's steps, or those of all."""
    everywhere = chain.from_iterable(hooks.values() for hooks in global_step_hooks())
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or any(not getattr(hook, "__module__", "").startswith(_OURS) for hook in everywhere)
    )


def _before(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put parts or whole parameters in the place of an optimizer's DTensors, where it needs them.

    args, kwargs: of the step; returned where they become others. Raises AutoParallelError for an
    optimizer that steps on no such tensors either.
    """
    # args[0] is the optimizer; a closure would make the gradients yet.
    if len(args) < 2 and not kwargs:
        _refuse_originals(optimizer)
    way = _way_of(optimizer)
    _restore(optimizer)  # a step before may have been broken off
    ours = list(_split_parameters(optimizer)) if way is not _Way.PARTS else []
    if way is _Way.DISTRIBUTED:
        with without_function_overrides():
            _cut_states(optimizer, ours)
        return None
    name = type(optimizer).__name__
    # A rank of a pipeline may have none of the parameters, and refuses what the others refuse.
    if way is _Way.REFUSED and (ours or pipelines_of(_held(optimizer))):
        raise AutoParallelError(
            f"{name} cannot step on a split module",
            why="it lays all parameters end to end in one vector, of which DTensor cannot say the "
            "parts",
            fix="use another optimizer, or leave the module unsplit (world_size=1)",
        )
    if way is not _Way.PARTS and not ours:
        return None
    if way is _Way.PARTS and _is_watched(optimizer):
        raise AutoParallelError(
            f"{name} cannot step on a split module where hooks on its steps are registered",
            why="it steps on the rank's parts of the parameters, and the hooks would see these",
            fix="remove the hooks, or pass fused=False or another optimizer",
        )
    changed = _called_first(args, kwargs)
    if way is _Way.PARTS:
        _step_on_parts(optimizer)
        return changed
    swapped = _swapped[optimizer] = _Swapped()
    stand_ins: dict[int, nn.Parameter] = {}
    with torch.no_grad(), without_function_overrides():
        for parameter in ours:
            stand_in = _whole_stand_in(parameter)
            stand_ins[id(parameter)] = stand_in
            swapped.pairs.append((parameter, stand_in))
            if parameter in optimizer.state:
                optimizer.state[stand_in] = optimizer.state.pop(parameter)
    for group in optimizer.param_groups:
        swapped.groups.append(group["params"])
        group["params"] = [stand_ins.get(id(p), p) for p in group["params"]]
    return changed


def _step_on_parts(optimizer: torch.optim.Optimizer) -> None:
    """Put the rank's parts in the place of an optimizer's parameters, until its step ends."""
    with torch.no_grad(), without_function_overrides():
        steps = _on_parts.get(optimizer)
        if steps is None or not steps.fits(optimizer):
            ours = set(map(id, _split_parameters(optimizer)))
            if optimizer not in _on_parts:
                # It may be saved after a step that was broken off.
                optimizer.register_state_dict_pre_hook(_restore)
            steps = StepsOnParts(optimizer, lambda item: id(item) in ours, steps)
            _on_parts[optimizer] = steps
        if steps.units:
            _stepping.add(optimizer)
            steps.enter(optimizer)


def _cut_states(optimizer: torch.optim.Optimizer, ours: list[DTensor]) -> None:
    """Make DTensors of what is remembered for each element.

    It may have been loaded from an optimizer of the unsplit model, or be of steps on parts. Of a
    parameter that is a single number, that is all but what others remember a number of.
    """
    entries = [(parameter, optimizer.state.get(parameter) or {}) for parameter in ours]
    counts = {
        key
        for parameter, entry in entries
        for key, value in entry.items()
        if parameter.ndim and isinstance(value, torch.Tensor) and not value.ndim
    }
    for parameter, entry in entries:
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and (value.ndim or key not in counts):
                entry[key] = cut_like(value, parameter)


def _called_first(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call the closure that a step was given, if any, and return arguments with its loss.

    All optimizers but LBFGS call it once, before anything else. It fills the gradients of the
    parameters, of which stand-ins are made.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    others = {name: value for name, value in kwargs.items() if name != "closure"}
    return (args[0],), others | {"closure": lambda: loss}


def _after(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Give the optimizer its parameters back, with the values and the state of the stand-ins."""
    forget_values()
    if optimizer in _stepping:
        _restore(optimizer)
        return
    swapped = _swapped.get(optimizer)
    if swapped is None:
        # DTensor's ops write to the parts without their versions' notice: the backward pass of a
        # loss from before the step would take the new values for those that it has kept.
        with without_function_overrides():
            split = _split_parameters(optimizer)
            note_writes([p for p in split if GRADIENT.__get__(p) is not None])
        return
    with torch.no_grad():
        for parameter, stand_in in swapped.pairs:
            layout, here = layout_of(parameter), parameter.device_mesh.get_coordinate()
            assert layout is not None
            assert here is not None
            sizes = tuple(parameter.device_mesh.shape)
            part = take_layout_part(stand_in.detach(), layout, sizes, tuple(here))
            local_part(parameter).copy_(part)
    _restore(optimizer)


def _restore(optimizer: torch.optim.Optimizer) -> None:
    """Put an optimizer's own parameters and their state in their place again."""
    if optimizer in _stepping:
        _stepping.discard(optimizer)
        with torch.no_grad(), without_function_overrides():
            _on_parts[optimizer].leave(optimizer)
    swapped = _swapped.pop(optimizer, None)
    if swapped is None:
        return
    for group, parameters in zip(optimizer.param_groups, swapped.groups, strict=False):
        group["params"] = parameters
    for parameter, stand_in in swapped.pairs:
        if stand_in in optimizer.state:
            optimizer.state[parameter] = optimizer.state.pop(stand_in)


def _split_parameters(optimizer: torch.optim.Optimizer) -> Iterator[DTensor]:
    """Return the optimizer's parameters that are DTensors of this package."""
    known: dict[int, bool] = {}  # by mesh: to ask a mesh for its hash takes long
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                if id(mesh) not in known:
                    known[id(mesh)] = mesh in _meshes
                if known[id(mesh)]:
                    yield parameter


def _whole_stand_in(parameter: DTensor) -> nn.Parameter:
    """Return the whole of a parameter, which stands for it in a step, with its gradient."""
    gradient: Any = parameter.grad
    whole: Any = parameter.detach()
    stand_in = nn.Parameter(whole.full_tensor().clone(), parameter.requires_grad)
    stand_in.grad = None if gradient is None else gradient.full_tensor()
    return stand_in
