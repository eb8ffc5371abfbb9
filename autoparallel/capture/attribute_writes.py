"""A forward leaves values in attributes: the places that it writes to, and the values there."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from autoparallel.capture.equal_blocks import token_of
from autoparallel.capture.module_tensors import MODULE_ATTRIBUTES
from autoparallel.graph.attribute_read import (
    ABSENT,
    CONSTANTS,
    LEFT,
    SIMPLE,
    AttributeRead,
    Where,
)
from autoparallel.graph.attribute_write import AttributeWrite, Step
from autoparallel.support.module_paths import join_path
from autoparallel.support.object_state import own_attributes
from autoparallel.support.pytree import SYMBOLIC

__all__ = ["Attributes", "Written"]

_BOXES = (list, dict, collections.deque)  # what a forward fills, and others may hold as well
_DEPTH = 3  # levels of plain objects that are opened, as by `side_effects.effects`
_Key = tuple[int, Any]  # a container, and which place in it; None for all that it holds


def _is_object(value: Any) -> bool:
    """Return whether the value is an object of a user's with attributes of its own."""
    holds = hasattr(value, "__dict__") or getattr(type(value), "__slots__", None)
    others = (type, nn.Module, torch.Tensor, *CONSTANTS, *SYMBOLIC)
    return bool(holds) and not isinstance(value, others)


@dataclass
class _Held:
    """A value as it was: the object, a token of it, and the values in a container that it is."""

    value: Any
    token: Any
    inside: dict[Any, _Held] | None = None


@dataclass(frozen=True)
class Written:
    """A Written says where a forward has written to attributes of a model, and what.

    places: all that it sets. values: what it has set there, in the same order. reached: the
    containers that were written to, with the place in each. unknown: the attributes that it changes
    in a way that nothing could repeat, such as by an object that it makes.
    """

    places: tuple[AttributeWrite, ...] = ()
    values: tuple[Any, ...] = ()
    reached: frozenset[_Key] = frozenset()
    unknown: tuple[str, ...] = ()

    def lasting(
        self, reads: Sequence[AttributeRead], model: nn.Module
    ) -> Iterator[tuple[AttributeRead, tuple[Any, ...]]]:
        """Yield the reads on whose value a call depends, each with further values that do as well.

        Those are what the forward sets there itself. An attribute of a module that it sets to other
        things than numbers and texts is right as it was, and as a program leaves it; what it sets
        deeper in objects and containers is no matter to a call. model: as it was before.
        """
        simple = {
            (place.path, place.route): value
            for place, value in zip(self.places, self.values, strict=True)
            if isinstance(value, CONSTANTS)
        }
        places = {(place.path, place.route) for place in self.places if len(place.route) == 1}
        for read in reads:
            route = (*read.route, ("attribute", read.name))
            if (read.path, route) in simple:
                yield read, (simple[read.path, route],)
            elif (read.path, route) in places and read.where in (Where.INSTANCE, Where.CLASS):
                absent = read.where is Where.CLASS
                at = replace(read, where=Where.INSTANCE, value=ABSENT) if absent else read
                yield at, (LEFT,)
            elif not self._sets(read.path, route, model):
                yield read, ()

    def is_unread(self, reads: Sequence[AttributeRead]) -> bool:
        """Return whether a forward reads nothing that it has not set itself before, so that a call
        that comes after another one does the same.

        reads: all that it has read of attributes; of those that it has set to numbers and texts,
        none is among them. Of other things that it sets, nothing is known.
        """
        seen = {(read.path, *read.route, ("attribute", read.name)) for read in reads}
        named = {read.path for read in reads if read.where is Where.NAMES}
        return not self.unknown and all(
            isinstance(value, (*SIMPLE, *SYMBOLIC))
            and len(place.route) == 1
            and place.path not in named
            and (place.path, *place.route) not in seen
            for place, value in zip(self.places, self.values, strict=True)
        )

    def _sets(self, path: str, route: Sequence[Step], model: nn.Module) -> bool:
        """Return whether the forward sets something on the way to a place, or the place itself."""
        if not self.reached:
            return False
        try:
            owner: Any = model.get_submodule(path)
        except AttributeError:  # the read is of a global variable
            return False
        for kind, key in route:
            if {(_identity(owner), (kind, key)), (_identity(owner), None)} & self.reached:
                return True
            try:
                owner = own_attributes(owner)[key] if kind == "attribute" else owner[key]
            except (KeyError, IndexError, TypeError, AttributeError):
                return False  # such as a class attribute: below it nothing was looked at
        return False


def _identity(owner: Any) -> int:
    """Return what a container is known by. A tracer shows modules in the guise of others."""
    return id(vars(owner)) if isinstance(owner, nn.Module) else id(owner)


