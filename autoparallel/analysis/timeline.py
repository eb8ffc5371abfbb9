"""One step of training as it runs: a stream that computes beside one that communicates.

The planner adds up seconds; here what does not wait for each other overlaps. Each stream does one
thing after the other, in the order in which they are issued. A conversion is issued when its value
is made, and only its readers wait. Parameters that are gathered for use are gathered one block
ahead, forward and backward. Gradients of parameters are reduced beside the rest of the backward
pass. What a kernel sends inside of an op counts as computing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autoparallel.analysis.communication import Transfer, moves
from autoparallel.cost.collective_times import movement_seconds
from autoparallel.cost.hardware import Hardware, find_hardware, presets
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Sym, numel_hint
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.placement import Layout, Movement
from autoparallel.plan import Conversion, OpChoice, Plan
from autoparallel.support.units import seconds_text

__all__ = [
    "BUCKET_NBYTES",
    "COMMUNICATION",
    "COMPUTE",
    "Event",
    "Timeline",
    "TrainingStep",
    "timeline",
]

COMPUTE, COMMUNICATION = "compute", "communication"
BUCKET_NBYTES = 25 * 2**20  # what torch's DistributedDataParallel reduces at a time

_Key = tuple[str, Layout]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a stream does. start, end: seconds since the step began.

    name: of the node; for a conversion what it does to which value. phase: "forward",
    "recompute", "backward" or "update".
    """

    name: str
    stream: str
    phase: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """A predicted step, and how fast that is. seconds: until everything is done.

    tokens: of the whole batch. flops: of the model's products, forward and backward, unsplit and
    none repeated. peak: FLOP/s of all ranks together.
    """

    seconds: float
    tokens: int
    flops: float
    peak: float

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together; 0 where it is not known how many a step has."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization (arXiv:2204.02311, appendix B)."""
        return self.flops / (self.seconds * self.peak) if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Timeline(TrainingStep):
    """A predicted step, event by event.

    forward_seconds, backward_seconds: until the forward pass is done, and from then until the
    backward pass is, without what is left of the reduction of gradients.

    >>> import torch, autoparallel
    >>> layer, inputs = torch.nn.Linear(4096, 4096, bias=False), torch.zeros(512, 4096)
    >>> plan = autoparallel.make_plan(layer, 2, example_inputs=inputs, hardware="dgx-a100")
    >>> print(autoparallel.timeline(plan))
    step           2.89 ms, predicted, on 2 ranks
    passes         forward 1.3 ms, backward 1.46 ms, gradients and update after them 132 µs
    computing      2.89 ms
    communicating  342 µs; nothing is computed for 0 s
    tokens         8192 a step, 2.836e+06 a second
    utilization    91.5% of the peak FLOP/s (MFU)
    """

    forward_seconds: float
    backward_seconds: float
    events: tuple[Event, ...]
    ranks: int

    def __repr__(self) -> str:
        step = f"{seconds_text(self.seconds)} a step"
        return f"<Timeline: {step} on {self.ranks} ranks, {len(self.events)} events>"

    def __str__(self) -> str:
        """A few lines; `write_trace` shows every event."""
        rest = self.seconds - self.forward_seconds - self.backward_seconds
        passes = f"forward {seconds_text(self.forward_seconds)}"
        passes += f", backward {seconds_text(self.backward_seconds)}"
        exposed = seconds_text(self.exposed_seconds)
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        rows = [
            ("step", f"{seconds_text(self.seconds)}, predicted, on {ranks}"),
            ("passes", f"{passes}, gradients and update after them {seconds_text(max(rest, 0.0))}"),
            ("computing", seconds_text(self.busy(COMPUTE))),
            (
                "communicating",
                f"{seconds_text(self.busy(COMMUNICATION))}; nothing is computed for {exposed}",
            ),
            ("tokens", f"{self.tokens} a step, {self.tokens_per_second:.4g} a second"),
            ("utilization", f"{self.mfu:.1%} of the peak FLOP/s (MFU)"),
        ]
        return "\n".join(f"{name:15}{text}" for name, text in rows)

    def busy(self, stream: str, phase: str = "") -> float:
        """Seconds that a stream works, in all or in one phase."""
        return sum(
            event.seconds
            for event in self.events
            if event.stream == stream and phase in ("", event.phase)
        )

    @property
    def exposed_seconds(self) -> float:
        """How long nothing is computed: communication that nothing hides."""
        return max(self.seconds - self.busy(COMPUTE), 0.0)


