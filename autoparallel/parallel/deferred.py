"""A module that becomes parallel when it is first called: only then are its inputs known."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoparallel.errors import PlanError
from autoparallel.parallel.checkpoint_files import is_first_rank
from autoparallel.parallel.compiled_calls import CompiledCalls
from autoparallel.parallel.copies import refuse_pickling, saved_whole, usual_copy
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.optimizer_steps import note_originals
from autoparallel.parallel.parameter_hooks import carry_gradient_hooks
from autoparallel.parallel.parameters import as_distributed
from autoparallel.parallel.seeds import give_generator
from autoparallel.placement import whole_layout
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.module_copy import redirect, shallow_copy
from autoparallel.support.module_paths import join_path
from autoparallel.support.torch_private import share_local_part

__all__ = ["Make", "deferred", "is_deferred"]

# A function that plans a model for the arguments of its first call, and applies the plan.
Make = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], nn.Module]

# The attribute in which a deferred module keeps its `_Waiting`.
_WAITING = "_waiting"
# The attribute in which it keeps the handle of its hook on load_state_dict.
_HOOK = "_waiting_hook"


@dataclass(frozen=True, slots=True)
class _Waiting:
    """The model that a deferred module stands for, and the function that makes it parallel.

    kind: the user's class. make: see `deferred`.
    """

    kind: type
    make: Make


class _Deferred(CompiledCalls):
    """Mixed into the user's class until the first call shows what the inputs are."""

    @property
    def plan(self) -> NoReturn:
        """There is none yet: raises PlanError."""
        raise _not_yet(self)

    @property
    def emitted_program(self) -> NoReturn:
        """There is none yet: raises PlanError."""
        raise _not_yet(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise AutoParallelError: a module of this process group cannot be pickled."""
        refuse_pickling(self)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a second module that waits for its own first call."""
        return usual_copy(self, memo)  # type: ignore[arg-type]


def _class_of(kind: Any) -> type[nn.Module]:
    """Return the class of a module of the user's class until its first call."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Become the parallel module of the class and attributes that it has, and run that."""
        waiting: _Waiting = self.__dict__[_WAITING]
        # What is made in inference mode could not be trained with later.
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
            parallel = waiting.make(_plain(self), args, kwargs)
            _keep_identity(self, parallel)
        # A seed that was set before the first call stays set.
        parallel.__dict__["_generator"] = self.__dict__["_generator"]
        self.__class__ = parallel.__class__
        self.__dict__ = parallel.__dict__
        _tell_tree(self)
        # Not by a call: the hooks around this one run already.
        return self.forward(*args, **kwargs)

    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "forward": forward,
        **saved_whole(kind, _first_plain),
    }
    deferred_class: type[nn.Module] = type(f"Parallel{kind.__name__}", (_Deferred, kind), body)
    return deferred_class


def _not_yet(module: object) -> PlanError:
    """Return the error for what only a planned module has."""
    return PlanError(
        f"{type(module).__name__} has no plan yet",
        why="it was made without example inputs, and is planned for those of its first call",
        fix="pass example_inputs=... to autoparallelize(), or call the module once",
    )


