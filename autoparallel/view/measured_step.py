"""A step of training as it ran: PyTorch's profile of it, told by the ops of the plan.

The profiler knows kernels; the plan knows ops. A split module runs a program of one line for each
op, and while a step is measured, and only then, Python's own line tracing marks where each line
begins. What autograd runs later has the number of the call that it belongs to, and so the line.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE, Event
from autoparallel.errors import AutoParallelError
from autoparallel.rewrite.program import PROGRAM_FILES

__all__ = ["MeasuredStep", "measure_step"]

_LINE = "autoparallel: "  # before the text of a line, as a range of the profile
_BACKWARD = "autograd::engine::evaluate_function: "
_UPDATE = "Optimizer.step#"
_LAUNCH = re.compile(r"_c10d_functional::(\w+?)(?:_into_tensor|_tensor|_single)?(?:_out)?_?")
_RUN = re.compile(r"(?:gloo|nccl|mpi|ucc):")
# A line that computes: names, and a call; sizes and what the program is given are none.
_TARGETS = re.compile(r"\[?([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*)\]? = (?!\w+\.size\()(.*\(.*)")
# A redistribution in a program, by itself or joined with the product before or after it: what is
# moved, along which axis, and the number of the gap that it leaves.
_MOVED = re.compile(
    r"(?:\w+\.)?(convert|move|begin|convert_again|convert_filled|convert_then_\w+)"
    r"\((\w+), (\w+), "
    r".*?(?:, (\d+))?\)$"
)
_THEN_MOVED = re.compile(r"(?:\w+\.)?\w+_then_convert\(\w+, \w+, (\w+), ")
# The end of one that was begun ahead: it is called VALUE_over_AXIS until then.
_ENDED = re.compile(r"end(?:_again)?\((\w+)_over_(\w+?)_*(?:, .*)?\)$")
_GAP = re.compile(r"\bgap=(\d+)")
# Gradients of weights run in gaps that others leave, under the numbers of those.
_OF_WEIGHTS = "_WeightGradientBackward"


@dataclass(frozen=True)
class MeasuredStep:
    """A step as it ran on this process, event by event, as `Timeline` has a predicted one.

    seconds: from its first event to the end of its last. device: where it ran. events: those of
    computing are lines of the program, forward and in the backward pass; those of communicating are
    collectives, from their call until they are done.
    """

    seconds: float
    device: str
    events: tuple[Event, ...]

    def named_like(self, predicted: Iterable[Event]) -> tuple[Event, ...]:
        """Return the events with the names that a prediction has: on a mesh of one axis it does not
        say which.
        """
        names = {event.name for event in predicted}
        told = []
        for event in self.events:
            short = event.name.rpartition(" on ")[0]
            told.append(replace(event, name=short) if short in names else event)
        return tuple(told)

    def busy(self, stream: str, phase: str = "") -> float:
        """Return the seconds of a stream's events, those of one phase or of all."""
        return sum(
            event.seconds
            for event in self.events
            if event.stream == stream and phase in ("", event.phase)
        )


def measure_step(step: Callable[[], object], *, warmups: int = 2) -> MeasuredStep:
    """Run a step of training, and return what took how long, by the names that the plan has.

    step: runs the split module forward and backward, and updates if that is to be measured; all
    ranks must call it. warmups: calls before the one that is measured. Put the result beside the
    prediction: `write_trace(timeline(plan), "step.json", measured=...)`. Times are those of this
    process's calls: on a GPU set CUDA_LAUNCH_BLOCKING=1, or a call ends before its kernel does.

        >>> import autoparallel, torch
        >>> layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 8))
        >>> model = autoparallel.autoparallelize(layers, 1, example_inputs=torch.ones(4, 8))
        >>> step = measure_step(lambda: model(torch.ones(4, 8)).sum().backward())
        >>> [event.name for event in step.events if event.phase == "forward"]
        ['linear', 'linear_1']

    Raises AutoParallelError where no split module ran in the step.
    """
    for _ in range(warmups):
        step()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler, _marked_lines():
        step()
    events = list(profiler.events() or ())
    read = _Profile(events)
    if not read.lines:
        raise AutoParallelError(
            "no program of a split module ran in the step",
            why="a step is told by the lines of the programs that split modules run",
            fix="call a module that autoparallelize or apply_plan returned, and not a compiled one",
        )
    return read.step()


@contextmanager
def _marked_lines() -> Iterator[None]:
    """Mark in the profile which line of a program runs, while the context lasts."""
    before, open_ranges = sys.gettrace(), list[Any]()

    def close() -> None:
        while open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        """Begin the range of a line where the one before ends."""
        close()
        if event == "line":
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if _TARGETS.fullmatch(text):
                mark = record_function(_LINE + text)
                mark.__enter__()
                open_ranges.append(mark)
        return inside

    def called(frame: FrameType, _: str, __: Any) -> Any:
        return inside if frame.f_code.co_filename.startswith(PROGRAM_FILES) else None

    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(before)
        close()


@dataclass(frozen=True)
class _Line:
    """A line of a program that ran, between two times in microseconds.

    name: of the op; "" of a move alone. backward: the name of what autograd runs of it, "" for a
    move, whose collective is told. moved, axis: the value that is redistributed, and along which
    axis. gap, number: of those that a line leaves to gradients of weights, and of those that it
    fills.
    """

    name: str
    backward: str
    moved: str
    axis: str
    number: str
    gap: str
    start: float
    end: float
    thread: int


