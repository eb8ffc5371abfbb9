"""The seconds, bytes and sends that a planned model's ops bring to the stages that compute them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.abstract_execution import AbstractExecution
from autoparallel.analysis.liveness import Liveness
from autoparallel.analysis.memory_account import resident
from autoparallel.analysis.observed_runs import Seen
from autoparallel.cost.op_costs import nbytes
from autoparallel.graph.graph import Graph
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.plan import Plan
from autoparallel.rewrite.stages import Cut
from planners import InfeasibleError, partition

__all__ = ["StageBytes", "StageWork", "cut_within", "fewer_places"]

# A cut that sends less is taken where the longest stage takes no more than so many times the least:
# it is what all micro-batches wait for, and what is sent is in its seconds.
_NEAR = 1.01

# Sums of bytes in another order differ by less than this share.
_ROUNDING = 1e-9

# Chains of more places than these, for each stage, are cut at those that send least nearby.
_PLACES_EACH, _FEWEST_PLACES = 8, 400


def fewer_places(sends: list[float], stages: int, seconds: Sequence[float]) -> list[float]:
    """Return the same costs of cuts with fewer places: of those within a small part of a stage, the
    one that sends least.

    seconds: of each piece of work.

    >>> fewer_places([0.0, 2.0, 1.0], stages=2, seconds=[1.0, 1.0, 1.0])
    [0.0, 2.0, 1.0]
    """
    most = max(_PLACES_EACH * stages, _FEWEST_PLACES)
    if sum(map(math.isfinite, sends)) <= most:
        return sends
    begins = list(accumulate(seconds, initial=0.0))
    window = max(begins[-1], 1e-300) / most
    best: dict[int, int] = {}
    for place, cost in enumerate(sends):
        number = min(int(begins[place] / window), most - 1)
        if place and math.isfinite(cost) and cost < sends[best.setdefault(number, place)]:
            best[number] = place
    kept = {0, *best.values()}
    return [cost if place in kept else math.inf for place, cost in enumerate(sends)]


def cut_within(
    seconds: Sequence[float],
    allowed: Sequence[float],
    held: Sequence[int],
    ranks: Sequence[int],
    sizes: StageBytes | None,
    limit: float,
    owners: Sequence[Collection[int] | None] | None = None,
) -> tuple[int, ...]:
    """Return where stages start that take equal times and, if there are such, fit in a limit.

    seconds, allowed: of the ops, and what a cut before each sends, see `partition`. held: micro-
    batches of which each stage keeps activations. ranks: of each stage. sizes: bytes of the ops,
    None without a limit. limit: bytes of a rank. owners: see `partition`.
    Where the most even cut does not fit, each stage has its share of the limit; where none fits in
    these, the most even cut it is, and by how much it does not fit is told by its account.
    Raises InfeasibleError where there is no cut.
    """
    even = partition(seconds, allowed, len(held), owners, near=_NEAR)
    if sizes is None or sizes.needs(held, ranks, even) <= limit:
        return even
    places = [place for place, cost in enumerate(allowed) if math.isfinite(cost)]
    if not sizes.may_fit(held, ranks, limit, places):
        return even
    try:
        fits = sizes.fits(held, ranks, limit)
        return partition(seconds, allowed, len(held), owners, fits, _NEAR)
    except InfeasibleError:
        return even


class StageWork:
    """The ops that stages compute, in order, and what a cut before each of them sends.

    names: of the ops. seconds: of each with the conversions that it is the first to read, and its
    share of what is done once a step. ahead: the share of its seconds that the forward pass takes.
    nbytes: that a rank sends where a stage starts with the op.
    joined: whether the op is recomputed together with the one before it.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        inert = inert_calls(graph)
        self.graph, self.plan = graph, plan
        self.sizes = tuple(size for _, size in plan.mesh.axes)
        self.names = [node.name for node in graph.calls if node.name not in inert]
        self.place = {name: number for number, name in enumerate(self.names)}
        choices = {op.name: op for op in plan.ops}
        self.seconds = [choices[name].seconds for name in self.names]
        self.ahead = [
            choices[name].forward_seconds / max(choices[name].seconds, 1e-300)
            for name in self.names
        ]
        for row in plan.conversions:
            reader = self.place.get(row.readers[0], len(self.names) - 1)
            self.seconds[reader] += row.seconds
        self.readers = {
            node.target: [
                self.place[reader.name]
                for reader in graph.readers[node.result.name]
                if reader.name in self.place
            ]
            for node in graph.nodes
            if node.kind == "parameter"
        }
        self.nbytes = self._crossing()
        groups = {name: number for number, group in enumerate(plan.recomputed) for name in group}
        pairs = zip([None, *self.names], self.names, strict=False)
        self.joined = [
            other is not None and name in groups and groups.get(other) == groups[name]
            for other, name in pairs
        ]

    def kinds(self, alone: bool) -> tuple[NDArray[np.float64], ...]:
        """Return the seconds of the ops by kind of work, as of `path_of`.

        alone: whether a stage has one rank, so that gradients of weights may be computed later:
        half of what goes back, as for products.
        """
        seconds = np.array(self.seconds)
        forward = seconds * np.array(self.ahead)
        weights = (seconds - forward) / 2 if alone else np.zeros_like(seconds)
        return forward, seconds - forward - weights, weights, np.zeros_like(seconds)

    def _crossing(self) -> list[float]:
        """Return, for each op, the bytes of the values that are made before it and read from it on.

        Each op is a stage of its own here: a cut between two of them sends what goes from one side
        to the other.
        """
        cut = Cut(self.graph, self.plan, self.names)
        change = np.zeros(len(self.names) + 1)
        for name, (first, last) in cut.spans.items():
            if first == last:
                continue
            value = self.graph.values[name]
            layout = cut.travelling[name]
            part = nbytes(value) * layout_fraction(value.shape, layout, self.sizes)
            change[first + 1] += part
            change[last + 1] -= part
        running = np.cumsum(change)[:-1]
        return [float(size) if size > 0.5 else 0.0 for size in running]

    def owners(
        self, holders: Mapping[str, Collection[int]], ranks: Sequence[int]
    ) -> list[Collection[int] | None]:
        """Return the stages that may compute each op: those on ranks with the parameters it reads.

        holders: those ranks, by path. ranks: of each stage.
        """
        owners: list[Collection[int] | None] = []
        calls = {node.name: node for node in self.graph.calls}
        for name in self.names:
            able: Collection[int] | None = None
            for operand in calls[name].operands():
                node = self.graph.producers[operand]
                if node.kind == "parameter":
                    held = holders.get(node.target, ())
                    some = {stage for stage, rank in enumerate(ranks) if rank in held}
                    able = some if able is None else some & set(able)
            owners.append(able)
        return owners

    def bytes_of(self, activations: bool = True, seen: Seen | None = None) -> StageBytes:
        """Return the bytes that ops bring to a stage. activations: whether to count those, which
        takes longest. seen: as of AbstractExecution.
        """
        count = len(self.names)
        stays, kept = np.zeros(count), np.zeros(count)
        twice: list[tuple[int, int, float]] = []
        for row in self.plan.parameters:
            whole = replace(row, gradient=row.storage)
            trained = self.graph.values[row.name].requires_grad
            size = sum(item.nbytes for item in resident(whole, self.plan, trained))
            readers = sorted(self.readers[row.path])
            stays[readers] += size
            # A stage with several readers has the parameter once.
            twice += [(one, other, size) for one, other in pairwise(readers)]
        buffers = np.array([0.0, *self.nbytes[1:], 0.0])
        if not activations:
            return StageBytes(stays, kept, buffers, tuple(twice), 0.0)
        walk = AbstractExecution(
            self.graph, self.plan, self.plan.recomputed, seen=seen, remade=self.plan.remade
        )
        liveness = Liveness(walk)
        place = 0
        places = []
        for moment in walk.moments:
            place = max(place, self.place.get(moment.node, 0))
            places.append(place)
        for number in liveness.saved:
            storage = walk.storages[number]
            if storage.born < len(places):
                kept[places[storage.born]] += storage.nbytes
        there = sum(s.nbytes for s in walk.storages if s.kind in ("input", "buffer"))
        return StageBytes(stays, kept, buffers, tuple(twice), there + liveness.temporary)