def deferred(
    model: nn.Module, rng: str, ranks: Ranks, devices: DeviceMesh | None, make: Make
) -> nn.Module:
    """Return a copy of the model that is made parallel when it is first called.

    rng: the mode of its random numbers. ranks, devices: the mesh on which its parameters lie until
    then, unsharded on every rank; devices is None for a single process. make: a function that is
    called once, with the plain model, holding the weights of then, and the arguments of the first
    call; it returns the parallel module.
    The copy's parameters are objects of its own from the start and stay the same objects, so that
    an optimizer may take them before the first call. Until then it can be loaded, saved, changed
    and copied as the user's model can.
    """
    # The class is the user's, so that isinstance holds, under the name that it will keep.
    waiting = shallow_copy(model)
    kind = type(model)
    waiting.__class__ = _class_of(kind)
    waiting.__dict__[_WAITING] = _Waiting(kind, make)
    give_generator(waiting, rng, ranks, devices)
    twins: dict[int, nn.Parameter] = {}
    buffers: dict[int, torch.Tensor] = {}
    # What is made in inference mode could not be trained with later.
    with torch.inference_mode(False):
        for module in waiting.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    data: torch.Tensor = parameter.detach().clone()
                    if devices is not None:
                        layout = whole_layout(len(ranks.names))
                        data = as_distributed(data, layout, tuple(data.shape), devices)
                    twin = nn.Parameter(data, parameter.requires_grad)
                    vars(twin).update(vars(parameter))
                    module._parameters[name] = twins.setdefault(id(parameter), twin)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffers.setdefault(id(buffer), buffer.detach().clone())
    # Attributes may refer to parameters and buffers.
    redirect(waiting.modules(), {**twins, **buffers})
    # It takes plain tensors in load_state_dict, as the user's does.
    waiting.__dict__[_HOOK] = waiting.register_load_state_dict_pre_hook(_as_held)
    carry_gradient_hooks(model, waiting)
    note_originals(model, waiting)
    return waiting


def _as_held(waiting: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace the plain tensors of a state dict by DTensors where the parameters are such."""
    for path, parameter in waiting.named_parameters(remove_duplicate=False):
        value = state_dict.get(prefix + path)
        if isinstance(value, DTensor) or not isinstance(value, torch.Tensor):
            continue
        if isinstance(parameter, DTensor):
            layout, mesh = whole_layout(len(parameter.placements)), parameter.device_mesh
            state_dict[prefix + path] = as_distributed(value, layout, tuple(value.shape), mesh)


def is_deferred(module: nn.Module) -> bool:
    """Return whether the module still waits for its first call, so that it has no plan."""
    return _WAITING in module.__dict__


def _plain(waiting: nn.Module) -> nn.Module:
    """Return the waiting module as a plain one of the user's class.

    Weights may have been loaded, attributes set, hooks registered, and train() or eval() called,
    since the module was made.
    """
    state: _Waiting = waiting.__dict__[_WAITING]
    plain = shallow_copy(waiting)
    for name in (_WAITING, _HOOK, "_generator"):
        plain.__dict__.pop(name, None)
    plain.__class__ = state.kind
    hook = waiting.__dict__[_HOOK]
    plain.__dict__["_load_state_dict_pre_hooks"].pop(hook.id, None)
    twins: dict[int, nn.Parameter] = {}
    for module in plain.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                twin = nn.Parameter(local.detach(), parameter.requires_grad)
                vars(twin).update(vars(parameter))
                module._parameters[name] = twins.setdefault(id(parameter), twin)
    redirect(plain.modules(), twins)
    return plain


def _first_plain(waiting: nn.Module, _kind: type) -> nn.Module | None:
    """Return the waiting module as a plain one on rank 0, None elsewhere."""
    return _plain(waiting) if is_first_rank() else None


def _keep_identity(waiting: nn.Module, parallel: nn.Module) -> None:
    """Give the waiting module's parameter objects the parts that were made for them.

    They take the place of the parallel module's parameters. A parameter that is tied stands in
    several modules and is filled once. Its hooks go on as well.
    """
    before = dict(waiting.named_parameters(remove_duplicate=False))
    modules = dict(waiting.named_modules(remove_duplicate=False))
    filled: set[int] = set()
    for path, module in parallel.named_modules():
        # The handles of hooks know the dictionaries in which they were registered.
        for name, hooks in vars(modules[path]).items():
            if name.startswith(("_forward_", "_backward_")) and isinstance(hooks, dict):
                vars(module)[name] = hooks
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            lasting = before[join_path(path, name)]
            if id(lasting) not in filled:
                filled.add(id(lasting))
                # The object stays, with what optimizers and hooks know of it; its part changes.
                if isinstance(lasting, DTensor):
                    share_local_part(lasting, parameter)
                else:
                    lasting.data = parameter.data
            module._parameters[name] = lasting


def _tell_tree(root: nn.Module) -> None:
    """Note the parameter objects that the model has now in what its split modules share."""
    tree = state_of(root).tree
    tree.root = root
    tree.take_up_parameters()