@dataclass
class Attributes:
    """The attributes of a model's modules, as they are when this is made.

    model: whose parameters, buffers and submodules are no attributes.

    >>> model = nn.Linear(2, 2)
    >>> before = Attributes(model)
    >>> model.calls = 1
    >>> written = before.written()
    >>> [str(place) for place in written.places], written.values
    (['calls'], (1,))
    """

    model: nn.Module
    modules: dict[str, dict[Any, _Held]] = field(default_factory=dict)
    seen: dict[int, _Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = {
            path: {
                ("attribute", name): self._hold(value, _DEPTH)
                for name, value in _attributes(module).items()
            }
            for path, module in self.model.named_modules()
        }

    def _hold(self, value: Any, depth: int) -> _Held:
        """Return a value as it is now, with all values inside of it."""
        if id(value) in self.seen:
            return self.seen[id(value)]
        held = _Held(value, token_of(value, {}, depth=depth))
        inside = _inside(value, depth)
        if inside is not None:
            self.seen[id(value)] = held  # before what is inside: it may hold itself
            deeper = depth - _is_object(value)
            held.inside = {step: self._hold(item, deeper) for step, item in inside.items()}
        return held

    def written(self) -> Written:
        """Return what has been written to the model's attributes since this was made."""
        walk = _Writes(self)
        unknown: list[str] = []
        for path, module in self.model.named_modules():
            before = self.modules.get(path, {})
            now = {("attribute", name): value for name, value in _attributes(module).items()}
            for step in {**before, **now}:
                known = step in now and walk.compare(
                    path, (step,), before.get(step), now[step], _identity(module)
                )
                if not known:
                    unknown.append(join_path(path, step[1]))
        places, values = tuple(walk.writes), tuple(walk.writes.values())
        return Written(places, values, frozenset(walk.reached), tuple(unknown))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module by name."""
    return {name: item for name, item in vars(module).items() if name not in MODULE_ATTRIBUTES}


def _inside(value: Any, depth: int) -> Mapping[Step, Any] | None:
    """Return what a container holds by the steps that lead there, None for anything else."""
    if isinstance(value, dict):
        return {("item", key): item for key, item in value.items()}
    if isinstance(value, _BOXES):
        return {("item", index): item for index, item in enumerate(value)}
    if depth > 0 and _is_object(value):
        return {("attribute", name): item for name, item in own_attributes(value).items()}
    return None


class _Writes:
    """The differences between attributes as they were and as they are.

    writes: the values by their places. reached: the containers, with the place in each. done: by
    identity of a container whether all that was changed in it could be told.
    """

    def __init__(self, before: Attributes) -> None:
        self.before = before
        self.writes: dict[AttributeWrite, Any] = {}
        self.reached: set[_Key] = set()
        self.done: dict[int, bool] = {}

    def compare(
        self,
        path: str,
        route: tuple[Step, ...],
        before: _Held | None,
        now: Any,
        owner: int,
        depth: int = _DEPTH,
    ) -> bool:
        """Note what has changed at a place and below it; return whether that can be done again.

        before: None where nothing was there. now: the value. owner: identity of what holds it.
        depth: how many levels of plain objects are opened from here.
        """
        if before is not None and before.value is now and before.inside is not None:
            return self._compare_inside(path, route, before.inside, now, depth)
        if before is not None and before.token == token_of(now, {}, depth=depth):
            return True
        if not _is_plain(now):
            return False
        self.writes[AttributeWrite(path, route)] = now
        self.reached.add((owner, route[-1]))
        return True

    def _compare_inside(
        self,
        path: str,
        route: tuple[Step, ...],
        before: Mapping[Step, _Held],
        now: Any,
        depth: int,
    ) -> bool:
        """Do the same for what a container holds, which is the object that it was."""
        if id(now) in self.done:
            return self.done[id(now)]
        inside = _inside(now, depth) or {}
        self.done[id(now)] = True
        if isinstance(now, _BOXES) and self._filled_anew(before, inside, now):
            # As a whole: others may have emptied a list by the next call.
            whole = dict(now) if isinstance(now, dict) else list(now)
            known = _is_plain(whole)
            if known:
                self.writes[AttributeWrite(path, (*route, ("content", None)))] = whole
                self.reached.add((id(now), None))
        else:
            deeper = depth - _is_object(now)
            known = before.keys() <= inside.keys() and all(
                self.compare(path, (*route, step), before.get(step), item, id(now), deeper)
                for step, item in inside.items()
            )
        self.done[id(now)] = known
        return known

    def _filled_anew(
        self, before: Mapping[Step, _Held], inside: Mapping[Step, Any], now: Any
    ) -> bool:
        """Return whether a container is to be filled as a whole, and not place by place."""
        if isinstance(now, dict):
            return not before.keys() <= inside.keys()
        if before.keys() != inside.keys():
            return True
        moved = [before[step].token != token_of(item, {}) for step, item in inside.items()]
        return any(moved) and _is_plain(list(now))


def _is_plain(value: Any) -> bool:
    """Return whether a value can be made again at each call: tensors, numbers and texts, and lists,
    tuples and dicts of them.
    """
    if isinstance(value, (torch.Tensor, *CONSTANTS, *SYMBOLIC)):
        return True
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, (list, tuple, dict)) and all(map(_is_plain, items))
