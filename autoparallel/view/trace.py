"""A predicted step as a trace that Perfetto (ui.perfetto.dev) and Chrome's viewer can open."""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE, Timeline
from autoparallel.support.arguments import require_kind
from autoparallel.support.written_files import write_file

__all__ = ["trace_json", "write_trace"]

_MICRO = 1e6  # The format counts in microseconds.


def write_trace(timeline: Timeline, path: str | PathLike[str]) -> None:
    """Write the trace of a timeline to a file, the same text for the same timeline.

    path: of a JSON file, to be opened at ui.perfetto.dev. Raises AutoParallelError where no such
    file can be written, and where `timeline` is no Timeline.

    Example: write_trace(autoparallel.timeline(plan), "step.json")
    """
    require_kind(timeline, Timeline, "make one: autoparallel.timeline(plan)")
    write_file(path, trace_json(timeline).encode())


def trace_json(timeline: Timeline) -> str:
    """Return a timeline's events in the Trace Event Format: one process, a thread per stream.

    Times are in microseconds from the start of the step. Events of computing and of communicating
    are in threads of their own, because they overlap. Ranks with stages are processes of their own,
    below each other.

    Example: json.loads(trace_json(timeline))["traceEvents"]
    """
    streams = (COMPUTE, COMMUNICATION)
    places = sorted({event.place for event in timeline.events} | {0})
    rows: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": place, "tid": at, "args": {"name": stream}}
        for place in places
        for at, stream in enumerate(streams)
    ]
    if len(places) > 1:
        rows += [
            {"name": "process_name", "ph": "M", "pid": place, "args": {"name": f"pp {place}"}}
            for place in places
        ]
    rows += [
        {
            "name": event.name,
            "cat": event.phase,
            "ph": "X",
            "pid": event.place,
            "tid": streams.index(event.stream),
            "ts": event.start * _MICRO,
            "dur": event.seconds * _MICRO,
            "args": {"phase": event.phase},
        }
        for event in timeline.events
    ]
    trace = {"displayTimeUnit": "ms", "traceEvents": rows}
    return json.dumps(trace, indent=1) + "\n"
