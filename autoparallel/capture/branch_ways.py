"""Branches on the values of tensors: which way the example inputs go, and a trace of that way.

A tracer has no values. An example run has, and notes what each `if tensor:` came out as, by the
line that asked. A trace that goes the same way has a mark at each of these places, which becomes a
check in the program (see runtime/value_branches.py).

Nearly all such questions are checks (`if not finite.all(): raise`), whose answers can be guessed. A
first trace goes the ways that are guessed; where the example run says the same, it is the one.

So it is with numbers that are read out of tensors (`int(tensor)`) where neither inputs nor weights
decide on them: they follow from sizes and settings, and are the same in the next call.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from autoparallel.capture.source_files import HANDS_ON
from autoparallel.errors import CaptureError
from autoparallel.graph.graph import Graph
from autoparallel.graph.operators import BRANCH_TAKEN, draws
from autoparallel.runtime import value_branches  # noqa: F401  # an op, which programs call by name

__all__ = [
    "BRANCH",
    "NO_WAYS",
    "Asked",
    "NoteWays",
    "TakeWays",
    "ValueBranchError",
    "Way",
    "Ways",
    "refuse_drawn",
]

# The mark in a trace. It returns nothing, so that no tracer drops it.
BRANCH = "autoparallel.branch.default"

_library = torch.library.Library("autoparallel", "FRAGMENT")
_library.define("branch(Tensor condition, bool expected, int number) -> ()")


# What is known while it is traced needs no mark, but an op that runs.
@torch.library.impl(_library, "branch", "CompositeExplicitAutograd")
def _branch(condition: torch.Tensor, expected: bool, number: int) -> None:
    """Mark a branch."""


# A line of code, by file and number, and the function of torch's that asks on its behalf.
Way = tuple[str, int, str]
# The answers that a line got, one after the other: truth values, and numbers or lists of them that
# hold for other calls too; None for those that do not.
Ways = Mapping[Way, tuple[Any, ...]]
NO_WAYS: Ways = {}

_TRUTHS = {torch.Tensor.__bool__, torch.Tensor.is_nonzero, torch.is_nonzero}
_NUMBERS: set[Any] = {torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__float__}
_NUMBERS |= {torch.Tensor.__index__, torch.Tensor.tolist}
_EQUALS = {torch.equal, torch.Tensor.equal}
_CLOSES = {torch.allclose, torch.Tensor.allclose}
# Functions that take sizes and one tensor.
_SIZED = {torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.expand}
_SIZED |= {torch.Tensor.repeat, torch.Tensor.as_strided, torch.as_strided, torch.Tensor.narrow}
_SIZED |= {torch.narrow, torch.Tensor.unfold, functional.pad, torch.Tensor.__getitem__}
_SIZED |= {torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_empty}
_MADE = {torch.zeros, torch.ones, torch.empty, torch.arange, torch.rand, torch.randn}
_SIZED |= _MADE
_AS_IT_IS = object()
_ASKING = _TRUTHS | _NUMBERS | _EQUALS | _CLOSES
# Functions whose truth is the exception: `if torch.isnan(x).any():`.
_SELDOM = {torch.any, torch.Tensor.any, torch.isnan, torch.Tensor.isnan}
_SELDOM |= {torch.isinf, torch.Tensor.isinf}
_LOOK_OUTS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
# With a separator at the end: other packages have names that begin with torch.
_TORCH = str(Path(torch.__file__).parent / "_")[:-1]
_OURS = str(Path(__file__).parent.parent / "_")[:-1]


class ValueBranchError(CaptureError):
    """A forward that branches on the values of a tensor: a graph has one path for all data."""


def _is_number(function: Any, args: tuple[Any, ...]) -> bool:
    """Return whether a call reads numbers out of a tensor, and not one truth value."""
    return function in _NUMBERS and (args[0].dtype != torch.bool or args[0].dim() > 0)


def _place() -> tuple[Way, bool]:
    """Return the line of the user's that asks, and whether one of torch's checks asks for it.

    Torch's checks (torch._check_tensor_all and the like) raise where the answer is no. A mode that
    hands on what others ask does not ask.
    """
    frame: FrameType | None = sys._getframe(2)
    checks, asker = False, ""
    while frame is not None:
        code = frame.f_code
        if code.co_name == HANDS_ON:
            frame = frame.f_back
            continue
        if not code.co_filename.startswith((_TORCH, _OURS)):
            return (code.co_filename, frame.f_lineno, asker), checks
        if code.co_filename.startswith(_TORCH):
            checks |= code.co_filename == torch.__file__ and code.co_name.startswith("_check")
            # Some releases of Python have no frame for a list that is made in a function.
            asker = asker or code.co_name.replace("<listcomp>", "")
        elif code is tolist.__code__:
            asker = asker or code.co_name
        frame = frame.f_back
    return ("", 0, ""), checks


def tolist(tensor: torch.Tensor) -> Any:
    """Return the numbers of a tensor one by one, as a tracer's tensors read them."""
    return tensor.item() if tensor.dim() == 0 else [tolist(part) for part in tensor]