class _Profile:
    """The events of a profile, and the lines, calls and collectives that are among them."""

    def __init__(self, events: list[Any]) -> None:
        self.events = sorted(events, key=lambda event: event.time_range.start)
        self.lines = [_line(one) for one in self.events if one.name.startswith(_LINE)]
        # A call that needs no gradient has the number of the next one that does: the last counts.
        self.of_call: dict[int, _Line] = {}
        for one in self.events:
            if one.sequence_nr >= 0 and one.scope == 0 and not one.name.startswith(_BACKWARD):
                around = self.line_at(one)
                if around is not None:
                    self.of_call[one.sequence_nr] = around
        self.waiting: dict[str, list[_Line]] = {}
        for each in self.lines:
            if each.gap:
                self.waiting.setdefault(each.gap, []).append(each)
        self.backward = [one for one in self.events if one.name.startswith(_BACKWARD)]
        self.updates = [one for one in self.events if one.name.startswith(_UPDATE)]

    def line_at(self, event: Any) -> _Line | None:
        """Return the line that an event of the same thread is in."""
        at = event.time_range.start
        return next(
            (
                line
                for line in reversed(self.lines)
                if line.start <= at <= line.end and line.thread == event.thread
            ),
            None,
        )

    def step(self) -> MeasuredStep:
        """Return the events by name, stream and phase, in seconds since the first began."""
        rows = [*self.computed(), *self.communicated()]
        first = min(start for _, _, _, start, _ in rows)
        events = tuple(
            Event(name, stream, phase, (start - first) / 1e6, (end - first) / 1e6)
            for name, stream, phase, start, end in sorted(rows, key=lambda row: row[3])
        )
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return MeasuredStep(max(event.end for event in events), device, events)

    def computed(self) -> Iterable[tuple[str, str, str, float, float]]:
        """Yield what the process computed: lines, what autograd ran of them, and updates."""
        for line in self.lines:
            if line.name:
                again = _within(self.backward, line.start) is not None
                yield line.name, COMPUTE, "recompute" if again else "forward", line.start, line.end
        for one in self.backward:
            named = self.backward_name(one)
            if named:
                yield named, COMPUTE, "backward", one.time_range.start, one.time_range.end
        for one in self.updates:
            yield "optimizer", COMPUTE, "update", one.time_range.start, one.time_range.end

    def backward_name(self, event: Any) -> str:
        """Return the name of what autograd runs; "" for a move, whose collective is told."""
        line = self.of_call.get(event.sequence_nr)
        if event.name.endswith(_OF_WEIGHTS):
            filled = self.waiting.get(line.number if line is not None else "", [])
            return f"{filled.pop().name} (weight)" if filled else "gradients of weights"
        if line is None:
            return "gradients of parameters"
        return line.backward

    def communicated(self) -> Iterable[tuple[str, str, str, float, float]]:
        """Yield the collectives, from their call until they are done."""
        launched = [
            (one, match)
            for one in self.events
            if (match := _LAUNCH.fullmatch(one.name)) and match[1] != "wait"
        ]
        ran = [one for one in self.events if _RUN.match(one.name)]
        for place, (one, match) in enumerate(launched):
            start, end = one.time_range.start, one.time_range.end
            # Backends run collectives on threads of their own, in the order of the calls.
            if len(ran) == len(launched):
                end = max(end, ran[place].time_range.end)
            line, phase = self.line_at(one), "forward"
            around = _within(self.backward, start)
            if _within(self.updates, start) is not None:
                line, phase = None, "update"
            elif around is not None:
                line, phase = self.of_call.get(around.sequence_nr), "backward"
            elif line is None and self.backward and self.backward[0].time_range.start < start:
                phase = "backward"  # what is left of the gradients, when autograd is done
            told = f"of {line.moved} on {line.axis}" if line and line.axis else ""
            rest = "of gradients" if phase == "backward" else "of what the program does not tell"
            # What a kernel communicates inside of an op is computing, in a prediction.
            what = told or (f"inside of {line.name}" if line else rest)
            yield f"{_kind(match[1])} {what}", COMMUNICATION, phase, start, end


def _line(event: Any) -> _Line:
    """Return the line that a range of the profile marks."""
    text = event.name.removeprefix(_LINE)
    match = _TARGETS.fullmatch(text)
    assert match is not None
    names, does = match[1].split(", "), match[2]
    name = names[0].removesuffix("_0") if len(names) > 1 else names[0]
    backward, value, axis, number = name, "", "", ""
    if moved := _MOVED.match(does):
        value, axis, number = moved[2], moved[3], moved[4] or ""
        if "_then_" not in moved[1]:
            # What fills a gap is computed by the node that leaves it.
            backward = f"gradients of weights beside {value}" if "filled" in moved[1] else ""
            name = ""
    elif moved := _ENDED.match(does):
        name, value, axis = "", moved[1], moved[2]
        backward = name
    elif moved := _THEN_MOVED.match(does):
        # The result is called VALUE_PLACEMENT.
        name = backward = value = name.rpartition("_")[0]
        axis = moved[1]
    gap = _GAP.search(does)
    span = event.time_range
    return _Line(
        name,
        backward,
        value,
        axis,
        number,
        gap[1] if gap else "",
        span.start,
        span.end,
        event.thread,
    )


def _within(events: list[Any], at: float) -> Any | None:
    """Return the event during which a time is."""
    return next((one for one in events if one.time_range.start <= at <= one.time_range.end), None)


_KINDS: Mapping[str, str] = {
    "all_reduce": "all-reduce",
    "all_reduce_coalesced": "all-reduce",
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
    "reduce_scatter": "reduce-scatter",
}


def _kind(name: str) -> str:
    """Return a collective as plans call it."""
    return _KINDS.get(name, name.replace("_", "-"))