def timeline(
    plan: Plan,
    *,
    hardware: Hardware | str | None = None,
    bucket_nbytes: int | None = BUCKET_NBYTES,
) -> Timeline:
    """The predicted timeline of one step.

    hardware: what it runs on, also by name or file; by default what was planned for.
    bucket_nbytes: gradients that are only to be summed are reduced in calls of at least so many
    bytes, as they become ready; None reduces them in one call when the backward pass has ended, as
    the emitted module does.
    """
    if hardware is None:
        # A plan knows its hardware by name, and that of a file by the file.
        own = plan.hardware in presets()
        hardware = plan.hardware if own else plan.options.hardware
    return _Simulation(plan, find_hardware(hardware), bucket_nbytes).run()


@dataclass
class _Streams:
    """Both streams: what they did, and when each is free."""

    events: list[Event] = field(default_factory=list)
    free: dict[str, float] = field(default_factory=lambda: {COMPUTE: 0.0, COMMUNICATION: 0.0})

    def issue(self, stream: str, name: str, phase: str, seconds: float, ready: float) -> float:
        """Do something when its inputs are ready and the stream is free. Returns its end."""
        if seconds <= 0:
            return ready
        start = max(self.free[stream], ready)
        self.free[stream] = start + seconds
        self.events.append(Event(name, stream, phase, start, start + seconds))
        return start + seconds


