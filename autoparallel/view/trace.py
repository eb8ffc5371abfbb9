"""A predicted step, with a measured one beside it, as a trace that ui.perfetto.dev opens."""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE, Timeline
from autoparallel.support.arguments import require_kind
from autoparallel.support.written_files import write_file
from autoparallel.view.measured_step import MeasuredStep

__all__ = ["trace_json", "write_trace"]

_MICRO = 1e6  # The format counts in microseconds.
_STREAMS = (COMPUTE, COMMUNICATION)


def write_trace(
    timeline: Timeline, path: str | PathLike[str], *, measured: MeasuredStep | None = None
) -> None:
    """Write the trace of a timeline to a file, the same text for the same timeline.

    path: of a JSON file, to be opened at ui.perfetto.dev. measured: a step that ran, to lie below
    the predicted one, both from the same moment on. Raises AutoParallelError where no such file can
    be written, and where `timeline` is no Timeline or `measured` no MeasuredStep.

    Example: write_trace(autoparallel.timeline(plan), "step.json")
    """
    require_kind(timeline, Timeline, "make one: autoparallel.timeline(plan)")
    if measured is not None:
        require_kind(measured, MeasuredStep, "make one: autoparallel.measure_step(step)")
    write_file(path, trace_json(timeline, measured).encode())


def trace_json(timeline: Timeline, measured: MeasuredStep | None = None) -> str:
    """Return events in the Trace Event Format: a process for each step, a thread per stream.

    Times are in microseconds from the start of the step. Events of computing and of communicating
    are in threads of their own, because they overlap. Of a plan with stages every rank on their
    axis is a process. measured: as of `write_trace`.

    Example: json.loads(trace_json(timeline))["traceEvents"]
    """
    places = sorted({event.place for event in timeline.events} | {0})
    steps = [("predicted", timeline.events)]
    if len(places) > 1:
        steps = [
            (f"pp {place}", tuple(event for event in timeline.events if event.place == place))
            for place in places
        ]
    if measured is not None:
        steps.append((f"measured on {measured.device}", measured.named_like(timeline.events)))
    rows: list[dict[str, Any]] = []
    for process, (name, events) in enumerate(steps):
        if len(steps) > 1:
            rows.append(_named("process_name", process, 0, name))
        rows += [_named("thread_name", process, at, stream) for at, stream in enumerate(_STREAMS)]
        rows += [
            {
                "name": event.name,
                "cat": event.phase,
                "ph": "X",
                "pid": process,
                "tid": _STREAMS.index(event.stream),
                "ts": event.start * _MICRO,
                "dur": event.seconds * _MICRO,
                "args": {"phase": event.phase},
            }
            for event in events
        ]
    trace = {"displayTimeUnit": "ms", "traceEvents": rows}
    return json.dumps(trace, indent=1) + "\n"


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    """Return the row that gives a process or a thread its name."""
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
