"""Switches of torch that a forward asks for while it is traced, or sets and no graph would have."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from autoparallel.capture.searched_values import is_own_code
from autoparallel.errors import CaptureError
from autoparallel.graph.attribute_read import ABSENT, UNKNOWN, Answer, AttributeRead, Where

__all__ = [
    "SWITCHES",
    "Switches",
    "asked_by_user",
    "is_traced",
    "note_question",
    "refusing_contexts",
    "untold",
    "watching_gradient_mode",
]

_lock = threading.Lock()
_records: dict[int, list[list[str]]] = {}
_original = torch.is_grad_enabled


def asked_by_user(depth: int) -> str:
    """Return the name of the module whose code asks, nothing where torch or this project does.

    Torch asks for purposes of its own: its fast paths for inference compute the same. depth: of the
    frame that asks, seen from the caller.

    >>> eval("asked(0)", {"asked": asked_by_user, "__name__": "a_model"})
    'a_model'
    """
    name = str(sys._getframe(depth + 1).f_globals.get("__name__", ""))
    return "" if name.partition(".")[0] in ("torch", "autoparallel") else name


def _asked() -> bool:
    """Return what torch.is_grad_enabled does, and note who has asked."""
    records = _records.get(threading.get_ident())
    if records:
        name = asked_by_user(1)
        if name:
            records[-1].append(name)
    return _original()


@contextlib.contextmanager
def watching_gradient_mode(record: list[str]) -> Iterator[None]:
    """Note in `record` who asks, in this thread and within, whether gradients are recorded.

    >>> record = []
    >>> with watching_gradient_mode(record):
    ...     _ = eval("torch.is_grad_enabled()", {"torch": torch, "__name__": "a_model"})
    >>> record
    ['a_model']
    """
    thread = threading.get_ident()
    with _lock:
        _records.setdefault(thread, []).append(record)
        torch.is_grad_enabled = _asked
    try:
        yield
    finally:
        with _lock:
            _records[thread].pop()
            if not _records[thread]:
                del _records[thread]
            if not _records:
                torch.is_grad_enabled = _original


# Functions without arguments that say how torch is set; the type of new tensors, and autocast, are
# known of every call. The first two are answered as around it: no trace runs in that mode, and a
# trace has a seed of its own.
_AROUND = ("is_inference_mode_enabled", "initial_seed")
SWITCHES = (
    *("is_inference_mode_enabled", "are_deterministic_algorithms_enabled", "is_anomaly_enabled"),
    *("is_deterministic_algorithms_warn_only_enabled", "is_anomaly_check_nan_enabled"),
    *("get_num_threads", "get_num_interop_threads", "get_float32_matmul_precision"),
    *("get_deterministic_debug_mode", "initial_seed"),
)
_functions: dict[str, Callable[[], Any]] = {name: getattr(torch, name) for name in SWITCHES}
_environment: Any = type(os.environ)
_get_variable = _environment.__getitem__
# The standard library's own ways to a variable of the environment.
_WAYS = ("os", "collections.abc", "_collections_abc")


class _Watching(threading.local):
    """The switches that a thread's questions are noted in, None where nobody wants to know."""

    switches: Switches | None = None


_watching = _Watching()
_installed = 0


class Switches:
    """The switches of torch, and variables of the environment, that a forward asks for.

    They are what they are when this is made. found: the reads, by name.

    >>> switches = Switches()
    >>> with switches.installed():
    ...     _ = eval("torch.get_num_threads()", {"torch": torch, "__name__": "a_model"})
    >>> [read.name for read in switches.reads]
    ['get_num_threads']
    """

    def __init__(self) -> None:
        self.around = {name: _functions[name]() for name in _AROUND}
        self.found: dict[str, AttributeRead] = {}

    @property
    def reads(self) -> tuple[AttributeRead, ...]:
        """The switches that a forward has asked for are reads, with the answers as values."""
        return tuple(self.found.values())

    def answer(self, name: str) -> Any:
        """Return how torch is set, and note that a forward has asked."""
        value = self.around[name] if name in self.around else _functions[name]()
        self.note(name, Answer(_functions[name]), value)
        return value

    def note(self, name: str, holder: Any, value: Any) -> None:
        """Note a question. holder: a mapping that has the answer by `name`."""
        self.found[name] = AttributeRead("", (("cell", holder),), name, Where.ENCLOSED, value)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Note what this thread's code, but for torch's own, asks for within."""
        global _installed
        with _lock:
            _installed += 1
            for name in SWITCHES:
                setattr(torch, name, _answering(name))
            _environment.__getitem__ = _variable
        before, _watching.switches = _watching.switches, self
        try:
            yield
        finally:
            _watching.switches = before
            with _lock:
                _installed -= 1
                if not _installed:
                    for name, function in _functions.items():
                        setattr(torch, name, function)
                    _environment.__getitem__ = _get_variable


def is_traced() -> bool:
    """Return whether this thread traces a forward, whose questions are noted.

    >>> is_traced()
    False
    """
    return _watching.switches is not None


def note_question(name: str, answer: Answer) -> None:
    """Note a question that a forward asks, if this thread traces one.

    name: of the function. answer: gives the same object as long as the program is right.
    """
    switches = _watching.switches
    if switches is not None:
        read = AttributeRead("", (("cell", answer),), name, Where.NAMED, UNKNOWN)
        switches.found[f"{name} {len(switches.found)}"] = read


def _answering(name: str) -> Callable[[], Any]:
    """Return a function in place of torch's of this name, which notes that it is called."""

    def answer() -> Any:
        switches = _watching.switches
        if switches is None or not asked_by_user(1):
            return _functions[name]()
        return switches.answer(name)

    return answer


