"""Steps of optimizers that compute each element by itself, on the parts that this rank holds.

An optimizer works on DTensors too, at several times the cost for many parameters: each of its ops
asks DTensor where the result lies, which is where the operands lie. Here the parts stand in the
optimizer's groups and in its state while it steps. They are kept from step to step, so that one
step more has little to do.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from autoparallel.parallel.stepping_parts import (
    Part,
    PartsTogether,
    Unit,
    are_alike,
    may_be_together,
)
from autoparallel.support.torch_private import local_parts, without_function_overrides

__all__ = ["StepsOnParts"]

_TRAINED = operator.attrgetter("requires_grad")
_ADDRESS = torch.Tensor.data_ptr
# So often others are laid end to end where other parameters have gradients than before.
_MOST_OTHERS = 8


class _Remembered:
    """An optimizer's state as it was: all objects in it, so that any change is noticed."""

    def __init__(self, state: Any) -> None:
        self.keys, self.entries = list(state), list(state.values())
        self.values = list(chain.from_iterable(map(dict.values, self.entries)))

    def holds(self, state: Any) -> bool:
        """Return whether the state has these objects. It runs in C."""
        return (
            len(state) == len(self.keys)
            and are_alike(state, self.keys)
            and are_alike(state.values(), self.entries)
            and sum(map(len, self.entries)) == len(self.values)
            and are_alike(chain.from_iterable(map(dict.values, self.entries)), self.values)
        )


class StepsOnParts:
    """The parameters of an optimizer and the parts that step in their place.

    optimizer: one that computes each element by itself. ours: which of its parameters are split.
    before: the same of an earlier step, which fits no more. units: the parts, of which small ones
    step together.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        ours: Callable[[Any], bool],
        before: StepsOnParts | None = None,
    ) -> None:
        self.params = [group["params"] for group in optimizer.param_groups]
        self.seen = [tuple(params) for params in self.params]
        self.others: int = 0 if before is None else before.others + 1
        self.units: list[Unit] = []
        self.joint: list[PartsTogether] = []
        # The optimizer's state in parts and as everybody sees it, as the last step left them; and
        # the latter while the former is in its place.
        self.own_state: Any = None
        self.own: _Remembered | None = None
        self.shared: _Remembered | None = None
        self.aside: Any = None
        self.is_known = False
        self.stand_ins: list[list[Any]] = []
        parts: list[Part] = []
        with torch.no_grad(), without_function_overrides():
            for group, params in zip(optimizer.param_groups, self.params, strict=True):
                own = [Part(item) for item in params if ours(item)]
                groups: list[list[Part]] = []
                # A fused step is one call for many parts as it is.
                if not group.get("fused") and self.others <= _MOST_OTHERS:
                    groups = may_be_together(own, optimizer.state)
                together = [PartsTogether(members) for members in groups]
                joined = {id(part) for members in groups for part in members}
                units: list[Unit] = [part for part in own if id(part) not in joined]
                units += together
                others = [item for item in params if not ours(item)]
                self.stand_ins.append([*others, *(unit.stand_in for unit in units)])
                self.units += units
                self.joint += together
                parts += own

        self.ours = [part.parameter for part in parts]
        self.held = [part.local for part in parts]
        # The stand-ins are nobody else's, and stay as they are.
        stand_ins = [part.stand_in for part in parts]
        self.trained = list(map(_TRAINED, stand_ins))
        self.addresses = list(map(_ADDRESS, stand_ins))

    def fits(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer has these parameters, in the memory that they had, and
        those that step together are alike.
        """
        params = [group["params"] for group in optimizer.param_groups]
        as_they_were = (
            len(params) == len(self.params)
            and are_alike(params, self.params)
            and all(
                len(now) == len(seen) and are_alike(now, seen)
                for now, seen in zip(params, self.seen, strict=True)
            )
            and are_alike(local_parts(self.ours), self.held)
            and list(map(_TRAINED, self.ours)) == self.trained
            and list(map(_ADDRESS, self.held)) == self.addresses
        )
        # Where nothing but steps has touched the state, its parts are those of the last step.
        self.is_known = (
            self.shared is not None
            and self.shared.holds(optimizer.state)
            and all(unit.is_as_left for unit in self.joint)
        )
        return as_they_were and all(
            unit.fits(optimizer.state, self.is_known) for unit in self.joint
        )

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the parts in the parameters' place."""
        for unit in self.units:
            unit.begin()
        state = optimizer.state
        if self.is_known:
            self.aside, optimizer.state = state, self.own_state
        else:
            for unit in self.units:
                own = unit.enter([state.pop(part.parameter, None) for part in unit.members])
                if own is not None:
                    state[unit.stand_in] = own
        for group, stand_ins in zip(optimizer.param_groups, self.stand_ins, strict=True):
            group["params"] = stand_ins

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer its parameters back, with what it remembers of them."""
        for group, params in zip(optimizer.param_groups, self.params, strict=False):
            group["params"] = params
        for unit in self.units:
            unit.end()
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
        for unit in self.units:
            entries = unit.leave(state.pop(unit.stand_in, None))
            for part, shared in zip(unit.members, entries, strict=True):
                if shared is not None:
                    state[part.parameter] = shared
        self.own_state = own_state
        for unit in self.units:
            if unit.own is not None:
                own_state[unit.stand_in] = unit.own
        plain = all(type(entry) is dict for entry in state.values())
        self.shared, self.own = (
            (_Remembered(state), _Remembered(own_state)) if plain else (None,) * 2
        )
