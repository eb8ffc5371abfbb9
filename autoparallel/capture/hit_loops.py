"""Loops over the places where a condition holds: `for i in condition.nonzero(): ...`.

How often such a loop runs depends on values, which a trace does not have. Mixtures of experts are
written so: one turn for each expert that a token has chosen. An expert that none has chosen would
add nothing in a turn of its own. So the trace takes a turn for every place, and leaves marks where
turns begin and end, from which `hit_turns.py` proves that a turn more adds nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from autoparallel.capture.branch_ways import ValueBranchError
from autoparallel.capture.loop_variables import LoopVariables, loop_at
from autoparallel.support.torch_private import without_function_modes, without_modes

__all__ = ["TURN", "HitLoops"]

# The mark in a trace, which returns nothing, so that no tracer drops it. place: whose turn begins;
# -1 at the end of the loop.
TURN = "autoparallel.turn.default"
_library = torch.library.Library("autoparallel", "FRAGMENT")
_library.define("turn(Tensor condition, int place, int loop) -> ()")


@torch.library.impl(_library, "turn", "CompositeExplicitAutograd")
def _turn(condition: torch.Tensor, place: int, loop: int) -> None:
    """Mark the beginning of a turn."""


# More turns would make a graph that nobody wants; and a condition on tokens has no fixed size.
_MOST_TURNS = 1024
_UNBIND = {torch.Tensor.unbind, torch.unbind}
_NONZERO = {torch.Tensor.nonzero, torch.nonzero}
_RESHAPE = {torch.Tensor.squeeze, torch.squeeze, torch.Tensor.flatten, torch.flatten}


class HitLoops(TorchFunctionMode):
    """A mode of a trace that takes all turns of a loop over the places where a condition holds.

    conditions: of the tensors of places that `nonzero` has returned. places: the numbers of the
    places in whose turns the forward is or was, as tensors that it is given. rows: of a value with
    one row for each place, the row that it has looked up, by that row with a dim of 1 before it.
    turn: the loop and the place of the turn that runs now. numbers: of loops.

    Example: `with HitLoops(): model(x)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conditions = WeakTensorKeyDictionary()
        self.places = WeakTensorKeyDictionary()
        self.rows = WeakTensorKeyDictionary()
        self.turn: tuple[int, int] | None = None
        self.numbers = itertools.count()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (function in _NONZERO or function is torch.where) and len(args) == 1:
            result = function(*args, **kwargs)
            if _is_condition(args[0]):
                self.conditions[result[0] if isinstance(result, tuple) else result] = args[0]
            return result
        first = args[0] if args else None
        if not isinstance(first, torch.Tensor) or not (self.conditions or self.places):
            return function(*args, **kwargs)
        if first in self.conditions:
            if function in _UNBIND and args[1:] in ((), (0,)) and not kwargs:
                variables = _loop()
                if variables is not None:
                    return _Turns(self, self.conditions[first], first.dim(), variables)
            result = function(*args, **kwargs)
            # The places as a vector, which they were as a column.
            if function in _RESHAPE and isinstance(result, torch.Tensor) and result.dim() == 1:
                self.conditions[result] = self.conditions[first]
            return result
        if self.places:
            return self.in_turn(function, args, kwargs)
        return function(*args, **kwargs)

    def in_turn(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function that is perhaps given the number of a place."""
        given = [
            item
            for each in (*args, *kwargs.values())
            for item in (each if isinstance(each, (list, tuple)) else (each,))
        ]
        tensors = [item for item in given if isinstance(item, torch.Tensor)]
        numbers = [tensor for tensor in tensors if tensor in self.places]
        for tensor in numbers:
            if self.places[tensor] != self.turn:
                raise _left(self.places[tensor][1])
        if numbers and len(numbers) == len(tensors):
            with without_modes(), without_function_modes():
                result = function(*args, **kwargs)
            if isinstance(result, torch.Tensor):
                self.places[result] = self.turn
            return result
        # A condition on the place is no place, and takes rows or leaves them.
        looked_up = function is torch.Tensor.__getitem__ and numbers and args[1] is numbers[0]
        if looked_up and args[1].dim() <= 1 and args[1].dtype != torch.bool:
            with without_modes(), without_function_modes():
                place = int(args[1])
            row = args[0].select(0, place)
            if args[1].dim() == 0:
                return row
            above = row.unsqueeze(0)
            self.rows[above] = row
            return above
        if function in (torch.Tensor.squeeze, torch.squeeze) and args[0] in self.rows:
            row = self.rows[args[0]]
            if (*args[1:], *kwargs.values()) in ((0,), ()) and (args[1:] or 1 not in row.shape):
                return row
        return function(*args, **kwargs)

    def begin(self, condition: torch.Tensor, place: int, loop: int) -> None:
        """Leave a mark where a turn begins."""
        self.turn = None if place < 0 else (loop, place)
        torch.ops.autoparallel.turn(condition, place, loop)


class _Turns:
    """The turns of one loop, as a list of the places that it would be given.

    variables: of the function that has the loop.
    """

    def __init__(
        self, loops: HitLoops, condition: torch.Tensor, dims: int, variables: LoopVariables
    ) -> None:
        self.loops, self.condition, self.dims = loops, condition, dims
        self.variables = variables

    def __iter__(self) -> Iterator[torch.Tensor]:
        loop = next(self.loops.numbers)
        for place in range(int(self.condition.shape[0])):
            self.loops.begin(self.condition, place, loop)
            with without_modes(), without_function_modes():
                number = torch.tensor([place] if self.dims == 2 else place)
            self.loops.places[number] = (loop, place)
            yield number
            name = self.variables.changed()
            if name:
                raise _counted(name)
        self.loops.begin(self.condition, -1, loop)


def _is_condition(tensor: Any) -> bool:
    """Return whether a tensor is a vector of a known, small size."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 1:
        return False
    size = tensor.shape[0]
    return isinstance(size, int) and 0 < size <= _MOST_TURNS


def _loop() -> LoopVariables | None:
    """Return the variables of a `for` over a tensor alone that is now being taken apart, if any.

    A loop over `enumerate` or `zip` of it would count the turns that are taken.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not torch.Tensor.__iter__.__code__:
        frame = frame.f_back
    frame = None if frame is None else frame.f_back
    head = None if frame is None else loop_at(frame)
    return None if frame is None or head is None else LoopVariables(frame, head)


def _counted(name: str) -> ValueBranchError:
    """Return the error for a variable in which a turn leaves something."""
    return ValueBranchError(
        "the forward loops over the places where a condition holds",
        why=f"each turn changes the variable {name}, which is read in the next turn or after the "
        "loop, and a trace has all turns, also those that a call does not take",
        fix="count, or collect, by ops on tensors: condition.sum()",
    )


def _left(place: int) -> ValueBranchError:
    """Return the error for a place that is used when its turn is over."""
    return ValueBranchError(
        "the forward keeps a place of a loop over the places where a condition holds",
        why=f"place {place} is used outside of its turn, and a trace has all turns, also those "
        "that a call does not take",
        fix="use it in its turn alone, or loop over all places",
    )
