"""Random numbers that a forward draws with Python or numpy, which a graph has as they were drawn.

They are right in every call where the forward seeds the generator itself before it draws, and where
it only compares them with a number that all are below or above, as where layers are dropped with
probability 0. What it leaves in the generator, which the user's next draws begin with, is left
there by the program too.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch.overrides import TorchFunctionMode

from autoparallel.capture.decided_draws import DrawnNumber
from autoparallel.errors import CaptureError
from autoparallel.support.rng_state import PythonDraw, PythonNumbers, python_numbers

__all__ = ["PythonDraws"]

# To look at a generator costs as much as some of the functions that are looked at.
_LOOK_EVERY = 8
# Python modules, and functions of the operating system, that give something else at each call. A
# seed that may come from one of them is no seed of the forward's own.
_MOVING = {"time", "datetime", "uuid", "secrets"}
_MOVING_FUNCTIONS = {"urandom", "getrandom", "getpid"}
# The module whose functions call the user's forward: frames from there on are not the user's.
_FORWARD = "autoparallel.capture.traced_forward"
# Functions that call one another which are looked at.
_DEEPEST = 3


class PythonDraws(TorchFunctionMode):
    """A mode of a trace that raises CaptureError for random numbers that are others in each call.

    name: of the module that is traced, for the error. left: the states in which the forward leaves
    generators that it seeds, and the draws from others, after `finish`.

    Example: `with PythonDraws("GPT") as draws: model(x)`, then `draws.finish()`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = name, 0
        self.before = python_numbers()
        self.seeded: set[str] = set()
        self.drawn: dict[str, int] = {}
        self.left: tuple[PythonNumbers | PythonDraw, ...] = ()
        self.replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Any:
        for generator, (owner, setters) in _setters().items():
            for setter in setters:
                self._replace(owner, setter, functools.partial(self._set, generator, setter))
            for name in ("random", "uniform"):
                self._replace(owner, name, functools.partial(self._draw, generator))
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        while self.replaced:
            setattr(*self.replaced.pop())
        if self.drawn and isinstance(error, TypeError):
            self.refuse()  # torch takes no such number

    def _replace(self, owner: Any, name: str, new: Callable[..., Any]) -> None:
        """Put a function in the place of another one, which it is given."""
        original = getattr(owner, name)
        self.replaced.append((owner, name, original))
        setattr(owner, name, functools.partial(new, original))

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        # The sooner it ends the better: the trace is of no use.
        if self.calls % _LOOK_EVERY == 0:
            self.check()
        return function(*args, **(kwargs or {}))

    def check(self) -> None:
        """Raise CaptureError where a generator has moved that the forward has not seeded."""
        if not self.seeded.issuperset(self.moved()):
            self.refuse()

    def refuse(self) -> NoReturn:
        """Raise the error for numbers that are others in each call."""
        raise CaptureError(
            f"{self.name}.forward draws random numbers with Python or numpy",
            why="a graph would have the numbers of this one trace for ever",
            fix="draw them with torch, or in a module that is not traced; or seed the "
            "generator in the forward, for the same numbers in each call",
        )

    def moved(self) -> list[str]:
        """Return the generators that are not where they were before the forward."""
        return [name for name, now in python_numbers().items() if now != self.before.get(name, now)]

    def finish(self) -> None:
        """Note what the forward leaves behind, when it has run. Raises CaptureError as `check`."""
        self.check()
        now = python_numbers()
        # Also where it has not moved: the call before may have left it there.
        seeded = [PythonNumbers(name, now[name]) for name in sorted(self.seeded)]
        others = sorted(self.drawn.keys() - self.seeded)
        self.left = (*seeded, *(PythonDraw(name, self.drawn[name]) for name in others))

    def _draw(self, generator: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Draw a number; where it is of [0, 1), return one that is only good for comparisons."""
        self.check()
        number = original(*args, **kwargs)
        if generator in self.seeded or kwargs or args not in ((), (0, 1)):
            return number
        self.before[generator] = python_numbers()[generator]
        self.drawn[generator] = self.drawn.get(generator, 0) + 1
        return DrawnNumber(self.refuse)

    def _set(
        self, generator: str, setter: str, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Seed a generator for the forward, or set its state, by a function of that name.

        A seed that is no plain value is perhaps another one in the next call, and so is one where
        the code around it asks a clock; and a state, unless it is the one from before.
        """
        self.check()
        self.seeded.discard(generator)
        plain = len(args) == 1 and not kwargs and type(args[0]) in (int, float, str, bytes)
        if plain and setter == "seed" and not any(_moves(*code) for code in _users_code()):
            self.seeded.add(generator)
        return original(*args, **kwargs)


def _users_code() -> Iterator[tuple[types.CodeType, dict[str, Any]]]:
    """Yield the code of the user's functions that run now inside of the trace, with its globals."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != _FORWARD:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in ("torch", "autoparallel"):
            yield frame.f_code, frame.f_globals
        frame = frame.f_back  # type: ignore[assignment]


def _moves(code: types.CodeType, variables: dict[str, Any], depth: int = 0) -> bool:
    """Return whether code asks for what is another at each call, by what it has the names of.

    variables: global ones. depth: functions that call one another.
    """
    for name in code.co_names:
        value = variables.get(name, sys.modules.get(name))
        of = "__name__" if isinstance(value, types.ModuleType) else "__module__"
        home = getattr(value, of, None)
        if (isinstance(home, str) and home in _MOVING) or name in _MOVING_FUNCTIONS:
            return True
        called = value if isinstance(value, types.FunctionType) and depth < _DEEPEST else None
        if called and _moves(called.__code__, called.__globals__, depth + 1):
            return True
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return any(_moves(const, variables, depth) for const in inner)


def _setters() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Return the Python modules with functions that set a global generator, and their names."""
    numpy = sys.modules.get("numpy")
    setters: dict[str, tuple[Any, tuple[str, ...]]] = {"python": (random, ("seed", "setstate"))}
    if numpy is not None:
        setters["numpy"] = (numpy.random, ("seed", "set_state"))
    return setters
