"""Shifts that are read out of a tensor as whole numbers: `x.roll(-int(delay), dims=1)`.

A trace has no values, and Python's `int()` must return a number. Where that number goes from the
call that reads it straight into a roll, as its code shows, nothing else can depend on it: a roll by
a tensor's value is a look-up of places that are computed of it.
"""

from __future__ import annotations

import dis
import itertools
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from autoparallel.capture.branch_ways import ValueBranchError
from autoparallel.capture.source_files import HANDS_ON

__all__ = ["ReadShifts"]

_READS = {torch.Tensor.__int__, torch.Tensor.item}
_ROLLS = {torch.roll, torch.Tensor.roll}
# Steps between a number on the stack and the call that it is handed to: all leave it as it is, but
# for its sign, and none keeps it or asks for it.
_BETWEEN = {
    *("CACHE", "EXTENDED_ARG", "NOP", "PUSH_NULL", "PRECALL", "KW_NAMES", "UNARY_NEGATIVE"),
    *("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_DEREF"),
    *("LOAD_GLOBAL", "BUILD_TUPLE", "BUILD_LIST"),
}
_CALLS = ("CALL", "CALL_KW")
_FIRST = 2**40  # of the numbers that stand for what is read
_NOT_ASKING = tuple(
    str(folder / "_")[:-1] for folder in (Path(torch.__file__).parent, Path(__file__).parent.parent)
)


class ReadShifts(TorchFunctionMode):
    """A mode of a trace in which a tensor is rolled by a number that is read out of another.

    waiting: the frame that has read a number, the offset of the call that gets it, the number that
    stands for it, and the tensor; None where no number is on its way.

    Example: `with ReadShifts(): model(x)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(_FIRST)
        self.waiting: tuple[FrameType, int, int, torch.Tensor] | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            return self.rolled(waiting, function, args, kwargs)
        if function in _READS and _is_whole(args[0]):
            frame = _asking()
            taker = None if frame is None else _taker(frame.f_code, frame.f_lasti)
            if frame is not None and taker is not None:
                number = next(self.numbers)
                self.waiting = frame, taker, number, args[0]
                return number
        return function(*args, **kwargs)

    def rolled(
        self,
        waiting: tuple[FrameType, int, int, torch.Tensor],
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Return a tensor rolled by the number that waits. Raises ValueBranchError where it is for
        something else.
        """
        frame, taker, number, tensor = waiting
        given = dict(zip(("input", "shifts", "dims"), args, strict=False)) | kwargs
        if function not in _ROLLS or _asking() is not frame or frame.f_lasti != taker:
            raise _used()
        shift, dim = (_single(given.get(name)) for name in ("shifts", "dims"))
        if shift not in (number, -number) or dim is None:
            raise _used()
        x: torch.Tensor = given["input"]
        places = torch.arange(x.shape[dim], device=x.device)
        moved = places - tensor if shift == number else places + tensor
        return x.index_select(dim, moved % x.shape[dim])

    def finish(self) -> None:
        """Raise ValueBranchError where a number is still on its way."""
        if self.waiting is not None:
            raise _used()


def _is_whole(tensor: Any) -> bool:
    """Return whether a tensor is one whole number."""
    kinds = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return isinstance(tensor, torch.Tensor) and tensor.dim() == 0 and tensor.dtype in kinds


def _single(item: Any) -> int | None:
    """Return a number that is given, perhaps as the only one of a list; else None."""
    if isinstance(item, (tuple, list)) and len(item) == 1:
        item = item[0]
    return item if type(item) is int else None


def _asking() -> FrameType | None:
    """Return the innermost frame that is neither torch's, this package's nor a mode's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name != HANDS_ON and not code.co_filename.startswith(_NOT_ASKING):
            return frame
        frame = frame.f_back
    return None


def _taker(code: CodeType, reading: int) -> int | None:
    """Return the offset of the call that gets the number which a call returns, perhaps negated, and
    which is the first thing to be done with it; None where there is none.

    reading: the offset of the call that returns the number.
    """
    steps = [step for step in dis.get_instructions(code) if step.offset >= reading]
    if not steps or steps[0].opname not in _CALLS:
        return None
    for step in steps[1:]:
        if step.opname in _CALLS:
            return step.offset
        if step.opname not in _BETWEEN or step.is_jump_target:
            return None
    return None


def _used() -> ValueBranchError:
    """Return the error for a number that is for something else than a roll."""
    return ValueBranchError(
        "the forward computes with a tensor's value in Python",
        why="the value is not known before the model runs (.item(), int(), float())",
        fix="keep it a tensor of no dims, which broadcasts as a number does",
    )
