"""Messages that ranks of a pipeline ask for and send while they compute, as their schedule goes.

A rank has a buffer for what it receives from when it asks for it. What it sends, it holds until it
knows that it has arrived: what comes from the rank that has used it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autoparallel.options import SCHEDULES
from autoparallel.runtime.schedule_orders import (
    FORWARD,
    WEIGHTS,
    Pass,
    ranks_of_stages,
    schedule_class,
    schedule_order,
)

__all__ = ["Messages", "messages_of", "sends_by_table"]

_Order = Sequence[Sequence[Pass]]


@dataclass(frozen=True, slots=True)
class Messages:
    """The time of what a pass receives and sends, as the number of passes that its rank has begun.

    asked: when its rank asks for what it receives; that of the pass itself where nothing comes from
    another rank. held: until when its rank holds what it sends, or hands to another stage of its
    own; -1 where it does neither.
    """

    asked: int
    held: int


def sends_by_table(schedule: str, ranks: int, per_rank: int, microbatches: int) -> bool:
    """Return whether torch runs a schedule by a table in which sends and receives have a place.

    >>> sends_by_table("1f1b", 4, 1, 8), sends_by_table("1f1b", 4, 2, 8)
    (False, True)
    """
    kind = schedule_class(schedule, ranks, per_rank, microbatches)
    return kind not in (SCHEDULES["gpipe"].alone, SCHEDULES["1f1b"].alone)


@lru_cache(maxsize=8)
def messages_of(
    schedule: str, ranks: int, per_rank: int, microbatches: int
) -> tuple[tuple[Messages, ...], ...]:
    """Return when each rank asks for what its passes receive, and until when it holds what is sent.

    They are in the order of `schedule_order`. By a table, a rank asks for what the other one has
    computed in about as many turns. Otherwise a pass asks when it begins, and what is sent is held
    until its rank sends to the same one again, or, in GPipe's order, until all forward passes, or
    those of the step, are through.

    >>> [each.asked for each in messages_of("1f1b", 2, 1, 2)[1]]
    [0, 1, 2, 3]
    >>> [each.held for each in messages_of("1f1b", 2, 1, 2)[1]]
    [-1, 4, -1, 4]
    """
    order = schedule_order(schedule, ranks, per_rank, microbatches)
    by_table = sends_by_table(schedule, ranks, per_rank, microbatches)
    asked = _asked(order) if by_table else [list(range(len(passes))) for passes in order]
    kind = schedule_class(schedule, ranks, per_rank, microbatches)
    until = _held_until_known(order)
    if kind == SCHEDULES["1f1b"].alone:
        until = _held_until_next(order)
    elif kind == SCHEDULES["gpipe"].alone:
        count = microbatches
        until = [[*(min(one, count) for one in each[:count]), *each[count:]] for each in until]
    return tuple(
        tuple(Messages(*each) for each in zip(some, others, strict=True))
        for some, others in zip(asked, until, strict=True)
    )


def _handed_on(order: _Order) -> list[tuple[int, int, int, int]]:
    """Return which pass receives of which: the rank of the one and its place there, and the rank of
    the other and its place.
    """
    rank_of = ranks_of_stages(order)
    places = {
        (work.stage, work.kind == FORWARD, work.microbatch): place
        for passes in order
        for place, work in enumerate(passes)
        if work.kind != WEIGHTS
    }
    handed = []
    for rank, passes in enumerate(order):
        for place, work in enumerate(passes):
            forward = work.kind == FORWARD
            target = work.stage + (1 if forward else -1)
            if work.kind != WEIGHTS and 0 <= target < len(rank_of):
                at = places[target, forward, work.microbatch]
                handed.append((rank, place, rank_of[target], at))
    return handed


def _asked(order: _Order) -> list[list[int]]:
    """Return how many passes each rank has begun when it asks for what each of its passes receives.

    Torch makes its table in turns: each rank does its next pass if it can, and the one that
    receives asks for it then.
    """
    asked = [list(range(len(passes))) for passes in order]
    target = {(rank, place): (other, at) for rank, place, other, at in _handed_on(order)}
    waits = set(target.values())
    begun = [0] * len(order)
    busy = list(range(len(order)))
    while busy:
        for rank in busy:
            here = rank, begun[rank]
            if here in waits:
                continue
            begun[rank] += 1
            if here in target:
                other, at = target[here]
                waits.discard((other, at))
                if other != rank:
                    asked[other][at] = begun[other]
        busy = [rank for rank in busy if begun[rank] < len(order[rank])]
    return asked


def _held_until_known(order: _Order) -> list[list[int]]:
    """Return the passes before which what each rank has sent is known to have arrived.

    What a pass of another rank sends after it has received says so, when it is received. Where
    nothing comes any more, it is held until the step ends.
    """
    handed = _handed_on(order)
    # By both ranks: the place that receives of each place, or of one behind it.
    first: dict[tuple[int, int], list[int]] = {}
    for rank, place, other, at in handed:
        never = [len(order[other])] * len(order[rank])
        first.setdefault((rank, other), never)[place] = at
    for each in first.values():
        for place in reversed(range(len(each) - 1)):
            each[place] = min(each[place], each[place + 1])
    until = [[-1] * len(passes) for passes in order]
    for rank, place, other, at in handed:
        answers = first.get((other, rank))
        known = len(order[rank]) if answers is None else answers[at]
        until[rank][place] = at if other == rank else known
    return until


def _held_until_next(order: _Order) -> list[list[int]]:
    """Return the passes after which each rank sends to the same one again."""
    until = [[-1] * len(passes) for passes in order]
    last: dict[tuple[int, int], int] = {}
    for rank, place, other, _ in _handed_on(order):
        if (rank, other) in last:
            until[rank][last[rank, other]] = place + 1
        until[rank][place] = len(order[rank])
        last[rank, other] = place
    return until
