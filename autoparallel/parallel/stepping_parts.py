"""The parts of parameters on which an optimizer steps: one by one, and small ones as one vector.

Most ops of an optimizer take longer to be called than to compute where a part is small. One that
computes each element by itself has the same numbers of many parts that are laid end to end.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autoparallel.parallel.split_tensor import GRADIENT, cut_like, mark
from autoparallel.support.torch_private import (
    copy_all_,
    distributed_tensor_like,
    laid_end_to_end,
    local_part,
    placed_alike,
)

__all__ = ["Part", "PartsTogether", "Unit", "are_alike", "may_be_together"]

# Parts of at most so many bytes are laid end to end, and at most so many bytes of them: a copy of
# them, and one of their gradients, is made at each step.
_SMALL_NBYTES, _TOGETHER_NBYTES = 2**16, 2**20

# What an optimizer remembers of one parameter.
_State = dict[str, Any]


def are_alike(some: Iterable[Any], others: Iterable[Any]) -> bool:
    """Return whether two sequences of one length hold the same objects. It runs in C."""
    return all(map(operator.is_, some, others))


class Part:
    """This rank's part of a parameter, and of what the optimizer remembers for each element.

    parameter: the user's. local: its part. stand_in: a parameter in the same memory. own, shared:
    what the optimizer remembers, in parts and as everybody else sees it; own_values, shared_values:
    the values in these when the last step ended.
    """

    def __init__(self, parameter: DTensor) -> None:
        self.parameter, self.local = parameter, local_part(parameter)
        self.stand_in = nn.Parameter(self.local.detach(), parameter.requires_grad)
        self.own: _State | None = None
        self.shared: _State | None = None
        self.own_values: tuple[Any, ...] = ()
        self.shared_values: tuple[Any, ...] = ()

    @property
    def members(self) -> tuple[Part, ...]:
        """The parts that step as this one does: it alone."""
        return (self,)

    def gradient(self) -> torch.Tensor | None:
        """Return this rank's part of the gradient."""
        parameter = self.parameter
        gradient: Any = GRADIENT.__get__(parameter)
        if isinstance(gradient, DTensor):
            if not placed_alike(gradient, parameter):
                gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
            gradient = local_part(gradient)
        return gradient

    def begin(self) -> None:
        """Give the stand-in this rank's part of the gradient."""
        self.stand_in.grad = self.gradient()

    def end(self) -> None:
        """Take the gradient off the stand-in."""
        self.stand_in.grad = None

    def enter(self, entries: Sequence[_State | None]) -> _State | None:
        """Return what the optimizer remembers in parts. entries: as everybody sees it, of the one
        parameter.
        """
        (shared,) = entries
        if shared is None:
            self.own = self.shared = None
            return None
        same = shared is self.shared and len(shared) == len(self.shared_values)
        if not same or not are_alike(shared.values(), self.shared_values):
            for key, value in shared.items():
                # It may have been loaded from an optimizer of the unsplit model.
                if isinstance(value, torch.Tensor) and value.ndim:
                    shared[key] = cut_like(value, self.parameter)
            self.shared, self.shared_values = shared, tuple(shared.values())
            self.own = {
                key: local_part(value) if isinstance(value, DTensor) else value
                for key, value in shared.items()
            }
            self.own_values = tuple(self.own.values())
        return self.own

    def leave(self, own: _State | None) -> list[_State | None]:
        """Return what the optimizer remembers now, as everybody sees it. own: the same in parts."""
        if own is None:
            return [None]
        same = own is self.own and len(own) == len(self.own_values)
        if not same or not are_alike(own.values(), self.own_values):
            known = {id(a): b for a, b in zip(self.own_values, self.shared_values, strict=True)}
            shared = {} if self.shared is None else self.shared
            shared.clear()
            for key, value in own.items():
                shared[key] = known.get(id(value), self.as_shared(value))
            self.own, self.shared = own, shared
            self.own_values, self.shared_values = tuple(own.values()), tuple(shared.values())
        return [self.shared]

    def as_shared(self, value: Any) -> Any:
        """Return what is remembered for each element as a DTensor like the parameter."""
        each = isinstance(value, torch.Tensor) and value.ndim and value.shape == self.local.shape
        return mark(distributed_tensor_like(value, self.parameter)) if each else value


