"""Steps of optimizers that compute each element by itself, on the parts that this rank holds.

An optimizer works on DTensors too, at several times the cost for many parameters: each of its ops
asks DTensor where the result lies, which is where the operands lie. Here the parts stand in the
optimizer's groups and in its state while it steps. They are kept from step to step, so that one
step more has little to do.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autoparallel.parallel.split_tensor import GRADIENT, cut_like, mark
from autoparallel.support.torch_private import (
    distributed_tensor_like,
    local_part,
    local_parts,
    placed_alike,
    without_function_overrides,
)

__all__ = ["StepsOnParts"]


def _alike(some: Iterable[Any], others: Iterable[Any]) -> bool:
    """Return whether two sequences of one length hold the same objects. It runs in C."""
    return all(map(operator.is_, some, others))


_TRAINED = operator.attrgetter("requires_grad")
_ADDRESS = torch.Tensor.data_ptr


class _Part:
    """This rank's part of a parameter, and of what the optimizer remembers for each element.

    parameter: the user's. local: its part. stand_in: a parameter in the same memory. own, shared:
    what the optimizer remembers, in parts and as everybody else sees it; own_values, shared_values:
    the values in these when the last step ended.
    """

    def __init__(self, parameter: DTensor) -> None:
        self.parameter, self.local = parameter, local_part(parameter)
        self.stand_in = nn.Parameter(self.local.detach(), parameter.requires_grad)
        self.own: dict[str, Any] | None = None
        self.shared: dict[str, Any] | None = None
        self.own_values: tuple[Any, ...] = ()
        self.shared_values: tuple[Any, ...] = ()

    def take_gradient(self) -> None:
        """Give the stand-in this rank's part of the gradient."""
        parameter = self.parameter
        gradient: Any = GRADIENT.__get__(parameter)
        if isinstance(gradient, DTensor):
            if not placed_alike(gradient, parameter):
                gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
            gradient = local_part(gradient)
        self.stand_in.grad = gradient

    def enter(self, shared: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return what the optimizer remembers in parts. shared: the same as everybody sees it."""
        parameter = self.parameter
        if shared is None:
            self.own = self.shared = None
            return None
        same = shared is self.shared and len(shared) == len(self.shared_values)
        if not same or not _alike(shared.values(), self.shared_values):
            for key, value in shared.items():
                # It may have been loaded from an optimizer of the unsplit model.
                if isinstance(value, torch.Tensor) and value.ndim:
                    shared[key] = cut_like(value, parameter)
            self.shared, self.shared_values = shared, tuple(shared.values())
            self.own = {
                key: local_part(value) if isinstance(value, DTensor) else value
                for key, value in shared.items()
            }
            self.own_values = tuple(self.own.values())
        return self.own

    def leave(self, own: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return what the optimizer remembers now, as everybody sees it. own: the same in parts."""
        if own is None:
            return None
        same = own is self.own and len(own) == len(self.own_values)
        if not same or not _alike(own.values(), self.own_values):
            known = {id(a): b for a, b in zip(self.own_values, self.shared_values, strict=True)}
            shared = {} if self.shared is None else self.shared
            shared.clear()
            for key, value in own.items():
                shared[key] = known.get(id(value), self.as_shared(value))
            self.own, self.shared = own, shared
            self.own_values, self.shared_values = tuple(own.values()), tuple(shared.values())
        return self.shared

    def as_shared(self, value: Any) -> Any:
        """Return what is remembered for each element as a DTensor like the parameter."""
        each = isinstance(value, torch.Tensor) and value.ndim and value.shape == self.local.shape
        return mark(distributed_tensor_like(value, self.parameter)) if each else value


class _Remembered:
    """An optimizer's state as it was: all objects in it, so that any change is noticed."""

    def __init__(self, state: Any) -> None:
        self.keys, self.entries = list(state), list(state.values())
        self.values = list(chain.from_iterable(map(dict.values, self.entries)))

    def holds(self, state: Any) -> bool:
        """Return whether the state has these objects. It runs in C."""
        return (
            len(state) == len(self.keys)
            and _alike(state, self.keys)
            and _alike(state.values(), self.entries)
            and sum(map(len, self.entries)) == len(self.values)
            and _alike(chain.from_iterable(map(dict.values, self.entries)), self.values)
        )


class StepsOnParts:
    """The parameters of an optimizer and the parts that step in their place.

    optimizer: one that computes each element by itself. ours: which of its parameters are split.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ours: Callable[[Any], bool]) -> None:
        self.params = [group["params"] for group in optimizer.param_groups]
        self.seen = [tuple(params) for params in self.params]
        self.parts: list[_Part] = []
        # The optimizer's state in parts and as everybody sees it, as the last step left them; and
        # the latter while the former is in its place.
        self.own_state: Any = None
        self.own: _Remembered | None = None
        self.shared: _Remembered | None = None
        self.aside: Any = None
        self.stand_ins: list[list[Any]] = []
        with torch.no_grad(), without_function_overrides():
            for params in self.params:
                parts = [_Part(item) if ours(item) else None for item in params]
                self.parts += filter(None, parts)
                self.stand_ins.append(
                    [
                        item if part is None else part.stand_in
                        for item, part in zip(params, parts, strict=True)
                    ]
                )

        self.ours = [part.parameter for part in self.parts]
        self.held = [part.local for part in self.parts]
        self.whose = [part.stand_in for part in self.parts]

    def fits(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer has these parameters, in the memory that they had."""
        params = [group["params"] for group in optimizer.param_groups]
        return (
            len(params) == len(self.params)
            and _alike(params, self.params)
            and all(
                len(now) == len(seen) and _alike(now, seen)
                for now, seen in zip(params, self.seen, strict=True)
            )
            and _alike(local_parts(self.ours), self.held)
            and _alike(map(_TRAINED, self.ours), map(_TRAINED, self.whose))
            and all(map(operator.eq, map(_ADDRESS, self.held), map(_ADDRESS, self.whose)))
        )

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the parts in the parameters' place."""
        for part in self.parts:
            part.take_gradient()
        state = optimizer.state
        if self.shared is not None and self.shared.holds(state):
            # Nothing but steps has touched it: its parts are those of the last step.
            self.aside, optimizer.state = state, self.own_state
        else:
            for part in self.parts:
                own = part.enter(state.pop(part.parameter, None))
                if own is not None:
                    state[part.stand_in] = own
        for group, stand_ins in zip(optimizer.param_groups, self.stand_ins, strict=True):
            group["params"] = stand_ins

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer its parameters back, with what it remembers of them."""
        for group, params in zip(optimizer.param_groups, self.params, strict=False):
            group["params"] = params
        for part in self.parts:
            part.stand_in.grad = None
        aside, self.aside = self.aside, None
        if aside is not None and self.own is not None and self.own.holds(optimizer.state):
            optimizer.state = aside
            return
        # Parts that are not the user's may remember something new as well.
        owns = optimizer.state
        if aside is not None:
            aside.clear()
            aside.update(owns)
            optimizer.state = aside
        state = optimizer.state
        own_state: Any = defaultdict(dict, state)
        for part in self.parts:
            shared = part.leave(state.pop(part.stand_in, None))
            if shared is not None:
                state[part.parameter] = shared
        self.own_state = own_state
        for part in self.parts:
            if part.own is not None:
                own_state[part.stand_in] = part.own
        plain = all(type(entry) is dict for entry in state.values())
        self.shared, self.own = (
            (_Remembered(state), _Remembered(own_state)) if plain else (None,) * 2
        )
