"""One step of training, simulated: what computes, what communicates, and what waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from autoparallel.analysis.communication import Transfer, moves
from autoparallel.analysis.step_rates import peak_of, tokens_and_unit
from autoparallel.analysis.streams import (
    GATHERED,
    MOVED,
    PIECES,
    REDUCED,
    Streams,
    remaking,
)
from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE, Event, Timeline
from autoparallel.cost.collective_times import movement_seconds
from autoparallel.cost.hardware import Hardware
from autoparallel.mesh import MICROBATCH
from autoparallel.placement import Layout, Movement
from autoparallel.plan import Conversion, OpChoice, Plan
from autoparallel.rewrite.conversions import begun_ahead, begun_steps
from autoparallel.rewrite.gaps import find_gaps
from autoparallel.runtime.products import piece_count

__all__ = ["StagePasses", "StepSimulation"]

_Key = tuple[str, Layout]


@dataclass(frozen=True, slots=True)
class StagePasses:
    """The seconds of one micro-batch on one stage, and of what is done once a step after all.

    forward, backward: seconds of the passes. weights: those of `backward` that are gradients of
    weights alone. reduction: seconds of reducing the gradients of parameters. gathers: of gathering
    parameters whose parts were updated. events: of a forward and a backward pass after each other.
    """

    forward: float
    backward: float
    weights: float
    reduction: float
    gathers: float
    events: tuple[Event, ...]


class StepSimulation:
    """The state of simulating one step.

    moves: of each redistribution, by phase and whether it is repeated. first: redistributions by
    the reader that is first. gaps: see `find_gaps`; late: what is left to each: names, seconds, and
    the conversions of their weights. bucket_nbytes: None for one reduction of gradients at the end.
    waiting: bytes of gradients that wait to be reduced, by axis and collective. ahead: conversions
    that begin before an op; underway: the ends of those that did, and the moves that are left;
    coming: the same of their gradients. queue: conversions whose copies are gathered again ahead of
    their use. defers: it is a stage of a pipeline, all of whose micro-batches reduce gradients of
    parameters together.
    """

    def __init__(self, plan: Plan, hardware: Hardware, bucket_nbytes: int | None) -> None:
        self.plan, self.hardware, self.bucket_nbytes = plan, hardware, bucket_nbytes
        self.sizes = tuple(size for _, size in plan.mesh.axes)
        # Micro-batches are places in time, and no devices.
        devices = tuple(1 if name == MICROBATCH else size for name, size in plan.mesh.axes)
        self.pace = hardware.at_pace_of(prod(devices))
        self.links = hardware.links(devices)
        self.streams = Streams()
        self.place = {op.name: index for index, op in enumerate(plan.ops)}
        self.region = {n: at for at, names in enumerate(plan.recomputed) for n in names}
        self.remade = frozenset(plan.remade)
        self.remaking = remaking(plan)
        self.weights = frozenset(parameter.name for parameter in plan.parameters)
        self.gaps = find_gaps(plan)
        self.late: dict[int, list[tuple[str, float, list[Conversion]]]] = {}
        self.moves: dict[tuple[_Key, str, bool], list[Transfer]] = {}
        for move in moves(plan):
            key = (move.conversion.value, move.conversion.target)
            self.moves.setdefault((key, move.phase, move.again), []).append(move)
        self.first: dict[str, list[Conversion]] = {}
        self.last: dict[str, list[Conversion]] = {}
        maker = {value: op.name for op in plan.ops for value in op.makes}
        for conversion in plan.conversions:
            readers = [self.place[name] for name in conversion.readers if name in self.place]
            if readers:
                self.first.setdefault(plan.ops[min(readers)].name, []).append(conversion)
                # Copies that a region reads are made again with the region; others are made again
                # where the backward pass reads them first.
                last = plan.ops[max(readers)].name
                if maker.get(conversion.value) not in self.region and last not in self.region:
                    self.last.setdefault(last, []).append(conversion)
        self.sums = {op.makes[0] for op in plan.ops if op.name in self.gaps.summed}
        self.waiting: dict[tuple[int, Movement], float] = {}
        self.ahead = begun_ahead(plan)
        self.underway: dict[_Key, tuple[float, list[Transfer]]] = {}
        self.coming: dict[_Key, tuple[float, list[tuple[Transfer, int]]]] = {}
        taken = {each for several in self.last.values() for each in several}
        self.queue = [
            conversion
            for op in plan.ops
            for conversion in self.first.get(op.name, ())
            if conversion.distance and conversion in taken
        ]
        self.defers = False

    def simulate(self) -> tuple[float, float, float]:
        """Simulate the forward pass, the backward pass and the update, and return their ends, in
        seconds.
        """
        self.forward()
        forward = self.streams.free[COMPUTE]
        self.backward()
        backward = max(self.streams.free[COMPUTE], forward)
        self.update()
        return forward, backward, max(self.streams.free.values())

    def passes(self) -> StagePasses:
        """Simulate a forward and a backward pass, and return what they take, and what comes after
        all passes of a step.
        """
        self.defers = True
        self.forward()
        forward = self.streams.free[COMPUTE]
        self.backward()
        # The reduction of gradients was issued last, and waits for other micro-batches.
        end = max(self.streams.free[COMPUTE], forward)
        reduction = max(self.streams.free[COMMUNICATION] - end, 0.0)
        events = tuple(event for event in self.streams.events if event.start < end)
        weights = sum(map(self.weights_of, self.plan.ops))
        gathers = sum(map(self.seconds_of, self.gathers()))
        return StagePasses(forward, end - forward, weights, reduction, gathers, events)

    def weights_of(self, op: OpChoice) -> float:
        """Return the seconds of an op's backward pass that compute gradients of weights alone."""
        if not op.whole_flops or not any(name in self.weights for name in op.reads):
            return 0.0
        # One product for either factor's gradient.
        return (op.seconds - op.forward_seconds * (2 if op.name in self.region else 1)) / 2

    def run(self) -> Timeline:
        """Return the simulated step."""
        forward, backward, seconds = self.simulate()
        plan = self.plan
        count, unit = tokens_and_unit(plan)
        # Backward takes two products for each forward one: 3 times the forward FLOPs in all.
        return Timeline(
            seconds=seconds,
            forward_seconds=forward,
            backward_seconds=backward - forward,
            events=tuple(self.streams.events),
            tokens=count,
            unit=unit,
            flops=3 * sum(op.whole_flops for op in plan.ops),
            peak=peak_of(plan, self.hardware) * plan.world_size,
            ranks=plan.world_size,
        )

    # -- forward

    def forward(self) -> None:
        """Run the ops in their order, each after the redistributions that it reads first."""
        for op in self.plan.ops:
            self.run_op(op, "forward", again=False)
        for conversion in self.plan.conversions:
            if all(name not in self.place for name in conversion.readers):
                self.convert(conversion, "forward", again=False)  # its reader is the caller

    def convert(self, conversion: Conversion, phase: str, again: bool) -> None:
        """Move a value to the layout that its readers read, and wait for it."""
        key = (conversion.value, conversion.target)
        what = GATHERED if conversion.value in self.weights else ""
        what = REDUCED if what and again else what
        if key in self.underway:
            end, moves = self.underway.pop(key)
            self.streams.wait(end, what)
        else:
            moves = self.moves.get((key, "backward" if again else "forward", again), [])
        for move in moves:
            self.streams.wait(self.issue(move, phase, self.streams.free[COMPUTE]), what)

    def begin(self, conversion: Conversion, phase: str, again: bool) -> None:
        """Start the last collective that moves a value, after the moves before it."""
        key = (conversion.value, conversion.target)
        moves = self.moves.get((key, "backward" if again else "forward", again), [])
        count = begun_steps([move.step for move in moves])
        if key in self.underway or not count:
            return
        for move in moves[: count - 1]:
            self.streams.wait(self.issue(move, phase, self.streams.free[COMPUTE]), GATHERED)
        end = self.issue(moves[count - 1], phase, self.streams.free[COMPUTE])
        self.underway[key] = end, moves[count:]

    def take(self, conversion: Conversion) -> None:
        """Gather a dropped copy again, and start those that are to be started then."""
        if conversion in self.queue:
            self.begin(conversion, "backward", again=True)
            place = self.queue.index(conversion)
            for at in range(place - 1, -1, -1):
                if place - at <= self.queue[at].distance:
                    self.begin(self.queue[at], "backward", again=True)
        self.convert(conversion, "backward", again=True)

    def issue(self, move: Transfer, phase: str, ready: float) -> float:
        """Issue one move, on the links or in memory, and return its end."""
        name = self.name_of(move.movement, move.conversion.value, move.step.axis)
        stream = COMPUTE if move.movement.collective is None else COMMUNICATION
        return self.streams.issue(stream, name, phase, self.seconds_of(move), ready)

    def seconds_of(self, move: Transfer) -> float:
        """Return the seconds of one move by itself."""
        axis = move.step.axis
        return movement_seconds(
            move.movement, move.nbytes, self.pace, self.links[axis], self.sizes[axis]
        )

    def name_of(self, movement: Movement, moved: str, axis: int) -> str:
        """Return the name of a move's event: "all-reduce of gradients on dp"."""
        where = f" on {self.plan.mesh.axes[axis][0]}" if len(self.sizes) > 1 else ""
        return f"{movement.value.replace('_', '-')} of {moved}{where}"

    def run_op(self, op: OpChoice, phase: str, again: bool) -> None:
        """Run an op's forward pass after the moves of what it reads first."""
        for conversion in self.ahead.get(op.name, ()):
            # With a region, what is read in it is gathered again.
            if not again or any(name in self.region for name in conversion.readers):
                self.begin(conversion, phase, again)
        for conversion in self.first.get(op.name, ()):
            # A sum that is made piece by piece is made with its product.
            if again or conversion.value not in self.sums:
                self.convert(conversion, phase, again)
        begin = self.streams.free[COMPUTE]
        end = self.streams.issue(COMPUTE, op.name, phase, op.forward_seconds, begin)
        if op.name in self.gaps.summed:
            self.sum_in_pieces(op, phase, begin, end)

    def sum_in_pieces(self, op: OpChoice, phase: str, begin: float, end: float) -> None:
        """Sum a product over the ranks, each piece when it is computed."""
        summed = self.gaps.summed[op.name]
        for move in self.moves.get(((op.makes[0], summed.target), "forward", False), ()):
            count = piece_count(int(move.nbytes))
            for piece in range(1, count + 1):
                ready = begin + (end - begin) * piece / count
                part = replace(move, nbytes=move.nbytes / count)
                self.streams.wait(self.issue(part, phase, ready), PIECES)

    # -- backward

    def backward(self) -> None:
        """Run the ops in reverse, with the moves of gradients where the emitted module has them."""
        begun: set[int] = set()
        for conversion in self.plan.conversions:
            if all(name not in self.place for name in conversion.readers):
                self.send_back([conversion])  # its reader is the caller
        for op in reversed(self.plan.ops):
            region = self.region.get(op.name)
            if region is not None and region not in begun:
                begun.add(region)
                for name in self.plan.recomputed[region]:
                    self.run_op(self.plan.ops[self.place[name]], "recompute", again=True)
            for made in self.remaking.get(op.name, ()):
                start = self.streams.free[COMPUTE]
                self.streams.issue(COMPUTE, made.name, "recompute", made.forward_seconds, start)
            for conversion in self.last.get(op.name, ()):
                self.take(conversion)
            self.run_back(op)
            self.receive(op)
        for gap in sorted(self.late, reverse=True):
            self.fill(gap)
        for end, rest in self.coming.values():
            self.streams.wait(end, REDUCED)
            self.bring_back(rest, REDUCED)
        self.reduce_waiting(0)

    def run_back(self, op: OpChoice) -> None:
        """Run an op's backward pass, and the moves of its operands' gradients."""
        # The op's seconds hold its recomputation too, which was issued as an event of its own.
        again = op.name in self.region or op.name in self.remade
        forward = op.forward_seconds * (2 if again else 1)
        seconds = op.seconds - forward
        gap, sent = self.gaps.products.get(op.name, 0), self.first.get(op.name, [])[::-1]
        if gap:
            # One product for either factor's gradient.
            seconds /= 2
            weights = [each for each in sent if each.value in self.weights]
            sent = [each for each in sent if each.value not in self.weights]
            self.late.setdefault(gap, []).append((f"{op.name} (weight)", seconds, weights))
        self.streams.issue(COMPUTE, op.name, "backward", seconds, self.streams.free[COMPUTE])
        self.send_back(sent)

    def receive(self, op: OpChoice) -> None:
        """Wait for the gradients of what began before an op, the last one first."""
        for conversion in reversed(self.ahead.get(op.name, ())):
            end, moves = self.coming.pop((conversion.value, conversion.target), (0.0, []))
            self.streams.wait(end, REDUCED)
            self.bring_back(moves, REDUCED)

    def send_back(self, conversions: Sequence[Conversion]) -> None:
        """Bring the gradients that all readers of redistributions sum up to the layouts of their
        values, and wait for each; what is late runs meanwhile.

        conversions: in the order of the backward pass.
        """
        for conversion in conversions:
            moves = list(self.steps_back(conversion))
            begun = conversion.steps[begun_steps(conversion.steps) - 1 :][:1]
            last = [
                at
                for at, (move, _) in enumerate(moves, 1)
                if conversion.begins and begun and move.step.axis == begun[0].axis
            ]
            count = last[-1] if last else len(moves)
            what = REDUCED if conversion.value in self.weights else MOVED
            self.bring_back(moves[: count - 1] if last else moves, what)
            if last:
                # It is waited for where the gather began.
                end = self.issue(moves[count - 1][0], "backward", self.streams.free[COMPUTE])
                self.coming[conversion.value, conversion.target] = end, moves[count:]
        if self.bucket_nbytes is not None:
            self.reduce_waiting(self.bucket_nbytes)

    def bring_back(self, moves: Sequence[tuple[Transfer, int]], what: str) -> None:
        """Make moves of a gradient, with their gaps, and wait for each. what: is waited for."""
        for move, gap in moves:
            end = self.issue(move, "backward", self.streams.free[COMPUTE])
            self.fill(gap)
            self.streams.wait(end, what)

    def steps_back(self, conversion: Conversion) -> Iterator[tuple[Transfer, int]]:
        """Yield the moves of a redistribution's gradient with their gaps, 0 for none; what is
        reduced together with others joins the bucket.
        """
        key = (conversion.value, conversion.target)
        for move in self.moves.get((key, "backward", False), ()):
            if move.together or self.is_deferred(move):
                waits = (move.step.axis, move.movement)
                self.waiting[waits] = self.waiting.get(waits, 0.0) + move.nbytes
                continue
            # The move back is one of the steps, turned round.
            same = [
                count
                for count, step in enumerate(conversion.steps, 1)
                if (step.axis, step.backward) == (move.step.axis, move.movement)
            ]
            before = conversion.steps[: same[-1]] if same else ()
            yield move, self.gaps.conversions.get((conversion.value, before), 0)

    def is_deferred(self, move: Transfer) -> bool:
        """Return whether a stage leaves the reduction of a gradient to the end of the step."""
        of_weight = move.conversion.value in self.weights
        return self.defers and of_weight and move.step.backward is Movement.NONE

    def fill(self, gap: int) -> None:
        """Compute what was left to a gap, and send the gradients of gathered weights back."""
        for name, seconds, weights in self.late.pop(gap, ()):
            self.streams.issue(COMPUTE, name, "backward", seconds, self.streams.free[COMPUTE])
            self.send_back(weights)

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
        ready = max(self.streams.free.values())
        self.streams.wait(ready, REDUCED)
        seconds = self.optimizer()
        # Less than this is rounding.
        if seconds > self.plan.seconds * 1e-9:
            ready = self.streams.issue(COMPUTE, "optimizer", "update", seconds, ready)
        for move in self.gathers():
            self.issue(move, "update", ready)

    def gathers(self) -> list[Transfer]:
        """Return the moves that gather parameters whose parts were updated."""
        return [
            move
            for (_, phase, _), transfers in self.moves.items()
            for move in (transfers if phase == "update" else ())
        ]

    def optimizer(self, once: float = 1.0) -> float:
        """Return the seconds of the optimizer. once: the share that the plan's rows bear of it and
        of gathers.
        """
        plan = self.plan
        # The plan's seconds are ops, moves and the optimizer; the rest is the latter.
        known = sum(op.seconds for op in plan.ops) + sum(c.seconds for c in plan.conversions)
        return plan.seconds - known - once * sum(map(self.seconds_of, self.gathers()))
