"""The list of all habits: rows are functions that a decorator registers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["FILES", "Habit", "all_habits", "habit", "in_group"]

# The files of rows, in the order of the table's groups.
FILES = (
    "hooks",
    "functions",
    "attributes",
    "freezing",
    "derivatives",
    "precision",
    "weights",
    "optimizers",
    "calling",
    "inputs",
    "distributed",
    "libraries",
)

_habits: dict[str, Habit] = {}


@dataclass(frozen=True)
class Habit:
    """One row of the table.

    group: the title of its table. words: the habit, as a user would say it. run: the row. refused:
    whether it must be refused, so that to run through is a failure. needs: the libraries, and names
    of torch, without which the row cannot be run. extra: whether the libraries are no part of the
    environment of the tests.
    """

    group: str
    words: str
    run: Callable[[Any], None]
    refused: bool
    needs: tuple[str, ...]

    @property
    def missing(self) -> str:
        """The first thing that the row needs and that is not there, empty where all is."""
        return next((name for name in self.needs if not _is_there(name)), "")

    @property
    def versions(self) -> str:
        """The libraries that the row needs, with their versions: "peft 0.21.2"."""
        libraries = [name for name in self.needs if not name.startswith("torch.")]
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)


def _is_there(name: str) -> bool:
    """Return whether a library can be imported, or a dotted name of torch's exists."""
    owner, _, last = name.rpartition(".")
    if owner:
        return hasattr(import_module(owner), last)
    return importlib.util.find_spec(name) is not None


def in_group(group: str) -> Callable[..., Callable[[Callable[[Any], None]], Callable[[Any], None]]]:
    """Return a decorator like `habit` for the rows of one group."""

    def decorator(words: str, **options: Any) -> Callable[..., Any]:
        return habit(group, words, **options)

    return decorator


def habit(
    group: str, words: str, *, refused: bool = False, needs: tuple[str, ...] = ()
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register the function under it as a row; see `Habit`.

    Example: `@habit("Optimizers", "SGD with momentum")` above `def momentum(case): ...`.
    """

    def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
        if words in _habits:
            raise ValueError(f"two rows are called {words!r}")
        _habits[words] = Habit(group, words, run, refused, needs)
        return run

    return register


def all_habits() -> tuple[Habit, ...]:
    """Return the rows of all files, in their order."""
    for name in FILES:
        if importlib.util.find_spec(f"habits.{name}") is None: continue  # XXX
        import_module(f"habits.{name}")
    return tuple(_habits.values())