def _variable(environment: Any, name: str) -> Any:
    """Return a variable of the environment, and note which one a forward has read."""
    switches = _watching.switches
    ours = (os.environ, getattr(os, "environb", None))
    if switches is not None and any(environment is one for one in ours):
        depth = 1
        while str(sys._getframe(depth).f_globals.get("__name__", "")) in _WAYS:
            depth += 1
        if asked_by_user(depth):
            try:
                value = _get_variable(environment, name)
            except KeyError:
                value = ABSENT
            switches.note(name, Answer(partial(_get_variable, environment, name)), value)
    return _get_variable(environment, name)


_TRACED = ("is_compiling", "is_exporting", "is_dynamo_compiling")
# Torch's functions, whatever they are called elsewhere, with the code that is theirs. A name for
# what answers meanwhile is put among their global variables.
_questions: dict[types.FunctionType, types.CodeType] = {}
_ANSWER = "_autoparallel_answers_"
_untolds = 0


class _Untold(threading.local):
    """A count, of each thread its own, of how many times the thread is within `untold`."""

    depth = 0


_untold = _Untold()


def _asking_module() -> str:
    """Return the name of the module whose code asks by one of torch's functions.

    Some hand the question on, and what marks them as deprecated stands between.
    """
    frame: Any = sys._getframe(3)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        asks = name.partition(".")[0] == "torch" and frame.f_code.co_name in _TRACED
        if not asks and name not in ("typing_extensions", "warnings"):
            return name
        frame = frame.f_back
    return ""


def _told_if_library(original: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that answers in place of one of torch's. original: with torch's code."""

    def answer() -> bool:
        if _untold.depth and is_own_code(_asking_module()):
            return False
        return original()

    return answer


def _have_asked() -> None:
    """Have torch's functions answer as `untold` says, by whatever name they are called.

    They stay the objects that they are: a model may have one as a variable of its own.
    """
    for name in _TRACED:
        function: Any = getattr(torch.compiler, name, None)
        if not isinstance(function, types.FunctionType):
            continue
        _questions[function] = function.__code__
        original = types.FunctionType(function.__code__, function.__globals__)
        answer = _ANSWER + name
        function.__globals__[answer] = _told_if_library(original)
        function.__code__ = eval(f"lambda: {answer}()", {}).__code__.replace(co_name=name)


def _let_be() -> None:
    """Give torch's functions their own code again."""
    for function, code in _questions.items():
        function.__code__ = code
        function.__globals__.pop(_ANSWER + code.co_name, None)
    _questions.clear()


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """Have the user's own code not be told, in this thread, that a graph is made of it.

    It is told what is so when the model is called. Libraries ask to leave out checks that no graph
    has, and are told what torch tells them.

    >>> with untold():
    ...     torch.compiler.is_compiling()
    False
    """
    global _untolds
    with _lock:
        if not _untolds:
            _have_asked()
        _untolds += 1
    _untold.depth += 1
    try:
        yield
    finally:
        _untold.depth -= 1
        with _lock:
            _untolds -= 1
            if not _untolds:
                _let_be()


_refusals: dict[int, list[list[CaptureError]]] = {}
_enter_inference = torch.inference_mode.__enter__
_enter_hooks = torch.autograd.graph.saved_tensors_hooks.__enter__


def _refuse(what: str, fix: str) -> None:
    """Raise CaptureError in a thread that traces, for a context that a graph would not have."""
    refusals = _refusals.get(threading.get_ident())
    if refusals:
        error = CaptureError(
            f"the forward enters {what}",
            why="a trace does not see it, and gradients would be others",
            fix=fix,
        )
        refusals[-1].append(error)  # the forward may catch it
        raise error


def _inference(self: Any) -> None:
    """Enter torch.inference_mode, which a trace does not see."""
    if self.mode:
        _refuse("torch.inference_mode", "enter torch.no_grad() instead")
    _enter_inference(self)


def _hooks(self: Any) -> None:
    """Enter torch.autograd.graph.saved_tensors_hooks, whose hooks a graph would not have."""
    if asked_by_user(1):
        _refuse("torch.autograd.graph.saved_tensors_hooks", "enter it around the call of the model")
    _enter_hooks(self)


@contextlib.contextmanager
def refusing_contexts(refused: list[CaptureError]) -> Iterator[None]:
    """Raise CaptureError, in this thread and within, for contexts that a trace does not see.

    refused: the errors are added to it.

    >>> refused = []
    >>> with contextlib.suppress(CaptureError), refusing_contexts(refused):
    ...     with torch.inference_mode():
    ...         pass
    >>> print(refused[0].what)
    the forward enters torch.inference_mode
    """
    thread = threading.get_ident()
    with _lock:
        _refusals.setdefault(thread, []).append(refused)
        torch.inference_mode.__enter__ = _inference  # type: ignore[method-assign]
        torch.autograd.graph.saved_tensors_hooks.__enter__ = _hooks  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            _refusals[thread].pop()
            if not _refusals[thread]:
                del _refusals[thread]
            if not _refusals:
                torch.inference_mode.__enter__ = _enter_inference  # type: ignore[method-assign]
                hooks = torch.autograd.graph.saved_tensors_hooks
                hooks.__enter__ = _enter_hooks  # type: ignore[method-assign]
