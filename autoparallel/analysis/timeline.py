"""One step of training as it runs: a stream that computes beside one that communicates.

The planner adds up seconds; here work that does not wait for other work overlaps with it. Each
stream does one thing after the other, in the order in which they are issued. A redistribution is
issued when its value is made, and only its readers wait. Parameters that are gathered for use are
gathered one block ahead, forward and backward. Gradients of parameters are reduced beside the rest
of the backward pass. A kernel's collectives, inside of an op, count as computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from autoparallel.analysis.communication import Transfer, moves
from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE, Event, Timeline
from autoparallel.cost.collective_times import movement_seconds
from autoparallel.cost.hardware import Hardware, find_hardware, presets
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Sym, numel_hint
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.placement import Layout, Movement
from autoparallel.plan import Conversion, OpChoice, Plan
from autoparallel.support.arguments import MAKE_ONE, require_kind

__all__ = [
    "BUCKET_NBYTES",
    "timeline",
]

# torch's DistributedDataParallel reduces so many bytes at a time (bucket_cap_mb=25).
BUCKET_NBYTES = 25 * 2**20

_Key = tuple[str, Layout]


def timeline(
    plan: Plan,
    *,
    hardware: Hardware | str | None = None,
    bucket_nbytes: int | None = BUCKET_NBYTES,
) -> Timeline:
    """Return the predicted timeline of one step.

    hardware: to run on, also by name or file; by default that of the plan. bucket_nbytes: gradients
    that are only to be summed are reduced in calls of at least so many bytes, as they become ready;
    None reduces them in one call when the backward pass has ended, as the emitted module does.

    Example: `print(timeline(plan, hardware="dgx-h100"))`
    """
    require_kind(plan, Plan, MAKE_ONE)
    if hardware is None:
        # A plan knows its hardware by name, and that of a file by the file.
        is_preset = plan.hardware in presets()
        hardware = plan.hardware if is_preset else plan.options.hardware
    return _Simulation(plan, find_hardware(hardware), bucket_nbytes).run()


@dataclass
class _Streams:
    """Both streams: their events, and the time in seconds at which each is free."""

    events: list[Event] = field(default_factory=list)
    free: dict[str, float] = field(default_factory=lambda: {COMPUTE: 0.0, COMMUNICATION: 0.0})

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


class _Simulation:
    """The state of simulating one step.

    group: per op, the number of its block. moves: of each redistribution, by phase and whether it
    is repeated. of_value: redistributions by the value, if an op makes it. gathered, remade: those
    issued ahead of a block, forward and backward. first: by the reader that is first. ready,
    gradient, arrived: seconds at which values, their gradients where they are made, and where they
    are read, are there. waiting: bytes that gradient buckets hold, by axis and collective.
    """

    def __init__(self, plan: Plan, hardware: Hardware, bucket_nbytes: int | None) -> None:
        self.plan, self.hardware, self.bucket_nbytes = plan, hardware, bucket_nbytes
        self.pace = hardware.at_pace_of(plan.world_size)
        self.sizes = tuple(size for _, size in plan.mesh.axes)
        self.links = hardware.links(self.sizes)
        self.streams = _Streams()
        self.place = {op.name: index for index, op in enumerate(plan.ops)}
        self.group = _groups(plan.ops)
        self.region = {n: at for at, names in enumerate(plan.recomputed) for n in names}
        self.parameters = {parameter.name for parameter in plan.parameters}
        self.moves: dict[tuple[_Key, str, bool], list[Transfer]] = {}
        for move in moves(plan):
            key = (move.conversion.value, move.conversion.target)
            self.moves.setdefault((key, move.phase, move.again), []).append(move)
        self.of_value: dict[str, list[Conversion]] = {}
        # Values that are moved ahead of the group of ops that reads them first, in either pass.
        self.gathered: dict[int, list[Conversion]] = {}
        self.remade: dict[int, list[Conversion]] = {}
        self.first: dict[str, list[Conversion]] = {}  # by the reader that is first
        maker = {value: op.name for op in plan.ops for value in op.makes}
        for conversion in plan.conversions:
            readers = [self.place[name] for name in conversion.readers if name in self.place]
            if readers:
                self.first.setdefault(plan.ops[min(readers)].name, []).append(conversion)
            if conversion.value in maker:
                self.of_value.setdefault(conversion.value, []).append(conversion)
            elif readers:
                self.gathered.setdefault(self.group[min(readers)], []).append(conversion)
            # Copies of a region's own values are recomputed with the region; others are fetched
            # ahead.
            if readers and maker.get(conversion.value) not in self.region:
                self.remade.setdefault(self.group[max(readers)], []).append(conversion)
        self.ready: dict[_Key, float] = {}  # values, as they are read
        self.gradient: dict[str, float] = {}  # gradients of values, as they are made
        self.arrived: dict[_Key, float] = {}  # gradients of values, as they are read
        self.waiting: dict[tuple[int, Movement], float] = {}  # bytes to be summed

    def run(self) -> Timeline:
        """Simulate the forward pass, the backward pass and the update."""
        self.forward()
        forward = self.streams.free[COMPUTE]
        self.backward()
        backward = max(self.streams.free[COMPUTE], forward)
        self.update()
        plan = self.plan
        # Backward takes two products for each forward one: 3 times the forward FLOPs in all.
        return Timeline(
            seconds=max(self.streams.free.values()),
            forward_seconds=forward,
            backward_seconds=backward - forward,
            events=tuple(self.streams.events),
            tokens=_tokens(plan),
            flops=3 * sum(op.whole_flops for op in plan.ops),
            peak=self.hardware.peak(_itemsize(plan)) * plan.world_size,
            ranks=plan.world_size,
        )

    # -- forward

    def forward(self) -> None:
        """Run the ops in their order, each when all that it reads is there."""
        last = -1
        self.prefetch(0, "forward", again=False)
        for index, op in enumerate(self.plan.ops):
            if self.group[index] != last:
                last = self.group[index]
                self.prefetch(last + 1, "forward", again=False)
            self.run_op(op, "forward", again=False)

    def prefetch(self, group: int, phase: str, again: bool) -> None:
        """Issue the redistributions that a group of ops reads and that wait for no op: gathered
        parameters.
        """
        for conversion in (self.remade if again else self.gathered).get(group, ()):
            self.convert(conversion, phase, again, self.streams.free[COMPUTE])

    def convert(self, conversion: Conversion, phase: str, again: bool, ready: float) -> None:
        """Move a value to the layout that its readers read."""
        key = (conversion.value, conversion.target)
        for move in self.moves.get((key, "backward" if again else "forward", again), ()):
            ready = self.issue(move, phase, ready)
        if not again or self.moves.get((key, "backward", True)):
            self.ready[key] = ready

    def issue(self, move: Transfer, phase: str, ready: float) -> float:
        """Issue one move, on the links or in memory, and return its end."""
        axis = move.step.axis
        seconds = movement_seconds(
            move.movement, move.nbytes, self.pace, self.links[axis], self.sizes[axis]
        )
        name = self.name_of(move.movement, move.conversion.value, axis)
        stream = COMPUTE if move.movement.collective is None else COMMUNICATION
        return self.streams.issue(stream, name, phase, seconds, ready)

    def name_of(self, movement: Movement, moved: str, axis: int) -> str:
        """Return the name of a move's event: "all-reduce of gradients on dp"."""
        where = f" on {self.plan.mesh.axes[axis][0]}" if len(self.sizes) > 1 else ""
        return f"{movement.value.replace('_', '-')} of {moved}{where}"

    def run_op(self, op: OpChoice, phase: str, again: bool) -> None:
        """Run an op's forward pass, and the moves that bring its results to their readers."""
        ready = self.inputs(op)
        end = self.streams.issue(COMPUTE, op.name, phase, op.forward_seconds, ready)
        for value, layout in zip(op.makes, op.results, strict=True):
            self.ready[value, layout] = end
            for conversion in self.of_value.get(value, ()):
                self.convert(conversion, phase, again, end)

    def inputs(self, op: OpChoice) -> float:
        """Return the time at which all that an op reads is there."""
        reads = zip(op.reads, op.operands, strict=True)
        return max((self.ready.get(key, 0.0) for key in reads), default=0.0)

    # -- backward

    def backward(self) -> None:
        """Run the ops in reverse, each when the gradients of all its results are there."""
        begun: set[int] = set()
        last = -1
        for conversion in self.plan.conversions:
            if all(name not in self.place for name in conversion.readers):
                self.send_back(conversion)  # its reader is the caller
        for index in reversed(range(len(self.plan.ops))):
            op = self.plan.ops[index]
            if self.group[index] != last:
                if last == -1:
                    self.prefetch(self.group[index], "backward", again=True)
                last = self.group[index]
                self.prefetch(last - 1, "backward", again=True)
            region = self.region.get(op.name)
            if region is not None and region not in begun:
                begun.add(region)
                for name in self.plan.recomputed[region]:
                    self.run_op(self.plan.ops[self.place[name]], "recompute", again=True)
            self.run_back(op)
        self.reduce_waiting(0)

    def run_back(self, op: OpChoice) -> None:
        """Run an op's backward pass, and the moves of its operands' gradients."""
        # The op's seconds hold its recomputation too, which was issued as an event of its own.
        forward = op.forward_seconds * (2 if op.name in self.region else 1)
        ready = max([self.gradient.get(value, 0.0) for value in op.makes] + [self.inputs(op)])
        seconds = op.seconds - forward
        end = self.streams.issue(COMPUTE, op.name, "backward", seconds, ready)
        for key in zip(op.reads, op.operands, strict=True):
            self.arrived[key] = max(self.arrived.get(key, 0.0), end)
            self.gradient[key[0]] = max(self.gradient.get(key[0], 0.0), end)
        for conversion in self.first.get(op.name, ()):
            self.send_back(conversion)

    def send_back(self, conversion: Conversion) -> None:
        """Bring the gradient that all readers of a redistribution sum up to the layout of its
        value.
        """
        key = (conversion.value, conversion.target)
        ready = self.arrived.get(key, self.streams.free[COMPUTE])
        for move in self.moves.get((key, "backward", False), ()):
            if move.together:
                waits = (move.step.axis, move.movement)
                self.waiting[waits] = self.waiting.get(waits, 0.0) + move.nbytes
            else:
                ready = self.issue(move, "backward", ready)
        if conversion.value not in self.parameters:
            value = conversion.value
            self.gradient[value] = max(self.gradient.get(value, 0.0), ready)
        if self.bucket_nbytes is not None:
            self.reduce_waiting(self.bucket_nbytes)

    def reduce_waiting(self, least: float) -> None:
        """Reduce the gradient bucket in one call where at least so many bytes wait."""
        for (axis, movement), nbytes in list(self.waiting.items()):
            if nbytes <= 0 or nbytes < least:
                continue
            del self.waiting[axis, movement]
            seconds = movement_seconds(
                movement, nbytes, self.pace, self.links[axis], self.sizes[axis]
            )
            name = self.name_of(movement, "gradients", axis)
            self.streams.issue(COMMUNICATION, name, "backward", seconds, self.streams.free[COMPUTE])

    # -- update

    def update(self) -> None:
        """Run the optimizer, which waits for all gradients, and gather the parts that it
        updated.
        """
        plan = self.plan
        known = sum(op.seconds for op in plan.ops) + sum(c.seconds for c in plan.conversions)
        ready = max(self.streams.free.values())
        # The plan's seconds are ops, redistributions and the optimizer; the rest is the latter.
        seconds = plan.seconds - known
        # Less than this is rounding.
        if seconds > plan.seconds * 1e-9:
            ready = self.streams.issue(COMPUTE, "optimizer", "update", seconds, ready)
        for (_, phase, _), transfers in self.moves.items():
            for move in transfers if phase == "update" else ():
                self.issue(move, "update", ready)