@dataclass(frozen=True)
class StageBytes:
    """The bytes that each op, in order, brings to the stage that computes it.

    stays: of the parameters that it reads, with gradients and optimizer state. kept: of what is
    saved of a micro-batch. buffers: by place, of what a cut there sends for one. twice: (op, op,
    bytes) of a parameter that both read. besides: bytes of any stage.
    """

    stays: NDArray[np.float64]
    kept: NDArray[np.float64]
    buffers: NDArray[np.float64]
    twice: tuple[tuple[int, int, float], ...]
    besides: float

    def limits(
        self, held: Sequence[int], ranks: Sequence[int], limit: float
    ) -> NDArray[np.float64]:
        """Return the bytes that each stage may take, so that those of a rank take no more than its
        limit: as much of it as the stage would take of what they all do, if stages were equal.

        held: micro-batches of which each stage keeps activations. ranks: of each stage. limit: of a
        rank, in bytes.
        """
        buffers = float(self.buffers[self.buffers > 0].min(initial=math.inf))
        batches = np.array(held)
        needs = (float(self.stays.sum()) + batches * float(self.kept.sum())) / len(held)
        needs = needs + (batches + 3) * (buffers if math.isfinite(buffers) else 0.0)
        needs = np.maximum(needs, 1.0)
        places = np.array(ranks)
        shares: NDArray[np.float64] = needs / np.bincount(places, needs)[places]
        limits: NDArray[np.float64] = self.besides + (limit - self.besides) * shares
        return limits

    def may_fit(
        self, held: Sequence[int], ranks: Sequence[int], limit: float, places: Sequence[int]
    ) -> bool:
        """Return False where no cut fits, as is known without a look for one.

        held, ranks, limit: see `limits`. places: where stages may start. Stages that each take as
        many ops as they have room for, beside the smallest messages, come as far as any do.
        """
        stays, at, last = self.stays.copy(), 0, len(self.stays)
        for _, other, again in self.twice:
            stays[other] -= again
        stays, kept = (np.concatenate([[0.0], np.cumsum(each)]) for each in (stays, self.kept))
        ends = np.append(np.array(places, dtype=np.intp)[1:], last)
        least = float(self.buffers[ends[:-1]].min(initial=math.inf))
        rooms = self.limits(held, ranks, limit) - self.besides
        for run, (batches, room) in enumerate(zip(held, rooms.tolist(), strict=True)):
            messages = (batches + 2) * (run > 0) + (run < len(held) - 1)
            taken = stays + batches * kept
            most = taken[at] + room - (messages * least if messages else 0.0)
            able = int(np.searchsorted(taken[ends], most + _ROUNDING * abs(most), side="right"))
            at = max(at, int(ends[able - 1]) if able else 0)
        return at == last

    def fits(
        self, held: Sequence[int], ranks: Sequence[int], limit: float
    ) -> Callable[[int, NDArray[np.intp], NDArray[np.intp]], NDArray[np.bool_]]:
        """Return a function that says which runs of ops fit in a limit as a stage, for `partition`.

        held, ranks, limit: see `limits`.
        """
        size_of, limits = self.sizes(held), self.limits(held, ranks, limit)

        def able(run: int, starts: NDArray[np.intp], ends: NDArray[np.intp]) -> NDArray[np.bool_]:
            """Say which of these runs fit."""
            fits: NDArray[np.bool_] = size_of(run, starts, ends) <= limits[run]
            return fits

        return able

    def needs(self, held: Sequence[int], ranks: Sequence[int], starts: Sequence[int]) -> float:
        """Return the bytes of the rank that needs most.

        held, ranks: see `limits`. starts: of the stages, the first at 0.
        """
        size_of, used = self.sizes(held), [self.besides] * (max(ranks) + 1)
        for run, (start, end) in enumerate(pairwise((*starts, len(self.stays)))):
            size = size_of(run, np.array(start), np.array(end))
            used[ranks[run]] += float(size) - self.besides
        return max(used)

    def sizes(
        self, held: Sequence[int]
    ) -> Callable[[int, NDArray[np.intp], NDArray[np.intp]], NDArray[np.float64]]:
        """Return a function that tells the bytes of runs of ops as a stage. held: as of `fits`."""
        stays = np.concatenate([[0.0], np.cumsum(self.stays)])
        kept = np.concatenate([[0.0], np.cumsum(self.kept)])

        def size_of(
            run: int, starts: NDArray[np.intp], ends: NDArray[np.intp]
        ) -> NDArray[np.float64]:
            """Tell the bytes of these runs as one of the stages."""
            size = stays[ends] - stays[starts] + held[run] * (kept[ends] - kept[starts])
            # What came in is held with what is saved of it. Beside these there are what comes in
            # next, a gradient that is held until it is sent, and one that comes back.
            size = size + (held[run] + 2) * self.buffers[starts] + self.buffers[ends]
            size = size + self.besides
            for one, other, again in self.twice:
                size = size - again * ((starts <= one) & (other < ends))
            found: NDArray[np.float64] = size
            return found

        return size_of