class Asked:
    """An Asked object collects what a trace could not answer.

    lines: those that have asked, and that no ways tell of. functions: torch's own functions that
    ask inside, of which a mode sees nothing as long as they are not opened. guesses: whether truth
    values that no ways tell of are guessed. likely: the ways that are guessed; other lines are
    guessed by what they ask for. guessed: the guesses of each call, by line. in_blocks: whether one
    of several equal blocks has asked. unanswered: whether a line had no answer, not even a guess.
    """

    def __init__(self, guesses: bool = False, likely: Ways = NO_WAYS) -> None:
        self.lines: dict[Way, None] = {}
        self.functions: dict[Any, None] = {}
        self.guesses, self.likely = guesses, likely
        self.guessed: list[dict[Way, tuple[bool, ...]]] = []
        self.in_blocks = self.unanswered = False

    def take(self) -> frozenset[Way]:
        """Return the lines, and forget them: none of them asks again in a trace that has ways."""
        lines, self.lines, self.guessed = frozenset(self.lines), {}, []
        self.unanswered = False
        return lines

    def has_guessed(self) -> bool:
        """Return whether a trace has gone a way that was guessed."""
        return any(self.guessed)

    def is_right(self, ways: Ways) -> bool:
        """Return whether all guesses are what an example run says. ways: of that run."""
        return all(
            ways.get(line, ())[: len(answers)] == answers
            for call in self.guessed
            for line, answers in call.items()
        )


def _is_python(function: Any) -> bool:
    """Return whether a function is one of torch's in Python, which looks out for modes."""
    if not isinstance(function, FunctionType) or not function.__module__.startswith("torch."):
        return False
    names = function.__code__.co_names
    return any(name in names and name in function.__globals__ for name in _LOOK_OUTS)


