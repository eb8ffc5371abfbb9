"""The moments of a step at which bytes are counted, before it is known which is the worst."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

from autoparallel.cost.op_costs import nbytes
from autoparallel.strategy.recompute_modes import Recomputation
from autoparallel.strategy.saved_activations import SavedActivations

__all__ = ["BEGINNING", "Left", "Moment", "Phase", "likely_moment", "moment_of"]


class Phase(Enum):
    """The state of what a block runs again, at some moment of the backward pass.

    WAITING: it has not been run again yet. AGAIN: it has, and all that it saves is there. OVER:
    some of it, or all, is needed no longer.
    """

    WAITING = "waiting"
    AGAIN = "again"
    OVER = "over"


class Left(Enum):
    """The share of those that save a value whose backward has not run at some moment."""

    ALL = "all"
    SOME = "some"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment of the backward pass: that of the backward of one call.

    call: its name; "" for the beginning of the backward pass. place: of the call among the graph's
    nodes; of the beginning, behind all of them. block: of the recomputed blocks, the number of the
    one that the call belongs to; None for none.
    """

    call: str
    place: float
    block: int | None = None

    def phase(self, recomputation: Recomputation, block: int, mode: str) -> Phase:
        """Return the phase of a block that is recomputed by a mode.

        Regions run again before the backward of their last op. What is made again op by op is
        there when it is needed, which is not followed: within such a block nothing is counted on.
        """
        run = recomputation.blocks[block]
        first, last = run.start, run.stop - 1
        group = recomputation.groups[block][mode]
        if group:
            names = [node.name for node in recomputation.graph.nodes[run.start : run.stop]]
            first = run.start + names.index(group[0])
            last = run.start + names.index(group[-1])
        elif mode == "none":
            return Phase.WAITING
        if self.place > last:
            return Phase.WAITING
        return Phase.AGAIN if group and self.place >= first else Phase.OVER

    def left(self, needed: list[float]) -> Left:
        """Return how many of those that save a value still need it.

        needed: per reader of the value, the place of the first call whose backward needs it from
        there; +inf where none does.
        """
        savers = [place for place in needed if place < math.inf]
        count = sum(place <= self.place for place in savers)
        if count == len(savers):
            return Left.ALL
        return Left.SOME if count else Left.NONE


# Where nothing is known of a graph: when its forward pass is done.
BEGINNING = Moment("", math.inf)


def moment_of(recomputation: Recomputation, call: str) -> Moment:
    """Return the moment of a call's backward. call: "" for the beginning of the backward pass."""
    places = {node.name: at for at, node in enumerate(recomputation.graph.nodes)}
    return Moment(call, places[call], recomputation.block_of(call)) if call else BEGINNING


def likely_moment(saved: SavedActivations, recomputation: Recomputation) -> Moment:
    """Return the moment at which a plan is likely to take most, if no block is run again.

    It is found as if all tensors were split alike, so that ranks do not matter.
    Example: `likely_moment(SavedActivations(graph, rules), recomputation)`
    """
    graph = saved.graph
    places = {node.name: at for at, node in enumerate(graph.nodes)}
    kept = sorted(_kept(saved, recomputation, places))
    ends = [place for place, _ in kept]
    sums = [0.0, *accumulate(size for _, size in kept)]
    most, moment = sums[-1], BEGINNING
    for node in reversed(graph.calls):
        # The gradient of a view is that of what it is a view of.
        is_view = any(alias is not None for alias in saved.of(node.name).aliases)
        if is_view or node.name in recomputation.place:
            continue
        place = places[node.name]
        total = saved.whole_gradient_nbytes(node) + sums[bisect_right(ends, place)]
        if total > most:
            most, moment = total, Moment(node.name, place)
    return moment


def _kept(
    saved: SavedActivations, recomputation: Recomputation, places: dict[str, int]
) -> Iterator[tuple[float, float]]:
    """Yield the bytes that calls outside of blocks save, unsplit, behind the place of the call down
    to which they are needed; -1 for what the caller holds.
    """
    graph = saved.graph
    first: dict[str, float] = {}
    for node in graph.calls:
        if node.name in recomputation.place:
            continue
        yield places[node.name], saved.of(node.name).internal_nbytes({})
        for root in saved.saved_by(node):
            first.setdefault(root, -1.0 if root in graph.outputs else places[node.name])
    for root, place in first.items():
        yield place, nbytes(graph.values[root])
