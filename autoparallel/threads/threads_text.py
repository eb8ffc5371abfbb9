"""Threads as a table of text."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from autoparallel.graph.graph import Sym
from autoparallel.threads.thread import Thread, Treatment

__all__ = ["Group", "grouped", "threads_text"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

# A group: threads of one name and size, one in each of the repeated modules of one place.
Group = tuple[Thread, ...]


def grouped(threads: Sequence[Thread]) -> tuple[Group, ...]:
    """Return the threads in groups, those of repeated modules together, in the program's order."""
    groups: dict[Hashable, list[Thread]] = {}
    for thread in threads:
        key = (thread.name, str(thread.size), _NUMBER.sub("*", thread.where))
        groups.setdefault(key, []).append(thread)
    return tuple(tuple(group) for group in groups.values())


def threads_text(threads: Sequence[Thread]) -> str:
    """Return a table: each thread, its size, where it begins, what happens to it, in what module.

    Threads that repeated modules have each for themselves are one row, with their number.

    >>> from autoparallel.threads.thread import Birth
    >>> birth = Birth("input", "tokens", "input_ids", 0)
    >>> print(threads_text([Thread(0, "batch", 4, "", (birth,), (), ())]))
    thread  size  begins at          on its way  a split of it takes  in
    batch   4     input input_ids.0              nothing
    """
    rows = [("thread", "size", "begins at", "on its way", "a split of it takes", "in")]
    for group in grouped(threads):
        first = group[0]
        name = first.name + (f" × {len(group)}" if len(group) > 1 else "")
        where = _NUMBER.sub("*", first.where) if len(group) > 1 else first.where
        rows.append((name, _size(first), _begins(first), _way(first), _takes(first), where))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def _size(thread: Thread) -> str:
    """Return the size; of one that follows from the inputs' sizes, the example's and the form."""
    size = thread.size
    return f"{size.hint} ({size})" if isinstance(size, Sym) else str(size)


def _begins(thread: Thread) -> str:
    """Tell where a thread begins: the first place, and how many more there are."""
    if not thread.births:
        return ""
    first = thread.births[0]
    more = f", {len(thread.births) - 1} more" if len(thread.births) > 1 else ""
    return f"{first.kind} {first.path}.{first.dim}{more}"


def _way(thread: Thread) -> str:
    """Count what calls do with a thread."""
    counted: dict[str, int] = {}
    for passage in thread.passages:
        word = passage.treatment.value
        counted[word] = counted.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in counted.items())


def _takes(thread: Thread) -> str:
    """Say what a split of the thread takes, forward and backward."""
    whole = thread.treated(Treatment.WHOLE)
    kernels = thread.treated(Treatment.KERNEL)
    sums = len(thread.treated(Treatment.SUMMED))
    if whole:
        calls = _calls([passage.call for passage in whole])
        return (
            f"cannot pass {calls}, which need all of it"
            if len(whole) > 1
            else (f"cannot pass {calls}, which needs all of it")
        )
    backward = len({value for passage in thread.passages for value in passage.gradients})
    parts = [f"{sums} sum{'s' if sums > 1 else ''} forward"] if sums else []
    parts += [f"{backward} backward"] if backward else []
    parts += [f"kernels: {', '.join(dict.fromkeys(p.kernel for p in kernels))}"] if kernels else []
    return ", ".join(parts) or "nothing"


def _calls(names: Sequence[str]) -> str:
    """List calls: the first two, and the number of the others."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