class PartsTogether:
    """Small parts that step as one vector.

    members: of one type, with gradients, and remembered alike (`may_be_together`). stand_in: their
    elements, in memory of its own. own: what the optimizer remembers of the vector. What everybody
    else sees are pieces of it, and, of the numbers that are remembered once for each parameter,
    copies: counts, by their key, each with the vector of these.
    """

    def __init__(self, members: Sequence[Part]) -> None:
        self.members = tuple(members)
        self.locals = [part.local for part in members]
        self.sizes = [local.numel() for local in self.locals]
        self.stand_in = nn.Parameter(laid_end_to_end(self.locals))
        self.pieces = self.cut(self.stand_in.detach())
        self.own: _State | None = None
        # As it was when the last step ended.
        self.known: _State = {}
        self.shared: list[_State] = [{} for _ in members]
        self.counts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.gradients: list[Any] = []

    def cut(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Return the pieces of a vector in the shapes of the parts."""
        pieces = vector.split(self.sizes)
        return [piece.view(local.shape) for piece, local in zip(pieces, self.locals, strict=True)]

    def fits(self, state: Mapping[Any, Any], is_known: bool) -> bool:
        """Return whether all members have gradients, and are remembered alike.

        state: of the optimizer. is_known: whether it is as the last step left it.
        """
        self.gradients = [part.gradient() for part in self.members]
        dtype = self.stand_in.dtype
        if not all(_is_dense(gradient, dtype) for gradient in self.gradients):
            return False
        if is_known:
            return True
        kinds = {_kind(part, state.get(part.parameter)) for part in self.members}
        return len(kinds) == 1 and None not in kinds

    def begin(self) -> None:
        """Give the stand-in the elements of the parameters as they are now, and the gradients."""
        self.stand_in.copy_(laid_end_to_end(self.locals))
        gradients = self.gradients or [part.gradient() for part in self.members]
        self.stand_in.grad, self.gradients = laid_end_to_end(gradients), []

    def end(self) -> None:
        """Write what was computed to the parameters."""
        copy_all_(self.locals, self.pieces)
        self.stand_in.grad = None
        for count, several in self.counts.values():
            several.copy_(count)

    @property
    def is_as_left(self) -> bool:
        """Return whether the numbers remembered once for each parameter are still the same."""
        return all(
            torch.equal(several, count.expand_as(several))
            for count, several in self.counts.values()
        )

    def enter(self, entries: Sequence[_State | None]) -> _State | None:
        """Return what the optimizer remembers of the vector. entries: as everybody sees it.

        The tensors in it stay the same objects, which others may hold, in the vector's memory.
        """
        self.own, self.known, self.counts = None, {}, {}
        parts = [p.enter([entry]) for p, entry in zip(self.members, entries, strict=True)]
        if parts[0] is None:
            self.shared = [{} for _ in self.members]
            return None
        self.shared = [entry for entry in entries if entry is not None]
        own: _State = {}
        for key, value in parts[0].items():
            own[key] = value
            if isinstance(value, torch.Tensor):
                values: list[Any] = [part[key] for part in parts if part is not None]
                own[key] = laid_end_to_end(values) if value.ndim else value.clone()
                for each, piece in zip(values, self.pieces_of(key, own[key]), strict=True):
                    each.data = piece
        self.own, self.known = own, dict(own)
        return own

    def leave(self, own: _State | None) -> Sequence[_State | None]:
        """Return what the optimizer remembers now, as everybody sees it. own: of the vector."""
        if own is None:
            return [None] * len(self.members)
        for key in [key for key in self.known if key not in own]:
            self.counts.pop(key, None)
            for entry in self.shared:
                del entry[key]
        for key, value in own.items():
            if key in self.known and self.known[key] is value:
                continue
            self.counts.pop(key, None)
            pieces = [value] * len(self.members)
            if isinstance(value, torch.Tensor):
                pairs = zip(self.members, self.pieces_of(key, value), strict=True)
                pieces = [part.as_shared(piece) for part, piece in pairs]
            for entry, piece in zip(self.shared, pieces, strict=True):
                entry[key] = piece
        self.own, self.known = own, dict(own)
        return self.shared

    def pieces_of(self, key: str, value: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each parameter's piece of a vector that is remembered, or copy of a number."""
        if value.ndim:
            return self.cut(value)
        several = value.repeat(len(self.members))
        self.counts[key] = (value, several)
        return several.unbind()


class Unit(Protocol):
    """A part, or several that step together."""

    stand_in: nn.Parameter
    own: _State | None

    @property
    def members(self) -> tuple[Part, ...]:
        """The parts."""

    def begin(self) -> None:
        """Make the stand-in ready for a step."""

    def end(self) -> None:
        """Take what a step has computed."""

    def enter(self, entries: Sequence[_State | None]) -> _State | None:
        """Return what the optimizer remembers of the stand-in, of what it does of the members."""

    def leave(self, own: _State | None) -> Sequence[_State | None]:
        """Return what the optimizer remembers of the members, of what it does of the stand-in."""


def may_be_together(parts: Sequence[Part], state: Mapping[Any, Any]) -> list[list[Part]]:
    """Return those of some parts that may step as one vector, in groups of two or more.

    state: of the optimizer. They are small, lie on the CPU, where optimizers compute part by part,
    have gradients, and what is remembered of them is alike.
    """
    groups: dict[Any, list[list[Part]]] = {}
    nbytes: dict[Any, int] = {}
    for part in parts:
        kind = _kind(part, state.get(part.parameter))
        if kind is None:
            continue
        several = groups.setdefault(kind, [[]])
        nbytes[kind] = nbytes.get(kind, 0) + part.local.nbytes
        if nbytes[kind] > _TOGETHER_NBYTES:
            several.append([])
            nbytes[kind] = part.local.nbytes
        several[-1].append(part)
    return [group for several in groups.values() for group in several if len(group) > 1]


def _is_dense(gradient: torch.Tensor | None, dtype: torch.dtype) -> bool:
    """Return whether there is a gradient, of a type, that has all elements."""
    return gradient is not None and gradient.dtype == dtype and gradient.layout is torch.strided


def _is_memory_of(value: torch.Tensor, local: torch.Tensor) -> bool:
    """Return whether what is remembered is a parameter itself, or lies where it does."""
    value = local_part(value) if isinstance(value, DTensor) else value
    return value.data_ptr() == local.data_ptr()


def _kind(part: Part, entry: Mapping[str, Any] | None) -> Any:
    """Return what must be equal of parts that step together; None of one that steps by itself.

    entry: what the optimizer remembers of the parameter, as everybody sees it.
    """
    local, gradient = part.local, GRADIENT.__get__(part.parameter)
    gradient = local_part(gradient) if isinstance(gradient, DTensor) else gradient
    if (
        local.device.type != "cpu"
        or not 0 < local.nbytes <= _SMALL_NBYTES
        or not local.ndim
        or not part.stand_in.requires_grad
        or not _is_dense(gradient, local.dtype)
    ):
        return None
    facts: list[Any] = []
    for key, value in (entry or {}).items():
        if not isinstance(value, torch.Tensor):
            # Of lists and other objects that are changed, each parameter has its own.
            if not isinstance(value, (int, float, complex, str, type(None))):
                return None
            facts.append((key, type(value), repr(value)))
        elif not value.ndim:
            facts.append((key, value.dtype, value.device, value.item()))
        elif _is_memory_of(value, local):
            return None
        elif value.shape in (part.parameter.shape, local.shape):
            facts.append((key, value.dtype, "each"))
        else:
            return None
    return (local.dtype, entry is None, *facts)
