"""A pipeline's step, pass by pass, as its schedule runs it: when each pass begins, what waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from autoparallel.runtime.message_orders import Messages
from autoparallel.runtime.schedule_orders import BACKWARD, FORWARD, INPUTS, WEIGHTS, Pass

__all__ = [
    "SEND",
    "Held",
    "StageMessages",
    "StageSeconds",
    "Timed",
    "held",
    "held_together",
    "longest_path",
    "most_held",
    "walk",
]

# What a pass waits for beside other passes.
SEND = "send"

_Order = Sequence[Sequence[Pass]]


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """The seconds that one micro-batch takes on one stage.

    forward, backward: of its passes. weights: those of `backward` that only gradients of weights
    take, which a schedule may put off. again: those of `backward` that need no gradient yet, and
    are done while the stage waits for one. send_on, send_back: of what goes to the next stage and,
    as gradients, to the one before.
    """

    forward: float
    backward: float
    weights: float = 0.0
    again: float = 0.0
    send_on: float = 0.0
    send_back: float = 0.0


@dataclass(frozen=True, slots=True)
class Timed:
    """A pass, the rank that computes it, and when it begins and ends, in seconds; when what it
    makes begins to be sent, and has arrived, which are both its end where nothing is sent.
    """

    rank: int
    work: Pass
    start: float
    end: float
    sent: float
    arrived: float


def walk(order: _Order, stages: Sequence[StageSeconds]) -> tuple[Timed, ...]:
    """Return the passes of a step, as they are begun on each rank.

    order: the passes of each rank, as of `schedule_order`. stages: the seconds of each stage.
    Every rank works off its list. A pass begins when its rank is free and what it needs has
    arrived: a rank computes while it sends, and sends one thing after the other.
    Raises ValueError for an order that waits for itself.

    >>> from autoparallel.runtime.schedule_orders import schedule_order
    >>> passes = walk(schedule_order("1f1b", 4, 1, 12), [StageSeconds(1.0, 2.0)] * 4)
    >>> max(each.end for each in passes)
    45.0
    """
    place = {work.stage: rank for rank, passes in enumerate(order) for work in passes}
    count = len(stages)
    free, sending = [0.0] * len(order), [0.0] * len(order)
    next_pass = [0] * len(order)
    # When what a pass hands on has arrived, by whether it is forward, its stage and micro-batch.
    arrived: dict[tuple[bool, int, int], float] = {}
    waiting: dict[tuple[bool, int, int], int] = {}
    timed: list[Timed] = []
    ready = list(range(len(order)))[::-1]
    while ready:
        rank = ready.pop()
        passes = order[rank]
        while next_pass[rank] < len(passes):
            work = passes[next_pass[rank]]
            stage, kind, batch = work.stage, work.kind, work.microbatch
            seconds = stages[stage]
            forward = kind == FORWARD
            neighbour = stage - 1 if forward else stage + 1
            begin = free[rank]
            if kind == WEIGHTS:
                takes, sends = seconds.weights, 0.0
            else:
                if 0 <= neighbour < count:
                    needs = (forward, neighbour, batch)
                    if needs not in arrived:
                        waiting[needs] = rank
                        break
                    begin = max(begin + (0.0 if forward else seconds.again), arrived[needs])
                elif not forward:
                    begin += seconds.again
                takes = seconds.forward if forward else seconds.backward - seconds.again
                takes -= seconds.weights if kind == INPUTS else 0.0
                sends = seconds.send_on if forward else seconds.send_back
            end = begin + takes
            sent = then = end
            if kind != WEIGHTS:
                target = stage + 1 if forward else stage - 1
                if sends and 0 <= target < count and place[target] != rank:
                    sent = max(sending[rank], end)
                    then = sending[rank] = sent + sends
                key = (forward, stage, batch)
                arrived[key] = then
                if key in waiting:
                    ready.append(waiting.pop(key))
            free[rank] = end
            timed.append(Timed(rank, work, begin, end, sent, then))
            next_pass[rank] += 1
    if sum(next_pass) < sum(map(len, order)):
        raise ValueError("a schedule that waits for itself")
    return tuple(timed)


def longest_path(passes: Sequence[Timed]) -> Counter[tuple[str, int]]:
    """Return how many passes of each kind and stage come one after the other until the last one
    ends, none of them beginning later than it has to; and under SEND, how often one waits for what
    is sent between a stage and the one before it.

    passes: as of `walk`. The step takes what these take together, and no less than that where
    stages take other times.

    >>> from autoparallel.runtime.schedule_orders import schedule_order
    >>> passes = walk(schedule_order("gpipe", 2, 1, 3), [StageSeconds(1.0, 2.0)] * 2)
    >>> sorted(longest_path(passes).items())
    [(('B', 0), 3), (('B', 1), 1), (('F', 0), 1), (('F', 1), 3)]
    """
    before: dict[Pass, Timed] = {}
    sent_before: dict[Pass, Timed] = {}
    makers: dict[tuple[bool, int, int], Timed] = {}
    latest: dict[int, Timed] = {}
    latest_sent: dict[int, Timed] = {}
    for each in passes:
        if each.rank in latest:
            before[each.work] = latest[each.rank]
        latest[each.rank] = each
        if each.arrived > each.sent:
            if each.rank in latest_sent:
                sent_before[each.work] = latest_sent[each.rank]
            latest_sent[each.rank] = each
        if each.work.kind != WEIGHTS:
            makers[each.work.kind == FORWARD, each.work.stage, each.work.microbatch] = each
    path: Counter[tuple[str, int]] = Counter()
    now: Timed | None = max(passes, key=lambda each: each.end)
    while now is not None:
        stage, kind = now.work.stage, now.work.kind
        path[kind, stage] += 1
        forward = kind == FORWARD
        key = forward, stage - 1 if forward else stage + 1, now.work.microbatch
        maker, behind = makers.get(key), before.get(now.work)
        waits = behind is None or behind.end < now.start
        if kind == WEIGHTS or maker is None or not waits or maker.arrived < now.start:
            now = behind
            continue
        # A rank sends one thing after the other.
        while maker.arrived > maker.sent:
            path[SEND, max(maker.work.stage, stage)] += 1
            if maker.sent == maker.end:
                break
            maker = sent_before[maker.work]
            stage = maker.work.stage + (1 if maker.work.kind == FORWARD else -1)
        now = maker
    return path


@dataclass(frozen=True, slots=True)
class Held:
    """The numbers of micro-batches that a rank holds of each stage at the moment at which they take
    most. stages: (stage, micro-batches). nbytes: of their activations. messages: the bytes of what
    is received ahead, of gradients that have come, and of those that are being sent, and those that
    a pass takes.
    """

    stages: tuple[tuple[int, int], ...]
    nbytes: float
    messages: float = 0.0


@dataclass(frozen=True, slots=True)
class StageMessages:
    """The bytes that a stage receives, sends and computes with of one micro-batch.

    received: of the stage before. returned: the gradients that come of the stage after. back: those
    that it sends to the one before. between: gradients that are kept until those of the weights are
    computed of them, where a backward pass is in two halves. forward, backward: bytes beyond all
    that is kept, at the worst moment of such a pass; the second half of a backward pass takes none.
    sent: what goes to the next stage and is held until it has arrived; 0 where that is among the
    activations.
    """

    received: float
    returned: float
    back: float
    between: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    sent: float = 0.0

    def taken_by(self, kind: str) -> float:
        """Return the bytes that a pass of a kind takes beyond all that is kept."""
        if kind == WEIGHTS:
            return 0.0
        return self.forward if kind == FORWARD else self.backward


def held(
    order: _Order,
    nbytes: Sequence[float],
    messages: Sequence[Sequence[Messages]] | None = None,
    sizes: Sequence[StageMessages] = (),
) -> tuple[Held, ...]:
    """Return what each rank holds of micro-batches that went forward and not yet all the way back.

    order: see `walk`. nbytes: the activations that each stage keeps of one micro-batch, with what
    it received. Where a backward pass is in two halves, they are kept until the second one; that of
    a whole pass does nothing.
    messages: as of `messages_of`, and sizes: of each stage; without them messages are not counted.

    >>> from autoparallel.runtime.schedule_orders import schedule_order
    >>> [each.nbytes for each in held(schedule_order("1f1b", 3, 1, 8), [10.0] * 3)]
    [30.0, 20.0, 10.0]
    """
    under_way = [
        _messages(passes, messages[rank], sizes) if messages else [0.0] * len(passes)
        for rank, passes in enumerate(order)
    ]
    return tuple(
        max(
            _moments(passes, nbytes, besides),
            key=lambda moment: moment.nbytes + moment.messages,
            default=Held((), 0.0),
        )
        for passes, besides in zip(order, under_way, strict=True)
    )


def most_held(order: _Order) -> tuple[int, ...]:
    """Return how many micro-batches each stage holds at most.

    >>> from autoparallel.runtime.schedule_orders import schedule_order
    >>> most_held(schedule_order("gpipe", 2, 1, 8))
    (8, 8)
    """
    most: dict[int, int] = {}
    for passes in order:
        now: dict[int, int] = {}
        for work in passes:
            if work.kind != INPUTS:
                now[work.stage] = now.get(work.stage, 0) + (1 if work.kind == FORWARD else -1)
                most[work.stage] = max(most.get(work.stage, 0), now[work.stage])
    return tuple(most[stage] for stage in sorted(most))


def held_together(order: _Order) -> tuple[int, ...]:
    """Return how many micro-batches each stage holds when its rank holds most of all of its stages.

    >>> from autoparallel.runtime.schedule_orders import schedule_order
    >>> order = schedule_order("1f1b", 2, 2, 8)
    >>> held_together(order), most_held(order)
    ((3, 2, 2, 1), (4, 3, 2, 1))
    """
    stages = 1 + max(work.stage for passes in order for work in passes)
    most = [1] * stages
    for moment in held(order, [1.0] * stages):
        for stage, batches in moment.stages:
            most[stage] = batches
    return tuple(most)


def _moments(
    passes: Sequence[Pass], nbytes: Sequence[float], messages: Sequence[float]
) -> Iterator[Held]:
    """Yield what a rank holds in each of its passes, beside messages of so many bytes."""
    now: dict[int, int] = {}
    total = 0.0
    halves: set[tuple[int, int]] = set()
    for work, besides in zip(passes, messages, strict=True):
        if work.kind == FORWARD:
            now[work.stage] = now.get(work.stage, 0) + 1
            total += nbytes[work.stage]
        yield Held(tuple(now.items()), total, besides)
        key = work.stage, work.microbatch
        if work.kind == INPUTS:
            halves.add(key)
        elif work.kind == BACKWARD or key in halves:
            now[work.stage] -= 1
            total -= nbytes[work.stage]


def _messages(
    passes: Sequence[Pass], messages: Sequence[Messages], sizes: Sequence[StageMessages]
) -> list[float]:
    """Return the bytes of messages that a rank holds in each of its passes."""
    # Where gradients of weights are computed later, those that they need are kept until then.
    later = {
        (work.stage, work.microbatch): place
        for place, work in enumerate(passes)
        if work.kind == WEIGHTS
    }
    change = [0.0] * (len(passes) + 1)
    for place, (work, message) in enumerate(zip(passes, messages, strict=True)):
        size = sizes[work.stage]
        if work.kind == FORWARD:
            change[message.asked] += size.received
            change[place] -= size.received
            if message.held >= 0:
                change[place] += size.sent
                change[message.held] -= size.sent
        elif work.kind != WEIGHTS:
            between = size.between if work.kind == INPUTS else 0.0
            change[message.asked] += size.returned
            # While they are computed, they are what the pass takes.
            change[place + 1] += between
            key = work.stage, work.microbatch
            until = later.get(key, place) if work.kind == INPUTS else place
            change[until + 1] -= size.returned + between
            if message.held >= 0:
                change[place] += size.back
                change[message.held] -= size.back
    return [
        besides + sizes[work.stage].taken_by(work.kind)
        for work, besides in zip(passes, accumulate(change), strict=False)
    ]
