"""Answers that a forward gets outside of torch and the model: clocks, files, its callers.

The answer is another one in each call, or may be, and a trace has it as a constant. Such questions
end in few functions of the interpreter, which are seen by a profile function while the forward is
traced. That is slow, so that it is installed for models alone whose code has the names of something
that may ask.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import logging
import random
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from autoparallel.errors import CaptureError
from autoparallel.graph.attribute_read import Answer, AttributeRead, Where
from autoparallel.support.object_state import functions_in, special_methods

__all__ = ["NOTATIONS", "OutsideAnswerError", "OutsideAnswers", "asking_code", "may_ask"]


def _names(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


_CLOCKS = _names("time monotonic perf_counter process_time thread_time clock_gettime")
_CLOCKS |= {f"{name}_ns" for name in _CLOCKS} | _names("localtime gmtime ctime asctime strftime")
_SYSTEM = _names("urandom getrandom getpid getppid times getloadavg getcwd open read")
_SYSTEM |= _names("stat lstat fstat access listdir scandir readlink")
_FILES = _names("open open_code")
_FRAMES = _names("_getframe _current_frames getrefcount getrecursionlimit getswitchinterval")
_LIVING = _names("get_objects get_count get_referrers get_stats")
_EXISTING = _names("exists isfile isdir getmtime getsize walk")
_GENERATORS = _names("default_rng RandomState Generator SeedSequence PCG64 Philox SFC64")
_ANY = frozenset[str]()
# Methods that ask, of whatever object.
_LEVELS = _names("isEnabledFor getEffectiveLevel")
_METHODS = _names("read_text read_bytes iterdir __subclasses__") | _LEVELS
# Functions of the interpreter by the module that they are of; _ANY stands for all of them.
_ENDS: Mapping[str, frozenset[str]] = {
    "time": _CLOCKS,
    "datetime": _names("now utcnow today"),
    "posix": _SYSTEM,
    "_io": _FILES,
    "io": _FILES,
    "builtins": _names("input id __subclasses__ eval exec"),
    "sys": _FRAMES,
    "gc": _LIVING,
    "decimal": _names("getcontext localcontext"),
    "_locale": _names("localeconv setlocale"),
    **dict.fromkeys(("resource", "_uuid", "_posixsubprocess", "_socket"), _ANY),
}
# They count where the user's own code calls them: libraries do so for purposes of their own.
_DIRECT = _names("id _getframe getrefcount getrecursionlimit read eval exec")
_TEXTS = _names("eval exec")  # they run code that is a text, of which no name is known
# Python modules by which code asks, with the names that it then has.
_WAYS: Mapping[str, frozenset[str]] = {
    "time": _CLOCKS,
    "datetime": _ENDS["datetime"],
    "gc": _LIVING,
    "sys": _FRAMES,
    "os": _SYSTEM | _EXISTING,
    "posix": _SYSTEM,
    "decimal": _names("getcontext localcontext"),
    "locale": _names("localeconv getlocale setlocale"),
    "genericpath": _EXISTING,
    "io": _FILES,
    "_io": _FILES,
    "builtins": _names("open input id"),
    "random": _names("Random SystemRandom"),
    "inspect": _names("stack currentframe trace"),
    "pathlib": _EXISTING | _SYSTEM | _METHODS,
    "numpy": _GENERATORS | _names("load loadtxt genfromtxt fromfile memmap"),
    **dict.fromkeys(("secrets", "uuid", "subprocess", "socket", "resource"), _ANY),
    **dict.fromkeys(("tempfile", "glob", "configparser", "linecache", "shelve", "dbm"), _ANY),
    **dict.fromkeys(("gzip", "bz2", "lzma", "zipfile", "tarfile", "fileinput"), _ANY),
}
_LEVEL_CODES = {getattr(logging.Logger, name).__code__ for name in _LEVELS}
_FUNCTIONS = (types.FunctionType, types.MethodType)
_STANDARD = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch"}
# Notations for ops of torch: their functions follow from what they are given, and what they keep is
# how they have read a text, and of which library a tensor is.
NOTATIONS = _names("einops einx")
# Packages that ask for themselves, when a user's code calls them.
_OTHERS = _names("torch autoparallel logging warnings importlib linecache traceback threading")
_OTHERS |= _names("concurrent asyncio selectors copy weakref contextlib") | NOTATIONS


def may_ask(names: Iterable[str], variables: Mapping[str, Any]) -> bool:
    """Return whether code may ask, by what it has the names of. variables: its global ones.

    >>> import time
    >>> may_ask(("time", "monotonic"), {"time": time}), may_ask(("sleep",), {"sleep": time.sleep})
    (True, False)
    """
    known = frozenset(names)
    if not known.isdisjoint(_METHODS):
        return True
    values = [
        (name, variables.get(name, getattr(builtins, name, sys.modules.get(name))))
        for name in known
    ]
    # A module may have what another one defines, as `timeit` has clocks.
    values += [
        (name, vars(value)[name])
        for _, value in values
        if isinstance(value, types.ModuleType)
        for name in known & vars(value).keys()
    ]
    for name, value in values:
        if isinstance(value, types.ModuleType):
            home, asked = value.__name__, known
        else:
            home, asked = getattr(value, "__module__", None) or "", frozenset([name])
            asked |= {str(getattr(value, "__name__", ""))}
            # Such as the class datetime, or a path, whose methods ask.
            methods = isinstance(value, type) and home in _ENDS
            asked |= known if methods or home == "pathlib" else frozenset()
        home = home if home in _WAYS else home.partition(".")[0]
        if home in _WAYS and (not _WAYS[home] or not asked.isdisjoint(_WAYS[home])):
            return True
    return False


def asking_code(
    codes: Mapping[types.CodeType, Mapping[str, Any]],
    helpers: Mapping[type, bool],
    kept: Iterable[Any] = (),
) -> Mapping[types.CodeType, Mapping[str, Any]]:
    """Return all code, and that of methods which it may call, if any of it may ask; else none.

    codes: with their global variables. helpers: classes of objects whose methods may be called;
    True where objects of the class may be made.
    kept: functions of other packages that may be called, too.

    >>> asking_code({(lambda x: x + 1).__code__: {}}, {})
    {}
    """
    found = dict(codes)
    names: set[str] = set()
    # Methods that are called without their names, such as `__enter__`.
    special: dict[type, set[str]] = {}
    for kind, made in helpers.items():
        for owner in kind.__mro__:
            if _package(owner.__module__) in _STANDARD:
                continue
            special.setdefault(owner, set()).update(special_methods(owner, made))
    methods: dict[str, list[Any]] = {}
    for owner in special:
        for name, value in vars(owner).items():
            methods.setdefault(name, []).append(value)
    unnamed = [vars(owner)[name] for owner, own in special.items() for name in own]
    todo = list(found.items())
    while todo:
        code, variables = todo.pop()
        new = {name for name in code.co_names if name not in names}
        names.update(new)
        values = [value for name in sorted(new & methods.keys()) for value in methods[name]]
        functions = [each for value in (*values, *unnamed) for each in functions_in(value)]
        unnamed = []
        if code not in codes:  # of the others all are known that they call by name
            home = _package(variables.get("__name__"))
            called = [variables.get(name) for name in code.co_names]
            functions += [
                each
                for each in called
                if isinstance(each, types.FunctionType) and _package(each.__module__) == home
            ]
        inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
        pairs = [(function.__code__, function.__globals__) for function in functions]
        for other, around in (*pairs, *[(each, variables) for each in inner]):
            # Such as what a dataclass has around its methods.
            if other not in found and _package(around.get("__name__")) not in _STANDARD:
                found[other] = around
                todo.append((other, around))
    asks = any(may_ask(code.co_names, variables) for code, variables in found.items())
    asks = asks or any(map(_runs_text, found))
    asks = asks or any(may_ask((_name(each),), {_name(each): each}) for each in kept)
    return found if asks else {}


def _runs_text(code: types.CodeType) -> bool:
    """Return whether code runs code that is a text. Methods are no matter, as of `model.eval()`."""
    return not _TEXTS.isdisjoint(code.co_names) and any(
        step.opname == "LOAD_GLOBAL" and step.argval in _TEXTS
        for step in dis.get_instructions(code)
    )


def _name(function: Any) -> str:
    """Return the name of a function."""
    return str(getattr(function, "__name__", ""))


def _package(module: Any) -> str:
    """Return the name of the package that a Python module is in."""
    return str(module).partition(".")[0]


def _handed_on(code: types.CodeType, variables: Mapping[str, Any]) -> str:
    """Return the name of a function that code hands on, and that asks when called; "" if none.

    Where the interpreter calls it, as `sorted(values, key=id)` does, no profile function is told.

    >>> _handed_on((lambda values: sorted(values, key=id)).__code__, {})
    'id'
    >>> _handed_on((lambda value: id(value)).__code__, {})
    ''
    """
    owner: Any = None
    begun = False
    steps = list(dis.get_instructions(code))
    # Behind a function stands what a call begins with, unless it was loaded with it or before it.
    behind = [step.opname == "PUSH_NULL" for step in (*steps[1:], steps[-1])]
    for step, pushed in zip(steps, behind, strict=True):
        value: Any = None
        called = pushed or bool((step.arg or 0) & 1)
        if step.opname == "LOAD_GLOBAL":
            owner, begun = variables.get(step.argval, getattr(builtins, step.argval, None)), called
            value = None if called else owner
        elif step.opname == "LOAD_ATTR" and isinstance(owner, types.ModuleType):
            # Until Python 3.11 another instruction loads what is called.
            called = begun or pushed or (called and sys.version_info >= (3, 12))
            value, owner = None if called else vars(owner).get(step.argval), None
        else:
            owner = None
        if isinstance(value, types.BuiltinFunctionType) and _asks(value):
            return str(step.argval)
    return ""


def _asks(function: types.BuiltinFunctionType) -> bool:
    """Return whether a function of the interpreter's is one that asks."""
    ends = _ENDS.get(str(function.__module__))
    return ends is not None and (not ends or function.__name__ in ends)


