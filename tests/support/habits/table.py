"""The table of habits as a document, and what a document says of each habit."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from textwrap import wrap

from .launch import Outcome
from .registry import Habit

__all__ = ["WORLD_SIZES", "cell", "cells", "document", "reason"]

WORLD_SIZES = (1, 2)
# The version of a library that a row was run with, after its words.
_VERSION = re.compile(r" \(with \S+ [^)]*\)$")

_CELLS = {
    "works": "works",
    "works as Python": "works as Python",
    "refused": "refused",
    "same error": "the same error",
    "wrong": "**wrong**",
    "error": "**fails**",
    "not run": "not run",
}
_HEAD = """# Compatibility

People have habits around `nn.Module`. Each row below is one, and was run with a module that
`autoparallel.autoparallelize` returned: in one process without a launcher, and in two (gloo).
Values, and afterwards every parameter, buffer and gradient, were compared with those of the unsplit
module, in float64 to a relative difference of 1e-9; in lower precision where the row says so.
Written by `make compatibility`, which exits with an error where a row is wrong or fails.

- works: everything is as with the unsplit module.
- works as Python: so it is, and the model, or the part of it that is named, is not split for it. A
  log message or the plan says so.
- refused: an error of the library says what, why, and what to do instead.
- the same error: the habit is a mistake, and the unsplit module raises this error, too.
- **wrong**: something is not as with the unsplit module, and nothing says so.
- **fails**: an error that is not the library's own says that it cannot be done.

Reasons stand below each table, in the words of the error or the log. A version after a habit is
that of a library which the tests do without.
"""


def cell(outcome: Outcome) -> str:
    """Return the text of an outcome in the table."""
    return _CELLS[outcome.kind]


def reason(outcome: Outcome) -> str:
    """Return what is told below the table of an outcome, on one line; empty if there is nothing."""
    if outcome.kind in ("works", "same error", "not run"):
        return ""
    text = f"`{_plain(outcome.message)}`"
    return f"{text}; fix: `{_plain(outcome.fix)}`" if outcome.fix else text


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _notes(habit: Habit, outcomes: Sequence[Outcome]) -> list[str]:
    """Return the reasons of a habit's outcomes as items of a list, one for those that are equal."""
    reasons = [reason(outcome) for outcome in outcomes]
    same = len(set(reasons)) == 1
    notes = []
    for world_size, text in list(zip(WORLD_SIZES, reasons, strict=True))[: 1 if same else None]:
        if text:
            ranks = "" if same else " (one rank)" if world_size == 1 else " (two ranks)"
            item = f"- {habit.words}{ranks}: {text}"
            broken = {"break_long_words": False, "break_on_hyphens": False}
            notes.append("\n".join(wrap(item, 100, subsequent_indent="  ", **broken)))
    return notes


def document(habits: Sequence[Habit], results: Mapping[int, Mapping[str, Outcome]]) -> str:
    """Return the document. results: what came of each habit, by its words, by world size."""
    libraries = {n for h in habits for n in h.needs if not n.startswith("torch.")}
    versions = {"torch": importlib.metadata.version("torch").partition("+")[0]}
    versions |= {
        name: importlib.metadata.version(name)
        for name in sorted(libraries)
        if not any(name in h.missing for h in habits if name in h.needs)
    }
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    counts = []
    for world_size in WORLD_SIZES:
        kinds = [cell(outcome) for outcome in results[world_size].values()]
        text = ", ".join(f"{kinds.count(c)} {c}" for c in _CELLS.values() if c in kinds)
        counts.append(f"{'One rank' if world_size == 1 else 'Two ranks'}: {text}.")
    ran = f"{len(habits)} habits, run with Python {platform.python_version()}, {known}."
    parts = [_HEAD, "\n".join(wrap(ran, 100)), *("\n".join(wrap(text, 100)) for text in counts)]
    for group in dict.fromkeys(habit.group for habit in habits):
        lines, notes = ["| habit | one rank | two ranks |", "|---|---|---|"], []
        for habit in habits:
            if habit.group == group:
                outcomes = [results[world_size][habit.words] for world_size in WORLD_SIZES]
                words = habit.words + (f" (with {habit.extras})" if habit.extras else "")
                lines.append(f"| {' | '.join([words, *map(cell, outcomes)])} |")
                notes += _notes(habit, outcomes)
        parts += [f"## {group}", "\n".join(lines)]
        parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(part.strip() for part in parts) + "\n"


def cells(text: str) -> dict[str, tuple[str, ...]]:
    """Return what a document says of each habit: the cells of its line, by the habit's words."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {_VERSION.sub("", words): tuple(rest) for words, *rest in rows if words != "habit"}