def _groups(ops: Sequence[OpChoice]) -> list[int]:
    """Return the number of each op's block: neighbours whose modules have the same first index
    share it.

    >>> from types import SimpleNamespace as Op
    >>> _groups([Op(where="wte"), Op(where="h.0.mlp"), Op(where="h.0.ln"), Op(where="h.1.mlp")])
    [0, 1, 1, 2]
    """
    groups: list[int] = []
    last: tuple[str, ...] | None = None
    for op in ops:
        parts = op.where.split(".")
        index = next((at for at, part in enumerate(parts) if part.isdigit()), -1)
        key = tuple(parts[: index + 1])
        groups.append(groups[-1] + (key != last) if groups else 0)
        last = key
    return groups


def _tokens(plan: Plan) -> int:
    """Return the elements of the largest input, counting the dims that the inputs decide."""
    counts = [
        numel_hint(tuple(dim for dim in node.result.shape if isinstance(dim, Sym)))
        for captured in _first_traced(plan)
        for node in with_larger_hints(captured, plan.options.tokens).nodes
        if node.kind == "input"
    ]
    return max(counts, default=0)


def _first_traced(plan: Plan) -> list[Captured]:
    """The program of the plan, or of its first part."""
    first = plan if plan.captured is not None or not plan.parts else plan.parts[0].plan
    return [first.captured] if first.captured is not None else []


def _itemsize(plan: Plan) -> int:
    """Return the bytes of an element of the largest parameter; 4 where there is none."""
    largest = max(plan.parameters, key=lambda p: prod(p.shape), default=None)
    return largest.nbytes // max(prod(largest.shape), 1) if largest is not None else 4
