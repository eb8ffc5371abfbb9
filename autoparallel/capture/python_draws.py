"""Random numbers that a forward draws with Python or numpy, which a graph has as they were drawn.

They are right in every call where the forward seeds the generator itself before it draws. What it
leaves in the generator, which the user's next draws begin with, is left there by the program too.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

from autoparallel.errors import CaptureError
from autoparallel.support.rng_state import PythonNumbers, python_numbers

__all__ = ["PythonDraws"]

# To look at a generator costs as much as some of the functions that are looked at.
_LOOK_EVERY = 8


class PythonDraws(TorchFunctionMode):
    """A mode of a trace that raises CaptureError for random numbers that are others in each call.

    name: of the module that is traced, for the error. left: the states in which the forward leaves
    generators that it seeds, after `finish`.

    Example: `with PythonDraws("GPT") as draws: model(x)`, then `draws.finish()`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = name, 0
        self.before = python_numbers()
        self.seeded: set[str] = set()
        self.left: tuple[PythonNumbers, ...] = ()
        self.replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Any:
        for generator, (owner, setters) in _setters().items():
            for setter in setters:
                original = getattr(owner, setter)
                self.replaced.append((owner, setter, original))
                setattr(owner, setter, functools.partial(self._set, generator, setter, original))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self.replaced:
            setattr(*self.replaced.pop())

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
        self.left = tuple(PythonNumbers(name, now[name]) for name in sorted(self.seeded))

    def _set(
        self, generator: str, setter: str, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Seed a generator for the forward, or set its state, by a function of that name.

        A seed that is no plain value is perhaps another one in the next call, as the clock is, and
        so is a state, unless it is the one from before.
        """
        self.check()
        self.seeded.discard(generator)
        plain = len(args) == 1 and not kwargs and type(args[0]) in (int, float, str, bytes)
        if plain and setter == "seed":
            self.seeded.add(generator)
        return original(*args, **kwargs)


def _setters() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Return the Python modules with functions that set a global generator, and their names."""
    numpy = sys.modules.get("numpy")
    setters: dict[str, tuple[Any, tuple[str, ...]]] = {"python": (random, ("seed", "setstate"))}
    if numpy is not None:
        setters["numpy"] = (numpy.random, ("seed", "set_state"))
    return setters
