"""Steps of optimizers that compute each element by itself, on the parts that this rank holds.

An optimizer works on DTensors too, at several times the cost for many parameters: each of its ops
asks DTensor where the result lies, which is where the operands lie. Here the parts stand in the
optimizer's groups and in its state while it steps. They are kept from step to step, so that one
step more has little to do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autoparallel.parallel.split_tensor import cut_like, mark
from autoparallel.support.torch_private import (
    distributed_tensor_like,
    local_part,
    without_function_overrides,
)

__all__ = ["StepsOnParts"]


def _alike(some: Iterable[Any], others: Iterable[Any]) -> bool:
    """Return whether two sequences of one length hold the same objects. It runs in C."""
    return all(map(operator.is_, some, others))


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

    def enter(self, shared: dict[str, Any] | None) -> dict[str, Any] | None:
        """Give the stand-in the gradient, and return what the optimizer remembers in parts."""
        parameter, stand_in = self.parameter, self.stand_in
        gradient: Any = parameter.grad
        if isinstance(gradient, DTensor):
            if gradient.placements != parameter.placements:
                gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
            gradient = local_part(gradient)
        stand_in.grad = gradient
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
        """Take the gradient from the stand-in, and return what the optimizer remembers now."""
        self.stand_in.grad = None
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


class StepsOnParts:
    """The parameters of an optimizer and the parts that step in their place.

    optimizer: one that computes each element by itself. ours: which of its parameters are split.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ours: Callable[[Any], bool]) -> None:
        self.params = [group["params"] for group in optimizer.param_groups]
        self.seen = [tuple(params) for params in self.params]
        self.parts: list[_Part] = []
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
            and all(
                local_part(part.parameter) is part.local
                and part.parameter.requires_grad is part.stand_in.requires_grad
                and part.local.data_ptr() == part.stand_in.data_ptr()
                for part in self.parts
            )
        )

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the parts in the parameters' place."""
        state = optimizer.state
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
        state = optimizer.state
        for part in self.parts:
            shared = part.leave(state.pop(part.stand_in, None))
            if shared is not None:
                state[part.parameter] = shared
