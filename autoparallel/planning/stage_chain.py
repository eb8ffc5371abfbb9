"""The ops of a whole model, from those of one with few of its equal blocks, and their cuts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.pipeline import send_seconds
from autoparallel.analysis.stage_paces import busy_of
from autoparallel.analysis.timeline import StagePasses
from autoparallel.cost.links import Link
from autoparallel.graph.shortened import Shortened
from autoparallel.planning.quickest_stages import StageTimes
from autoparallel.planning.stage_work import StageBytes, StageWork, cut_within, fewer_places

__all__ = ["StageChain", "chain_of", "mixed", "most_saved", "stays_of"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class StageChain:
    """The ops of the whole model, in order.

    seconds: of each, of one micro-batch, as far as nothing overlaps it; forward: those of its
    forward pass, weights: those that only gradients of weights take; busy_forward, busy_backward:
    those of either pass in which devices work. once: seconds of what is done
    once a step. nbytes, joined: see StageWork. block: the number of the repeated block that each op
    is in, in their order, -1 for none. bytes: see StageBytes. link: between stages.
    """

    seconds: Array
    forward: Array
    weights: Array
    busy_forward: Array
    busy_backward: Array
    once: Array
    nbytes: Array
    joined: NDArray[np.bool_]
    block: NDArray[np.intp]
    bytes: StageBytes
    link: Link

    @property
    def count(self) -> int:
        """The number of repeated blocks."""
        return int(self.block.max(initial=-1)) + 1

    def cut(self, most: Sequence[int], ranks: Sequence[int], limit: float) -> tuple[int, ...]:
        """Return where stages start. most: micro-batches of which each keeps activations. ranks: of
        each stage. limit: bytes of a rank, within which they stay if they can.
        """
        sends, seconds = self._sends(len(most)), self.seconds.tolist()
        return cut_within(seconds, sends, most, ranks, self.bytes, limit)

    def times(self, stages: int, alone: bool) -> StageTimes:
        """Return the seconds of the ops by kind of work, to be cut into so many stages.

        alone: whether each has one rank, so that gradients of weights may be computed later.
        """
        weights = self.weights if alone else np.zeros_like(self.weights)
        kinds = self.forward, self.seconds - self.forward - weights, weights, self.once
        return StageTimes(kinds, self.nbytes.tolist(), self._sends(stages), self.link)

    def _sends(self, stages: int) -> list[float]:
        """Return the seconds that a cut into so many stages sends before each op; infinite where
        there may be none.
        """
        sends = {size: send_seconds(size, self.link) for size in set(self.nbytes.tolist())}
        allowed = [
            math.inf if place and (not size or joined) else sends[size]
            for place, (size, joined) in enumerate(
                zip(self.nbytes[:-1].tolist(), self.joined.tolist(), strict=True)
            )
        ]
        return fewer_places(allowed, stages, self.seconds.tolist())


def chain_of(
    work: StageWork,
    short: Shortened,
    blocks: Mapping[str, int],
    passes: StagePasses,
    updates: float,
    sizes: StageBytes,
    link: Link,
) -> StageChain:
    """Return the ops of the whole model: the repeated run of the short one stands repeatedly.

    work, passes: of the short model. blocks: the number of the block of each of its ops. updates:
    the seconds of what is done once a step. sizes: the bytes of the short model. link: between
    stages.
    """
    runs = {first: (last, times) for first, last, times in short.times}
    index: list[int] = []
    block: list[int] = []
    place, number = 0, -1
    copies: dict[int, int] = {}
    while place < len(work.names):
        last, times = runs.get(work.names[place], (work.names[place], 1))
        end = work.place.get(last, place) + 1
        for at in range(place, end):
            copies[at] = len(index) + (end - place) * (times - 1) + at - place
        for _ in range(times):
            before: int | None = None if times > 1 or not index else _of(blocks, work, index[-1])
            for at in range(place, end):
                of = _of(blocks, work, at)
                number += of is not None and of != before
                before = of
                block.append(-1 if of is None else number)
        index += list(range(place, end)) * times
        place = end
    every = np.array(index)
    # Part of what is sent overlaps, in the short model as in the whole one.
    both, busy = passes.forward + passes.backward, busy_of(passes)
    seconds = np.array(work.seconds)[every] * (both / max(float(sum(work.seconds)), 1e-300))
    return StageChain(
        seconds,
        seconds * (passes.forward / max(both, 1e-300)),
        seconds * (passes.weights / max(both, 1e-300)),
        seconds * (busy.forward / max(both, 1e-300)),
        seconds * (busy.backward / max(both, 1e-300)),
        sizes.stays[every] * (updates / max(float(sizes.stays.sum()), 1.0)),
        np.array([*work.nbytes, 0.0])[np.append(every, len(work.nbytes))],
        np.array(work.joined)[every],
        np.array(block),
        StageBytes(
            sizes.stays[every],
            sizes.kept[every],
            sizes.buffers[np.append(every, len(sizes.buffers) - 1)],
            tuple((copies[one], copies[other], size) for one, other, size in sizes.twice),
            sizes.besides,
        ),
        link,
    )


def stays_of(work: StageWork, short: Shortened, sizes: StageBytes) -> float:
    """Return the bytes of all that stays of the whole model, on the ranks that share its stages.

    work, sizes: of the short model.

    Example: `stays_of(work, short, work.bytes_of(activations=False)) / 4`
    """
    times = np.ones(len(work.names))
    for first, last, count in short.times:
        start = work.place.get(first)
        if start is not None:
            times[start : work.place.get(last, start) + 1] = count
    twice = sum(size * times[other] for _, other, size in sizes.twice)
    return float((sizes.stays * times).sum() - twice)


def _of(blocks: Mapping[str, int], work: StageWork, place: int) -> int | None:
    """Return the number of the block that an op of the short model is in."""
    return blocks.get(work.names[place])


def mixed(one: StageChain, other: StageChain, blocks: Sequence[bool]) -> StageChain:
    """Return the chain of a model of which some blocks are as in another chain, cut as that one.

    one: the chain of those `blocks` that are marked. other: of the rest.
    """
    within = one.block >= 0
    marked = np.zeros(len(one.block), dtype=bool)
    marked[within] = np.array(blocks, dtype=bool)[one.block[within]]
    kept = np.where(marked, one.bytes.kept, other.bytes.kept)
    besides = max(one.bytes.besides, other.bytes.besides)
    return replace(
        other,
        seconds=np.where(marked, one.seconds, other.seconds),
        forward=np.where(marked, one.forward, other.forward),
        weights=np.where(marked, one.weights, other.weights),
        busy_forward=np.where(marked, one.busy_forward, other.busy_forward),
        busy_backward=np.where(marked, one.busy_backward, other.busy_backward),
        bytes=replace(other.bytes, kept=kept, besides=besides),
    )


def most_saved(
    one: StageChain,
    other: StageChain,
    starts: NDArray[np.intp],
    most: Sequence[int],
    ranks: Sequence[int],
    limit: float,
    in_turn: bool,
) -> list[bool]:
    """Return which blocks can be as in a chain that keeps more, so that every rank is in a limit.

    one: the chain that keeps more, other: that which fits. starts: of stages in the latter. most:
    see `StageChain.cut`. ranks: of each stage. in_turn: every stage gets a block in turn; otherwise
    blocks come first of which fewest micro-batches are in flight. None where some rank has no room
    for the other chain.
    """
    count = one.count
    ends = np.array([*starts[1:], len(other.seconds)])
    sizes = other.bytes.sizes(most)
    besides = max(one.bytes.besides, other.bytes.besides)
    used = [besides] * (max(ranks) + 1)
    for stage, rank in enumerate(ranks):
        used[rank] += float(sizes(stage, starts[stage], ends[stage])) - other.bytes.besides
    if max(used) > limit:
        return [False] * count
    stage_of = np.searchsorted(starts, np.arange(len(other.seconds)), side="right") - 1
    within = one.block >= 0
    numbers = one.block[within]
    first = np.full(count, len(most), dtype=np.intp)
    np.minimum.at(first, numbers, stage_of[within])
    last = np.zeros(count, dtype=np.intp)
    np.maximum.at(last, numbers, stage_of[within])
    more = np.bincount(numbers, (one.bytes.kept - other.bytes.kept)[within], count)
    less = np.bincount(numbers, (other.seconds - one.seconds)[within], count)
    marked = [False] * count
    added = more * np.array(most)[np.minimum(first, len(most) - 1)]
    turns: dict[int, int] = {}
    turn = [turns.setdefault(stage, block) for block, stage in enumerate(first.tolist())]

    def place(block: int) -> tuple[float, ...]:
        """Return the place of a block in the order in which they are marked."""
        behind = block - turn[block] if in_turn else 0
        return behind, added[block], block

    for block in sorted(range(count), key=place):
        if first[block] != last[block] or less[block] <= 0:
            continue
        rank = ranks[first[block]]
        if used[rank] + added[block] <= limit:
            used[rank] += added[block]
            marked[block] = True
    return marked