@cache
def _opened(function: FunctionType) -> FunctionType:
    """Return the same function without its look-out for modes, which then see what it calls.

    Torch's functions hand themselves to a mode as a whole, and run without it.
    """
    names = {name: _never for name in _LOOK_OUTS if name in function.__globals__}
    names = {**function.__globals__, **names}
    code, defaults = function.__code__, function.__defaults__
    opened = FunctionType(code, names, function.__name__, defaults, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def _never(*_: Any) -> bool:
    """Say that nobody looks on."""
    return False


def _run_opened(
    mode: NoteWays | TakeWays, function: Any, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Run one of torch's functions in Python so that the mode sees what it calls.

    A method in Python may call the method of the same name that is written in C++ (unflatten), of
    which the mode is told by the name of the first.
    """
    mode.open.add(function)
    try:
        with mode:
            return _opened(function)(*args, **(kwargs or {}))
    finally:
        mode.open.discard(function)


class NoteWays(TorchFunctionMode):
    """Notes every answer of an example run.

    note: is called with the line and the answer. varies: whether the numbers of a tensor are others
    in the next call.
    """

    def __init__(
        self, note: Callable[[Way, Any], None], varies: Callable[[torch.Tensor], bool]
    ) -> None:
        super().__init__()
        self.note, self.varies = note, varies
        self.open: set[Any] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _SIZED:
            args, kwargs = _with_numbers(function, args, kwargs, self.number)
        if _is_python(function) and function not in self.open:
            return _run_opened(self, function, args, kwargs)
        if function not in _ASKING:
            return function(*args, **(kwargs or {}))
        if function is torch.Tensor.tolist and not self.varies(args[0]):
            with self:
                return tolist(args[0])
        if _is_number(function, args):
            return self.number(args[0], function)
        answer = function(*args, **(kwargs or {}))
        self.note(_place()[0], answer)
        return answer

    def number(self, tensor: torch.Tensor, function: Any = int) -> Any:
        """Return the numbers of a tensor, as a function reads them, and note them."""
        answer = function(tensor)
        self.note(_place()[0], None if self.varies(tensor) else answer)
        return answer


class TakeWays(TorchFunctionMode):
    """Has a trace go the ways of an example run, with a mark where it asks.

    ways: of the run. asked: gets what the run tells nothing of. marks: whether to leave marks, and
    to open no more functions of torch's than must be. decided: is called where a way is taken.
    """

    def __init__(
        self,
        ways: Ways,
        asked: Asked,
        marks: bool = True,
        decided: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.ways, self.asked, self.marks, self.decided = ways, asked, marks, decided
        self.guessed: dict[Way, tuple[bool, ...]] = {}
        asked.guessed.append(self.guessed)
        self.seldom = WeakTensorKeyDictionary()
        self.counts: dict[Way, int] = {}
        self.open: set[Any] = set()
        self.numbers = itertools.count()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _SIZED:
            args, kwargs = _with_numbers(function, args, kwargs, self.number)
        opens = function in self.asked.functions if self.marks else _is_python(function)
        if opens and self.ways and function not in self.open:
            return _run_opened(self, function, args, kwargs)
        if function not in _ASKING:
            try:
                result = function(*args, **(kwargs or {}))
                if function in _SELDOM and isinstance(result, torch.Tensor):
                    self.seldom[result] = True
                return result
            except Exception as error:
                new = _is_python(function) and function not in self.asked.functions
                if new and "DataDependent" in type(error).__name__:
                    self.asked.functions[function] = None
                    (file, line, _), _ = _place()
                    self.asked.lines[file, line, function.__name__] = None
                raise
        if function is torch.Tensor.tolist and self.ways:
            with self:
                return tolist(args[0])
        if _is_number(function, args):
            number = self.number(args[0], None)
            return function(*args) if number is None else number
        answer = self.answer(not isinstance(args[0], torch.Tensor) or args[0] not in self.seldom)
        if answer is None:
            return function(*args, **(kwargs or {}))
        condition = _condition(function, args, kwargs or {})
        if isinstance(condition, torch.Tensor):
            self.mark(condition, answer)
            return answer
        return condition

    def number(self, tensor: torch.Tensor, otherwise: Any = _AS_IT_IS) -> Any:
        """Return the numbers of a tensor; where the run tells nothing of them, what is given."""
        answer = self.answer()
        if answer is None:
            return tensor if otherwise is _AS_IT_IS else otherwise
        expected = torch.tensor(answer, dtype=tensor.dtype, device=tensor.device)
        self.mark((tensor == expected.reshape(tensor.shape)).all(), True)
        return answer

    def answer(self, guess: bool | None = None) -> Any:
        """Return what the run says at this place, None where it says nothing.

        guess: the likely answer where it is a truth value.
        """
        place, checks = _place()
        count = self.counts[place] = self.counts.get(place, -1) + 1
        answers = (True,) * (count + 1) if checks else self.ways.get(place, ())
        if count < len(answers) and answers[count] is not None:
            self.decided()
            return answers[count]
        self.asked.lines[place] = None
        if guess is None or self.ways or not self.asked.guesses:
            self.asked.unanswered = True
            return None
        self.decided()
        likely = self.asked.likely.get(place, ())
        if count < len(likely):
            guess = bool(likely[count])
        self.guessed[place] = (*self.guessed.get(place, ()), guess)
        return guess

    def mark(self, condition: torch.Tensor, way: bool) -> None:
        """Leave a mark."""
        if self.marks:
            torch.ops.autoparallel.branch(condition, way, next(self.numbers))


def _with_numbers(
    function: Any, args: tuple[Any, ...], kwargs: Any, number: Callable[[torch.Tensor], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in which sizes that are tensors are numbers.

    Torch reads such sizes itself, past all modes. number: reads one.
    """
    indexes = function is torch.Tensor.__getitem__

    def read(item: Any, inside: bool) -> Any:
        """Return an argument with numbers; of an index, those of its slices alone."""
        if isinstance(item, slice):
            parts = (read(part, True) for part in (item.start, item.stop, item.step))
            return slice(*parts)
        if type(item) in (tuple, list, torch.Size):
            return type(item)([read(each, inside) for each in item])
        whole = isinstance(item, torch.Tensor) and not item.is_floating_point()
        return number(item) if inside and whole and item.numel() == 1 else item

    kept = 0 if function in _MADE else 1
    rest = tuple(read(item, not indexes) for item in args[kept:])
    return (*args[:kept], *rest), {key: read(item, True) for key, item in (kwargs or {}).items()}


def _condition(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the answer as a truth value of no dims, or False where sizes alone tell it."""
    if function in _EQUALS:
        return (args[0] == args[1]).all() if args[0].shape == args[1].shape else False
    if function in _CLOSES:
        return torch.isclose(*args, **kwargs).all()
    tensor = args[0].reshape(())
    return tensor if tensor.dtype == torch.bool else tensor != 0


def refuse_drawn(graph: Graph) -> None:
    """Raise ValueBranchError where a branch depends on random numbers alone.

    Layers that are left out by chance go either way in every call. A program for one of the ways,
    and Python where it is the other one, would draw twice, and so another way too often.

    Example: `refuse_drawn(captured.graph)`.
    """
    for node in graph.calls:
        if node.target != BRANCH_TAKEN:
            continue
        drawn, given = False, False
        todo, seen = list(node.operands()), set(node.operands())
        while todo:
            producer = graph.producers[todo.pop()]
            if producer.kind != "call":
                given |= producer.kind != "constant"
                continue
            if draws(producer.target):
                drawn = True
                continue
            todo += [name for name in producer.operands() if name not in seen]
            seen.update(producer.operands())
        if drawn and not given:
            raise ValueBranchError(
                "the forward branches on random numbers",
                where=node.line,
                why="a graph has one path for all draws",
                fix="write the choice with torch.where, or move it out of the module that is split",
            )
