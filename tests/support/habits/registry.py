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
    "copies",
    "optimizers",
    "calling",
    "inputs",
    "distributed",
    "libraries",
    "unseen",
    "exchanged",
)

# Libraries of the tests' environment: the project's own, and its extra `test`.
_TESTED = ("accelerate", "safetensors", "transformers")

_habits: dict[str, Habit] = {}


@dataclass(frozen=True)
class Habit:
    """One row of the table.

    group: the title of its table. words: the habit, as a user would say it. run: the row. refused:
    whether it must be refused, so that to run through is a failure. needs: the libraries, and names
    of torch, without which the row cannot be run.
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
    def extras(self) -> str:
        """The libraries it needs that the tests' environment lacks, with versions: "peft 0.21.2".

        Empty where it needs none, or where one of them is not there.
        """
        names = [name for name in self.needs if "." not in name and name not in _TESTED]
        if self.missing:
            return ""
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


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
        import_module(f"habits.{name}")
    return tuple(_habits.values())