class _Simulation:
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
        # What is moved ahead of the group of ops that reads it first, forward and backward.
        self.gathered: dict[int, list[Conversion]] = {}
        self.remade: dict[int, list[Conversion]] = {}
        self.first: dict[str, list[Conversion]] = {}  # by the reader that is first
        made = {value: op.name for op in plan.ops for value in op.makes}
        for conversion in plan.conversions:
            readers = [self.place[name] for name in conversion.readers if name in self.place]
            if readers:
                self.first.setdefault(plan.ops[min(readers)].name, []).append(conversion)
            if conversion.value in made:
                self.of_value.setdefault(conversion.value, []).append(conversion)
            elif readers:
                self.gathered.setdefault(self.group[min(readers)], []).append(conversion)
            if readers and made.get(conversion.value) not in self.region:
                self.remade.setdefault(self.group[max(readers)], []).append(conversion)
        self.ready: dict[_Key, float] = {}  # values, as they are read
        self.gradient: dict[str, float] = {}  # gradients of values, as they are made
        self.arrived: dict[_Key, float] = {}  # gradients of values, as they are read
        self.waiting: dict[tuple[int, Movement], float] = {}  # bytes to be summed

    def run(self) -> Timeline:
        """Forward, backward, update."""
        self.forward()
        forward = self.streams.free[COMPUTE]
        self.backward()
        backward = max(self.streams.free[COMPUTE], forward)
        self.update()
        plan = self.plan
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
        """Ops in their order, each when all that it reads is there."""
        last = -1
        self.prefetch(0, "forward", again=False)
        for index, op in enumerate(self.plan.ops):
            if self.group[index] != last:
                last = self.group[index]
                self.prefetch(last + 1, "forward", again=False)
            self.run_op(op, "forward", again=False)

    def prefetch(self, group: int, phase: str, again: bool) -> None:
        """Issue what a group of ops reads and waits for no op: parameters that are gathered."""
        for conversion in (self.remade if again else self.gathered).get(group, ()):
            self.convert(conversion, phase, again, self.streams.free[COMPUTE])

    def convert(self, conversion: Conversion, phase: str, again: bool, ready: float) -> None:
        """Move a value to where its readers read it."""
        key = (conversion.value, conversion.target)
        for move in self.moves.get((key, "backward" if again else "forward", again), ()):
            ready = self.issue(move, phase, ready)
        if not again or self.moves.get((key, "backward", True)):
            self.ready[key] = ready

    def issue(self, move: Transfer, phase: str, ready: float) -> float:
        """One move: on the links, or in memory."""
        axis = move.step.axis
        seconds = movement_seconds(
            move.movement, move.nbytes, self.pace, self.links[axis], self.sizes[axis]
        )
        where = f" on {self.plan.mesh.axes[axis][0]}" if len(self.sizes) > 1 else ""
        name = f"{move.movement.value.replace('_', '-')} of {move.conversion.value}{where}"
        stream = COMPUTE if move.movement.collective is None else COMMUNICATION
        return self.streams.issue(stream, name, phase, seconds, ready)

    def run_op(self, op: OpChoice, phase: str, again: bool) -> None:
        """An op's forward pass, and what brings its results to their readers."""
        ready = self.inputs(op)
        end = self.streams.issue(COMPUTE, op.name, phase, op.forward_seconds, ready)
        for value, layout in zip(op.makes, op.results, strict=True):
            self.ready[value, layout] = end
            for conversion in self.of_value.get(value, ()):
                self.convert(conversion, phase, again, end)

    def inputs(self, op: OpChoice) -> float:
        """When all that an op reads is there."""
        reads = zip(op.reads, op.operands, strict=True)
        return max((self.ready.get(key, 0.0) for key in reads), default=0.0)

    # -- backward

    def backward(self) -> None:
        """Ops in reverse, each when the gradients of all that it made are there."""
        begun: set[int] = set()
        last = -1
        for conversion in self.plan.conversions:
            if all(name not in self.place for name in conversion.readers):
                self.send_back(conversion)  # what is returned
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
        """An op's backward pass, and what its operands' gradients have to travel."""
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
        """Bring the gradient of what all readers of a conversion read to where it was made."""
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
        """Reduce gradients of parameters in one call where at least so many bytes wait."""
        for (axis, movement), nbytes in list(self.waiting.items()):
            if nbytes <= 0 or nbytes < least:
                continue
            del self.waiting[axis, movement]
            seconds = movement_seconds(
                movement, nbytes, self.pace, self.links[axis], self.sizes[axis]
            )
            name = f"{movement.value.replace('_', '-')} of gradients"
            where = f" on {self.plan.mesh.axes[axis][0]}" if len(self.sizes) > 1 else ""
            self.streams.issue(
                COMMUNICATION, name + where, "backward", seconds, self.streams.free[COMPUTE]
            )

    # -- update

    def update(self) -> None:
        """The optimizer waits for all gradients; what it updated in parts is gathered."""
        plan = self.plan
        known = sum(op.seconds for op in plan.ops) + sum(c.seconds for c in plan.conversions)
        ready = max(self.streams.free.values())
        seconds = plan.seconds - known
        if seconds > plan.seconds * 1e-9:
            ready = self.streams.issue(COMPUTE, "optimizer", "update", seconds, ready)
        for (_, phase, _), made in self.moves.items():
            for move in made if phase == "update" else ():
                self.issue(move, "update", ready)


def _groups(ops: Sequence[OpChoice]) -> list[int]:
    """Per op the number of its block: neighbours whose modules have the same first index."""
    found: list[int] = []
    last: tuple[str, ...] | None = None
    for op in ops:
        parts = op.where.split(".")
        index = next((at for at, part in enumerate(parts) if part.isdigit()), -1)
        key = tuple(parts[: index + 1])
        found.append(found[-1] + (key != last) if found else 0)
        last = key
    return found


def _tokens(plan: Plan) -> int:
    """Elements of the largest input, counting the dims that the inputs decide."""
    found = [
        numel_hint(tuple(dim for dim in node.result.shape if isinstance(dim, Sym)))
        for captured in _first_traced(plan)
        for node in with_larger_hints(captured, plan.options.tokens).nodes
        if node.kind == "input"
    ]
    return max(found, default=0)


def _first_traced(plan: Plan) -> list[Captured]:
    """The program of the plan, or of its first part."""
    first = plan if plan.captured is not None or not plan.parts else plan.parts[0].plan
    return [first.captured] if first.captured is not None else []


def _itemsize(plan: Plan) -> int:
    """Of the elements of the largest parameter."""

    def elements(shape: Iterable[int]) -> int:
        count = 1
        for size in shape:
            count *= size
        return count

    largest = max(plan.parameters, key=lambda p: elements(p.shape), default=None)
    return largest.nbytes // max(elements(largest.shape), 1) if largest is not None else 4
