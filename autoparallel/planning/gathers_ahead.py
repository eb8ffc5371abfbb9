"""Gathers of parameters ahead of their use: where each begins, so that computing hides it.

A parameter of which each rank holds a part (ZeRO-3, FSDP) is gathered before it is read. The gather
begins as late as it still comes in time, if it takes longer than predicted by a margin, and not so
early that many lie gathered and unread: what is in flight is memory, which the plan's account
counts. Copies that are dropped are gathered again by the same rule, in the order of the backward
pass.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

from autoparallel.analysis.communication import Transfer, moves
from autoparallel.cost.collective_times import movement_seconds
from autoparallel.cost.hardware import Hardware
from autoparallel.mesh import MICROBATCH
from autoparallel.placement import Layout, Movement
from autoparallel.plan import Conversion, Plan
from autoparallel.rewrite.conversions import begun_steps
from autoparallel.rewrite.gaps import find_gaps

__all__ = ["with_gathers_ahead", "without_gathers_ahead"]

# A gather is taken to last so many times as long as predicted: what hides it may be quicker.
_MARGIN = 4.0
# What is gathered and not yet read is at most so many times as large as the largest gather.
_LARGEST_IN_FLIGHT = 2
_Key = tuple[str, Layout]


@dataclass(frozen=True, slots=True)
class _Gather:
    """One gather. first, last: the places of the ops that read it first and last. seconds, nbytes:
    of the gather. region: of recomputed ops in which alone it is read, -1 for none. bound: it
    begins no later than the op at this place, nor earlier than `after`.
    """

    conversion: Conversion
    first: int
    last: int
    seconds: float
    nbytes: float
    region: int
    bound: int
    after: int


def with_gathers_ahead(plan: Plan, hardware: Hardware) -> Plan:
    """Return a plan that says where the gathers of its parameters begin. hardware: of the plan.

    The plan is returned as it is where its options say that collectives are waited for.

    Example: `with_gathers_ahead(plan, find_hardware("dgx-a100")).conversions[0].begins`
    """
    gathers = _gathers(plan, hardware) if plan.options.overlap else []
    if not gathers:
        return plan
    begins = _begins(plan, gathers)
    distances = _distances(plan, gathers)
    rows = []
    for conversion in plan.conversions:
        key = (conversion.value, conversion.target)
        if key in begins:
            op = plan.ops[begins[key]].name
            conversion = replace(conversion, begins=op, distance=distances.get(key, 0))
        rows.append(conversion)
    return replace(plan, conversions=tuple(rows))


def without_gathers_ahead(plan: Plan) -> Plan:
    """Return a plan whose parameters are gathered where they are read.

    Example: `without_gathers_ahead(plan).conversions[0].begins` is "".
    """
    rows = [replace(row, begins="", distance=0) if row.begins else row for row in plan.conversions]
    return replace(plan, conversions=tuple(rows))


def _gathers(plan: Plan, hardware: Hardware) -> list[_Gather]:
    """Return the gathers of parameters, in the order in which they are read first."""
    sizes = tuple(size for _, size in plan.mesh.axes)
    devices = tuple(1 if name == MICROBATCH else size for name, size in plan.mesh.axes)
    pace, links = hardware.at_pace_of(prod(devices)), hardware.links(devices)
    parameters = {parameter.name for parameter in plan.parameters}
    conversions = [row for row in plan.conversions if row.value in parameters]
    place = {op.name: index for index, op in enumerate(plan.ops)}
    regions = {name: at for at, names in enumerate(plan.recomputed) for name in names}
    starts = [min(place[name] for name in names) for names in plan.recomputed]
    reading: dict[str, set[int]] = {}
    for op in plan.ops:
        for value in op.reads:
            reading.setdefault(value, set()).add(regions.get(op.name, -1))
    sent: dict[_Key, Transfer] = {}
    for move in moves(plan, conversions):
        if move.phase == "forward" and move.movement.collective is not None:
            sent[move.conversion.value, move.conversion.target] = move
    bounds = _gap_places(plan)
    gathers = []
    for conversion in conversions:
        readers = [place[name] for name in conversion.readers if name in place]
        last = sent.get((conversion.value, conversion.target))
        if not readers or last is None:
            continue
        count = begun_steps(conversion.steps)
        # What is sent from rank to rank in one go is not started and waited for apart.
        if conversion.steps[count - 1].forward is not Movement.ALL_GATHER:
            continue
        first, axis = min(readers), last.step.axis
        region = regions.get(plan.ops[first].name, -1)
        # A product and the bias that is added to it are one call: both are there before it.
        before = plan.ops[first - 1] if first else plan.ops[first]
        if before.whole_flops and before.makes[0] in plan.ops[first].reads:
            first -= 1
        alone = conversion.again or len(reading[conversion.value]) == 1
        region = region if alone else -1
        seconds = movement_seconds(last.movement, last.nbytes, pace, links[axis], sizes[axis])
        after = starts[region] if region >= 0 else 0
        first = max(first, after)
        bound = max(min(first, bounds.get(conversion.value, first)), after)
        gathers.append(
            _Gather(conversion, first, max(readers), seconds, last.nbytes, region, bound, after)
        )
    return sorted(gathers, key=lambda each: each.first)


def _gap_places(plan: Plan) -> dict[str, int]:
    """Return, by weight, the place of the op that reads what leaves the gap in which the weight's
    gradient is computed: the gradient is reduced after it.
    """
    gaps = find_gaps(plan)
    places: dict[int, int] = {}
    keys: dict[tuple[str, Layout], list[int]] = {}
    for conversion in plan.conversions:
        for count in range(1, len(conversion.steps) + 1):
            gap = gaps.conversions.get((conversion.value, conversion.steps[:count]))
            if gap is not None:
                keys.setdefault((conversion.value, conversion.target), []).append(gap)
    for index, op in enumerate(plan.ops):
        for read in zip(op.reads, op.operands, strict=True):
            for gap in keys.get(read, ()):
                places.setdefault(gap, index)
    return {
        op.reads[1]: places[gaps.products[op.name]]
        for op in plan.ops
        if op.name in gaps.products and gaps.products[op.name] in places
    }


def _begins(plan: Plan, gathers: Sequence[_Gather]) -> Mapping[_Key, int]:
    """Return the place of the op before which each gather begins."""
    clock = [0.0, *accumulate(op.forward_seconds for op in plan.ops)]
    regions = {name: at for at, names in enumerate(plan.recomputed) for name in names}
    place = {op.name: index for index, op in enumerate(plan.ops)}
    starts = [min(place[name] for name in names) for names in plan.recomputed]
    most = _LARGEST_IN_FLIGHT * max(gather.nbytes for gather in gathers)
    begins: dict[_Key, int] = {}
    free = clock[-1]
    for at in range(len(gathers) - 1, -1, -1):
        gather = gathers[at]
        start = min(clock[gather.first], free) - _MARGIN * gather.seconds
        begin = max(bisect_right(clock, start) - 1, gather.after)
        # Those that are read in between are in flight with it.
        nbytes = gather.nbytes
        for other in reversed(gathers[:at]):
            nbytes += other.nbytes
            if other.first < begin:
                break
            if nbytes > most:
                begin = other.first + 1
                break
        begin = min(begin, gather.bound)
        # What is read outside of a region that is recomputed begins before it.
        inside = regions.get(plan.ops[begin].name, -1)
        if inside >= 0 and inside != gather.region:
            begin = starts[inside]
        begins[gather.conversion.value, gather.conversion.target] = begin
        free = max(start, clock[begin])
    return begins


def _distances(plan: Plan, gathers: Sequence[_Gather]) -> Mapping[_Key, int]:
    """Return how far ahead each dropped copy is gathered again, in copies that are taken before it
    in the backward pass; those that a recomputed region gathers again are none of these.
    """
    queue = [
        gather
        for gather in gathers
        if gather.conversion.again and gather.region < 0 and _is_first_move(gather.conversion)
    ]
    back = [op.seconds - op.forward_seconds for op in plan.ops]
    # The seconds of the backward pass before that of each op.
    clock = [*accumulate(reversed(back), initial=0.0)][::-1][1:]
    most = _LARGEST_IN_FLIGHT * max((gather.nbytes for gather in queue), default=0.0)
    distances: dict[_Key, int] = {}
    for at, gather in enumerate(queue):
        start = clock[gather.last] - _MARGIN * gather.seconds
        distance, nbytes = 1, gather.nbytes
        for later in queue[at + 1 :]:
            nbytes += later.nbytes
            if clock[later.last] <= start or nbytes > most:
                break
            distance += 1
        distances[gather.conversion.value, gather.conversion.target] = distance
    return distances


def _is_first_move(conversion: Conversion) -> bool:
    """Return whether a conversion's collective moves the parameter as it is stored."""
    steps = conversion.steps
    return all(step.forward is Movement.NONE for step in steps[: begun_steps(steps) - 1])
