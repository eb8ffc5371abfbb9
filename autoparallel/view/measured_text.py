"""A predicted step beside a measured one, as text: by phase, and the ops that differ most."""

from __future__ import annotations

from collections.abc import Iterable

from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE, Event, Timeline
from autoparallel.plan import Plan
from autoparallel.support.units import seconds_text
from autoparallel.view.measured_step import MeasuredStep

__all__ = ["measured_rows", "measured_text"]

_OPS = 10
_PHASES = ("forward", "recompute", "backward", "update")
_WEIGHT = " (weight)"


def measured_rows(
    plan: Plan, timeline: Timeline, measured: MeasuredStep
) -> list[tuple[str, float, float]]:
    """Return (name, predicted seconds, measured seconds) of each op, those furthest apart first.

    Both passes of an op are added up. An op that the program has in one line with the one that
    reads it, as a product with its bias, counts with that.

    Example: `measured_rows(plan, autoparallel.timeline(plan), measured)[0]`
    """
    lines = {_plain(event) for event in measured.events if event.stream == COMPUTE}
    reader = {value: op for op in reversed(plan.ops) for value in op.reads}
    ops = {op.name: op for op in plan.ops}

    def home(name: str) -> str:
        """Return the name of the line that an op is in."""
        op = ops.get(name)
        while op is not None and op.name not in lines and op.makes:
            op = reader.get(op.makes[0])
        return name if op is None else op.name

    predicted: dict[str, float] = {}
    for event in timeline.events:
        name = home(_plain(event)) if event.stream == COMPUTE else event.name
        predicted[name] = predicted.get(name, 0.0) + event.seconds
    took: dict[str, float] = {}
    for event in measured.named_like(timeline.events):
        name = _plain(event)
        took[name] = took.get(name, 0.0) + event.seconds
    names = dict.fromkeys([*took, *predicted])
    rows = [(name, predicted.get(name, 0.0), took.get(name, 0.0)) for name in names]
    return sorted(rows, key=lambda row: -abs(row[1] - row[2]))


def measured_text(plan: Plan, timeline: Timeline, measured: MeasuredStep) -> str:
    """Return both steps side by side, by phase and by op.

    Example: `print(measured_text(plan, autoparallel.timeline(plan), measured))`
    """
    table = [("", f"predicted for {plan.hardware}", f"measured on {measured.device}")]
    table.append(("step", *_both(timeline.seconds, measured.seconds)))
    for stream in (COMPUTE, COMMUNICATION):
        for phase in _PHASES:
            busy = _busy(timeline.events, stream, phase), measured.busy(stream, phase)
            if any(busy):
                verb = "computing" if stream == COMPUTE else "communicating"
                table.append((f"{verb}, {phase}", *_both(*busy)))
    rows = measured_rows(plan, timeline, measured)
    table.append(("", "", ""))
    table.append(("furthest apart", "", ""))
    table += [(name, *_both(one, other)) for name, one, other in rows[:_OPS]]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _busy(events: Iterable[Event], stream: str, phase: str) -> float:
    """Return the seconds of a stream's events in a phase."""
    return sum(e.seconds for e in events if e.stream == stream and e.phase == phase)


def _both(first: float, second: float) -> tuple[str, str]:
    """Return two times, "" for one that is nothing."""
    return seconds_text(first) if first else "", seconds_text(second) if second else ""


def _plain(event: Event) -> str:
    """Return the name of an event's op, that of its weight's gradient too."""
    return event.name.removesuffix(_WEIGHT)
