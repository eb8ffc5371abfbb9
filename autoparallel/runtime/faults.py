"""Faults between ranks: a rank that fails says so where the others find it.

The library that communicates tells a rank no more than that a connection was closed, or that time
is over. Here each rank that fails leaves a note in the store through which the process group met,
and each that waited in vain reads the notes of the others: its error names the rank that came
first, what happened there, and the collective and the op of the model in which this one waited.
Nothing of it runs before something has failed.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from autoparallel.errors import AutoParallelError
from autoparallel.support.torch_private import default_store

__all__ = [
    "explained",
    "forget_note",
    "is_lost",
    "leave_note",
    "note_failure",
    "note_uncaught",
    "place_of_caller",
    "programs",
    "tell_place",
]

# What gloo and NCCL say where a rank does not answer.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Timeout waiting for",
    "remote process exited",
    "pair closure",
)
# How long a rank that waited in vain waits for the notes of others. Those that waited with it leave
# theirs at about the same time.
_PATIENCE_SECONDS = 2.0
_RECENT_SECONDS = 20.0
_EMITTED = "<autoparallel "
_MARK = "autoparallel: "
# Python that waits for other ranks outside of emitted programs, by the names of its functions.
_PLACES = {
    "CallHeaders.compare": "before a call, where the ranks compare how it was made",
    "GradientBucket._finish": "at the end of the backward pass, where gradients are reduced",
    "GradientReturn.bring": "in the backward pass, where the gradient of a parameter is reduced",
    "refresh": "before a call, where parameters are gathered",
}
# With a separator: a folder whose name only begins so (torchvision) is another one.
_HERE = str(Path(__file__).parents[1]) + os.sep
_FOREIGN = (_HERE, str(Path(torch.__file__).parent) + os.sep, "<")

# Emitted programs by the file name in tracebacks. Each has `label(line)`: what a line computes, in
# the words of the model, empty where that is not known.
programs: WeakValueDictionary[str, Any] = WeakValueDictionary()


def is_lost(error: BaseException) -> bool:
    """Return whether an error of a collective says that another rank does not answer.

    >>> is_lost(RuntimeError("Connection closed by peer [127.0.0.1]:3")), is_lost(ValueError("no"))
    (True, False)
    """
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def place_of_caller(depth: int) -> tuple[CodeType, int]:
    """Return where an emitted program is: its code, and the instruction.

    depth: the frames between it and the caller; a few more, which releases of torch differ in, are
    looked through. The line is looked
    up when it is asked for, because that takes longer in long functions.
    """
    frame = sys._getframe(depth + 1)
    for _ in range(4):
        if frame.f_back is None or frame.f_code.co_filename.startswith("<"):
            break
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


@dataclass(frozen=True)
class _Note:
    """A note of one rank. own: whether it failed by itself, or waited in vain for another."""

    rank: int
    seconds: float
    text: str
    own: bool


class _Left:
    """Remembers whether this rank has left a note that still holds."""

    now = False


def _key(rank: int) -> str:
    return f"autoparallel/fault/{rank}"


def leave_note(text: str, own: bool = True) -> None:
    """Tell the other ranks what happened on this one. own: not for want of another rank.

    Nothing happens where there are none, or where the store is gone.
    """
    with contextlib.suppress(Exception):
        if dist.is_initialized() and dist.get_world_size() > 1:
            rows = {"seconds": time.time(), "text": text, "own": own}
            default_store().set(_key(dist.get_rank()), json.dumps(rows))
            _Left.now = True


def forget_note() -> None:
    """Take back a note of this rank: it has gone on, in step with the others.

    >>> forget_note()  # there is none
    """
    if _Left.now:
        _Left.now = False
        with contextlib.suppress(Exception):
            default_store().delete_key(_key(dist.get_rank()))


def _notes(wanted: Iterable[int]) -> tuple[list[_Note], str]:
    """Return the notes of the other ranks, oldest first, and why there are none, if so.

    wanted: ranks whose notes are waited for, for a while.
    """
    here, found = dist.get_rank(), {}
    waiting = set(wanted) - {here}
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        store = default_store()
        others = [rank for rank in range(dist.get_world_size()) if rank != here]
        while True:
            for rank in others:
                if rank not in found and store.check([_key(rank)]):
                    note = _Note(rank, **json.loads(store.get(_key(rank))))
                    if note.own or time.time() - note.seconds < _RECENT_SECONDS:
                        found[rank] = note
            if waiting <= set(found) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
    except (RuntimeError, ValueError):
        return [], "the store of the process group is gone, with the process that held it"
    return sorted(found.values(), key=lambda note: note.seconds), ""


def explained(error: BaseException, collective: str, group: Any = None) -> AutoParallelError:
    """Return the error of a rank that waited in vain for another.

    error: of the library that communicates. collective: its name, empty where that is not known.
    group: torch's process group, all ranks by default.
    """
    here = dist.get_rank()
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    where = f"rank {here}, " + (
        f"{collective} of ranks {', '.join(map(str, ranks))}" if collective else "in a collective"
    )
    place = tell_place(sys._getframe(1))
    where += f", {place}" if place else ""
    leave_note(f"waited for others, {where.partition(', ')[2]}", own=False)
    notes, gone = _notes(ranks)
    failed = [note for note in notes if note.own]
    silent = sorted(set(ranks) - {here} - {note.rank for note in notes})
    if failed:
        what = f"rank {failed[0].rank} has failed, and this one waited for it"
    elif silent and not gone:
        many = "s" if len(silent) > 1 else ""
        what = f"this rank waited, and rank{many} {', '.join(map(str, silent))} did not answer"
    elif notes:
        what = "the ranks wait for each other at different places"
    else:
        what = "another rank has ended, failed or gone another way, and this one waited for it"
    reasons = [
        f"rank {note.rank}, {max(0.0, time.time() - note.seconds):.1f} s ago: {note.text}"
        for note in notes
    ]
    if silent and not gone:
        reasons.append(
            f"no word from {', '.join(map(str, silent))}: ended without an error of Python "
            "(killed, out of memory), still waiting, or at work elsewhere"
        )
    reasons += [gone] if gone else []
    reasons.append(str(error).splitlines()[0])
    return AutoParallelError(
        what,
        where=where,
        why="\n".join(reasons),
        fix="see the rank that failed first; where a step may fail, as for bad inputs or too "
        "little memory, let it fail or be caught on all ranks alike",
    )


def _line(code: CodeType, instruction: int) -> int:
    """Return the number of the line that an instruction belongs to."""
    for start, end, line in code.co_lines():
        if start <= instruction < end and line is not None:
            return line
    return code.co_firstlineno


def _statement(code: CodeType, instruction: int) -> str:
    """Return a line of an emitted program, and what it is in the model; empty for other code."""
    if not code.co_filename.startswith(_EMITTED):
        return ""
    text = linecache.getline(code.co_filename, _line(code, instruction)).strip()
    program = programs.get(code.co_filename)
    label = program.label(text) if program is not None else ""
    return f"`{text}`" + (f" ({label})" if label else "")


def tell_place(frame: FrameType | None) -> str:
    """Return where in the model, and in the user's script, a frame is; empty if that is unknown."""
    place, backward, script = "", "", ""
    while frame is not None and not script:
        code = frame.f_code
        if not place:
            place = _statement(code, frame.f_lasti) or _PLACES.get(code.co_qualname, "")
        if not place and not backward and code.co_name == "backward" and "ctx" in frame.f_locals:
            ctx = frame.f_locals["ctx"]
            made = getattr(ctx, "place", None)
            backward = (
                f"in the backward pass of {(made and _statement(*made)) or type(ctx).__name__}"
            )
        if not code.co_filename.startswith(_FOREIGN):
            script = f"called at {Path(code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    place = backward if backward else f"in {place}" if place.startswith("`") else place
    return ", ".join(text for text in (place, script) if text)


def _of_error(error: BaseException) -> str:
    """Return an error in a few words: its kind, its first line, and the script's line."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0][:300]}"
    if isinstance(error, AutoParallelError):
        return text + (f", {error.where}" if error.where else "")
    places = [
        f"{Path(row.filename).name}:{row.lineno}"
        for row in traceback.extract_tb(error.__traceback__)
        if not row.filename.startswith(_FOREIGN)
    ]
    text += f", at {places[-1]}" if places else ""
    marked = [note for note in getattr(error, "__notes__", ()) if note.startswith(_MARK)]
    return text + "".join(f", {note.removeprefix(_MARK)}" for note in marked)


def note_failure(error: BaseException) -> None:
    """Say in an error of an emitted program which op of the model it is, and tell the others.

    The error stays what it is: torch's own, as of the unsplit model.
    """
    trace: TracebackType | None = error.__traceback__
    statement = ""
    while trace is not None:
        statement = _statement(trace.tb_frame.f_code, trace.tb_lasti) or statement
        trace = trace.tb_next
    if statement and not isinstance(error, AutoParallelError):
        error.add_note(f"{_MARK}in {statement}")
    if not isinstance(error, AutoParallelError) or not _waited(error):
        leave_note(_of_error(error))


def _waited(error: AutoParallelError) -> bool:
    """Return whether an error is that of a rank that waited for another."""
    return is_lost(RuntimeError(error.why))


def note_uncaught() -> None:
    """Have an error that ends this process be told to the other ranks, and explained if it says no
    more than that another rank is gone. Only the first of these calls does something.
    """
    if getattr(sys.excepthook, "_autoparallel", False):
        return
    before = sys.excepthook

    def tell(kind: Any, error: BaseException, trace: Any) -> None:
        lost = is_lost(error)
        reason = None
        if lost and dist.is_initialized():
            with contextlib.suppress(Exception):
                reason = explained(error, "")
        elif not (isinstance(error, AutoParallelError) and _waited(error)):
            leave_note(_of_error(error))
        before(kind, error, trace)
        if reason is not None:
            sys.stderr.write(f"autoparallel: {reason}\n")

    tell._autoparallel = True  # type: ignore[attr-defined]
    sys.excepthook = tell
