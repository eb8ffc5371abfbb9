"""A predicted step as a trace that Perfetto (ui.perfetto.dev) and Chrome's viewer open."""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE, Timeline
from autoparallel.support.arguments import require_kind
from autoparallel.support.written_files import write_file

__all__ = ["trace_json", "write_trace"]

_MICRO = 1e6


def write_trace(timeline: Timeline, path: str | PathLike[str]) -> None:
    """Write the trace, the same text for the same timeline.

    Raises AutoParallelError where no such file can be written.
    """
    require_kind(timeline, Timeline, "make one: autoparallel.timeline(plan)")
    write_file(path, trace_json(timeline).encode())


def trace_json(timeline: Timeline) -> str:
    """The events in the Trace Event Format: one process, a thread per stream, microseconds."""
    streams = (COMPUTE, COMMUNICATION)
    rows: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": at, "args": {"name": stream}}
        for at, stream in enumerate(streams)
    ]
    rows += [
        {
            "name": event.name,
            "cat": event.phase,
            "ph": "X",
            "pid": 0,
            "tid": streams.index(event.stream),
            "ts": event.start * _MICRO,
            "dur": event.seconds * _MICRO,
            "args": {"phase": event.phase},
        }
        for event in timeline.events
    ]
    trace = {"displayTimeUnit": "ms", "traceEvents": rows}
    return json.dumps(trace, indent=1) + "\n"
