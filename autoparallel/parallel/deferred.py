"""A module that becomes parallel when it is first called: only then are its inputs known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.parameters import as_distributed
from autoparallel.parallel.seeds import give_generator
from autoparallel.placement import whole_layout
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.module_copy import shallow_copy
from autoparallel.support.torch_private import share_local_part

__all__ = ["Make", "deferred", "is_deferred"]

# A function that plans a model for the arguments of its first call, and applies the plan.
Make = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], nn.Module]

# The attribute in which a deferred module keeps its `_Waiting`.
_WAITING = "_waiting"


@dataclass(frozen=True, slots=True)
class _Waiting:
    """The function that makes a deferred module parallel; see `deferred`."""

    make: Make


class _Deferred:
    """Mixed into the user's class until the first call shows what the inputs are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Become the parallel module of the class and attributes that it has, and run that."""
        waiting: _Waiting = self.__dict__[_WAITING]
        # What is made in inference mode could not be trained with later.
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
            source = _with_weights_of(self)  # type: ignore[arg-type]
            parallel = waiting.make(source, args, kwargs)
            _keep_identity(self, parallel)  # type: ignore[arg-type]
        # A seed that was set before the first call stays set.
        parallel.__dict__["_generator"] = self.__dict__["_generator"]
        self.__class__ = parallel.__class__  # type: ignore[assignment]
        self.__dict__ = parallel.__dict__
        # Not by a call: the hooks around this one run already.
        return self.forward(*args, **kwargs)


def deferred(
    model: nn.Module, rng: str, ranks: Ranks, devices: DeviceMesh | None, make: Make
) -> nn.Module:
    """Return a copy of the model that is made parallel when it is first called.

    rng: the mode of its random numbers. ranks, devices: the mesh on which its parameters lie until
    then, unsharded on every rank; devices is None for a single process. make: a function that is
    called once, with the plain model, holding the weights of then, and the arguments of the first
    call; it returns the parallel module.
    The copy's parameters are objects of its own from the start and stay the same objects, so that
    an optimizer may take them before the first call.
    """
    # The class is the user's, so that isinstance holds, under the name that it will keep.
    waiting = shallow_copy(model)
    kind = type(model)
    waiting.__class__ = type(f"Parallel{kind.__name__}", (_Deferred, kind), {})
    waiting.__dict__[_WAITING] = _Waiting(make)
    give_generator(waiting, rng, ranks, devices)
    twins: dict[int, nn.Parameter] = {}
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
                    module._parameters[name] = twins.setdefault(id(parameter), twin)
    return waiting


def is_deferred(module: nn.Module) -> bool:
    """Return whether the module still waits for its first call, so that it has no plan."""
    return _WAITING in module.__dict__


def _with_weights_of(waiting: nn.Module) -> nn.Module:
    """Return the plain model as the waiting module is now.

    Weights may have been loaded, train() or eval() called, and attributes, modules and parameters
    exchanged, since the module was made.
    """
    plain = shallow_copy(waiting)
    plain.__class__ = type(waiting).__bases__[1]
    for name in (_WAITING, "_generator"):
        del plain.__dict__[name]
    twins: dict[int, nn.Parameter] = {}
    for module in plain.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                twin = nn.Parameter(local.detach(), parameter.requires_grad)
                module._parameters[name] = twins.setdefault(id(parameter), twin)
    return plain


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
            lasting = before[f"{path}.{name}" if path else name]
            if id(lasting) not in filled:
                filled.add(id(lasting))
                # The object stays, with what optimizers and hooks know of it; its part changes.
                if isinstance(lasting, DTensor):
                    share_local_part(lasting, parameter)
                else:
                    lasting.data = parameter.data
            module._parameters[name] = lasting
    state_of(parallel).tree.take_up_parameters()
