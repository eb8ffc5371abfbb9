"""The two streams of a rank in a simulated step, and the ops that are made again on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE, Event
from autoparallel.plan import OpChoice, Plan

__all__ = ["GATHERED", "MOVED", "PIECES", "REDUCED", "Streams", "remaking"]

# What is waited for while nothing is computed: sums of products in pieces, moved gradients of
# activations, reduced gradients of parameters, gathered parameters. All other waits have no name.
PIECES, MOVED, REDUCED, GATHERED = "pieces", "moved", "reduced", "gathered"


@dataclass
class Streams:
    """Streams are both streams of a rank.

    events: of both. free: the time in seconds at which each is free. waited: seconds in which
    nothing is computed, by what is waited for.
    """

    events: list[Event] = field(default_factory=list)
    free: dict[str, float] = field(default_factory=lambda: {COMPUTE: 0.0, COMMUNICATION: 0.0})
    waited: dict[str, float] = field(default_factory=dict)

    def issue(self, stream: str, name: str, phase: str, seconds: float, ready: float) -> float:
        """Do something when its inputs are ready and the stream is free, and return its end, in
        seconds.
        """
        if seconds <= 0:
            return ready
        start = max(self.free[stream], ready)
        self.free[stream] = start + seconds
        self.events.append(Event(name, stream, phase, start, start + seconds))
        return start + seconds

    def wait(self, until: float, what: str = "") -> None:
        """Compute nothing before a time. what: is waited for."""
        idle = max(until - self.free[COMPUTE], 0.0)
        self.waited[what] = self.waited.get(what, 0.0) + idle
        self.free[COMPUTE] += idle


def remaking(plan: Plan) -> dict[str, list[OpChoice]]:
    """Return the ops that are made again by themselves, in order, by the op whose backward pass is
    the first to need them.
    """
    place = {op.name: index for index, op in enumerate(plan.ops)}
    remade, first = frozenset(plan.remade), dict.fromkeys(plan.remade, -1)
    readers: dict[str, list[str]] = {}
    for op in plan.ops if remade else ():
        for value in op.reads:
            readers.setdefault(value, []).append(op.name)
    for op in reversed(plan.ops):
        if op.name in remade:
            reading = (reader for value in op.makes for reader in readers.get(value, ()))
            # What is made of it may be made again before its own reader's backward pass.
            first[op.name] = max((first.get(name, place[name]) for name in reading), default=-1)
    needed: dict[str, list[OpChoice]] = {}
    for op in plan.ops:
        if op.name in remade and first[op.name] >= 0:
            needed.setdefault(plan.ops[first[op.name]].name, []).append(op)
    return needed