class OutsideAnswerError(CaptureError):
    """A forward that asks for what is another thing in each call, or may be."""


class OutsideAnswers:
    """An OutsideAnswers object notes what a forward asks outside of torch and the model.

    name: of the model. codes: the code of the user's functions with their global variables, empty
    where none may ask. handing: the code that hands on what asks, with its name. asked: by
    the function's name the line that has asked. levels: what loggers were asked, with their answers
    as values, which calls can compare. before: a profile function of the user's, which is
    called as ever.

    >>> def clock():
    ...     return time.monotonic()
    >>> import time
    >>> answers = OutsideAnswers("Clock", {clock.__code__: globals()})
    >>> with answers.installed():
    ...     _ = clock()
    >>> list(answers.asked)
    ['time.monotonic()']
    """

    def __init__(self, name: str, codes: Mapping[types.CodeType, Mapping[str, Any]]) -> None:
        self.name, self.codes = name, codes
        self.asked: dict[str, str] = {}
        self.levels: dict[str, AttributeRead] = {}
        self.before: Any = None
        self.handing = {
            code: handed for code, around in codes.items() if (handed := _handed_on(code, around))
        }

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Note what this thread's code asks within."""
        if not self.codes:
            yield
            return
        before: Any = sys.getprofile()
        # The interpreter's own profiler takes no other function beside it, and rests meanwhile.
        rests = all(hasattr(before, name) for name in ("enable", "disable"))
        if before is not None and not rests and not isinstance(before, _FUNCTIONS):
            self.asked["a function that gives something else in each call"] = ""
            yield
            return
        if rests:
            before.disable()
        self.before = None if rests else before
        sys.setprofile(self._seen)
        try:
            yield
        finally:
            sys.setprofile(self.before)
            if rests:
                before.enable()

    def refuse(self) -> None:
        """Raise OutsideAnswerError where the forward has asked for something."""
        if self.asked:
            asked, where = next(iter(self.asked.items()))
            raise OutsideAnswerError(
                f"{self.name}.forward asks {asked}",
                where=where,
                why="the answer may be another one in the next call, and a graph would have that "
                "of this one trace for ever",
                fix="pass it as an argument, or ask in a module without parameters, which stays "
                "Python",
            )

    def _seen(self, frame: types.FrameType, event: str, function: Any) -> None:
        """Note the call of a function of the interpreter. function: the one that is called."""
        if self.before is not None:
            self.before(frame, event, function)
        caller = frame.f_back
        levels = event == "call" and frame.f_code in _LEVEL_CODES
        if levels and caller is not None and caller.f_code in self.codes:
            self._level(frame)
        if event == "call" and frame.f_code in self.handing:
            name = self.handing[frame.f_code]
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            self.asked.setdefault(f"{name}(), which it hands on", line)
        if event != "c_call":
            return
        name, owner = function.__name__, getattr(function, "__self__", None)
        home = function.__module__
        if name == "__subclasses__":
            home = "builtins"
        elif home is None:
            home = (owner if isinstance(owner, type) else type(owner)).__module__
        ends = _ENDS.get(home)
        if ends is None or (ends and name not in ends):
            # A generator that is given no seed asks the system for one.
            if name != "seed" or not isinstance(owner, random.Random) or _seed_of(frame):
                return
            home, name = "random", "Random"
        # By inspect.stack(), say; inspect.signature() asks other things for purposes of its own.
        through = ("inspect",) if name == "_getframe" else ()
        asker = self._asker(frame, name in _DIRECT, through)
        if asker is not None:
            shown = {"posix": "os.", "_io": "", "io": "", "builtins": ""}.get(home, f"{home}.")
            line = f"{asker.f_code.co_filename}:{asker.f_lineno}"
            self.asked.setdefault(f"{shown}{name}()", line)

    def _level(self, frame: types.FrameType) -> None:
        """Note what a logger is asked. frame: of its method, with the arguments as variables."""
        logger, *level = (frame.f_locals[name] for name in _arguments(frame.f_code))
        ask = partial(getattr(logger, frame.f_code.co_name), *level)
        name = f"{frame.f_code.co_name}{(logger.name, *level)}"
        where = (("cell", Answer(ask)),)
        self.levels[name] = AttributeRead("", where, name, Where.ENCLOSED, ask())

    def _asker(
        self, frame: types.FrameType | None, direct: bool, through: tuple[str, ...]
    ) -> types.FrameType | None:
        """Return the frame of the user's code that asks, None where others do for themselves.

        direct: the user's code has to ask itself, or through these packages.
        """
        while frame is not None and frame.f_code not in self.codes:
            package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if package in _OTHERS or (direct and package not in through):
                return None
            frame = frame.f_back
        return frame


def _arguments(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of what a function is given by position."""
    return code.co_varnames[: code.co_argcount]


def _seed_of(frame: types.FrameType) -> bool:
    """Return whether a call of Random.seed, by its frame, is given a seed."""
    return frame.f_code.co_name != "seed" or frame.f_locals.get("a") is not None
