"""The list of all rows: functions that a decorator registers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

__all__ = ["GOOD", "Row", "all_rows", "note", "row"]

# The files of rows, in the order of the table.
FILES = ("plans", "files", "programs", "numbers", "planning", "ranks")
# All that may become of what is tried.
GOOD = frozenset(
    [
        "at most a quarter worse than unsplit",
        "equal",
        "flat",
        "found anew",
        "left as it was",
        "read",
        "refused",
        "right",
        "runs as Python",
        "said",
        "the plan of one thread",
        "the same rule",
        "told",
        "within 5 sigma",
    ]
)
Run = Callable[[random.Random, int], "Counter[str]"]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    what: was tried. run: tries it, with random numbers and about so many times, and counts what
    happened. share: it is tried once where quick things are tried so often. least: how often it is
    tried at least.
    """

    what: str
    run: Run
    share: int
    least: int

    def tried(self, count: int, seed: int) -> Counter[str]:
        """Return what happened. count: how often quick things are tried."""
        return self.run(random.Random(f"{seed} {self.what}"), max(self.least, count // self.share))


_rows: dict[str, Row] = {}


def row(what: str, *, share: int = 1, least: int = 1) -> Callable[[Run], Run]:
    """Register the function under it as a row; see `Row`.

    Example: `@row("one bit flipped in a file of a checkpoint", share=2)`.
    """

    def register(run: Run) -> Run:
        if what in _rows:
            raise ValueError(f"two rows are called {what!r}")
        _rows[what] = Row(what, run, share, least)
        return run

    return register


def all_rows() -> tuple[Row, ...]:
    """Return the rows of all files, in their order."""
    for name in FILES:
        import_module(f"safety.{name}")
    # Another test may have brought one of the files before.
    order = {f"safety.{name}": at for at, name in enumerate(FILES)}
    return tuple(sorted(_rows.values(), key=lambda row: order[row.run.__module__]))


def note(counts: Counter[str], work: Callable[[], str]) -> None:
    """Do something, and count what it returns, or the error that is none of the project's."""
    try:
        counts[work()] += 1
    except Exception as error:
        counts[f"{type(error).__name__}: {error}".splitlines()[0][:120]] += 1
