"""Links between devices: the regimes in which a library does collectives over them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from autoparallel.placement import Collective

__all__ = ["Algorithm", "Link", "Regime", "joined"]

# What a rank sends to its neighbours alone.
_TO_NEIGHBOURS = (Collective.RING_PASS, Collective.EDGE_EXCHANGE)
_BOTH_WAYS = 2  # An all-reduce is a reduce-scatter and an all-gather.


class Algorithm(Enum):
    """The algorithm of a collective: hops that follow each other, and bytes that a rank sends."""

    RING = "ring"
    TREE = "tree"
    SWITCH = "switch"
    EXCHANGE = "exchange"

    def steps(self, kind: Collective, world_size: int) -> tuple[int, float] | None:
        """Return hops one after the other, and the share of the full tensor that a rank sends.

        kind: the collective. world_size: the ranks n. None where the algorithm cannot do the
        collective.
        RING: everything but an all-to-all; every part passes all ranks (Patarasuk & Yuan 2009).
        TREE: an all-reduce, up and down again (Sanders et al. 2009). SWITCH: an all-reduce added up
        by the switch; a rank sends the whole to be added and its own part of the sum to all.
        EXCHANGE: what ranks send each other directly.

        >>> Algorithm.RING.steps(Collective.ALL_REDUCE, 4)
        (6, 1.5)
        """
        n = world_size
        if self is Algorithm.EXCHANGE:
            return {
                Collective.ALL_TO_ALL: (n - 1, (n - 1) / n**2),
                Collective.RING_PASS: (n - 1, (n - 1) / n),
                Collective.EDGE_EXCHANGE: (1, 1.0),
            }.get(kind)
        if self is Algorithm.RING and kind in (Collective.ALL_GATHER, Collective.REDUCE_SCATTER):
            return n - 1, (n - 1) / n
        if kind is not Collective.ALL_REDUCE:
            return None
        if self is Algorithm.RING:
            return _BOTH_WAYS * (n - 1), _BOTH_WAYS * (n - 1) / n
        if self is Algorithm.TREE:
            return _BOTH_WAYS * math.ceil(math.log2(n)), float(_BOTH_WAYS)
        return _BOTH_WAYS, (n + 1) / n


@dataclass(frozen=True, slots=True)
class Regime:
    """One way in which a library does collectives: an algorithm and its protocol.

    bytes_per_second: the rate at which a rank sends at large sizes. hop_seconds: latency of a hop.
    floor_seconds: of starting. protocol: its name, by which regimes inside a node and between nodes
    belong together. collectives: those that it is for, by name, if not for all that the algorithm
    can do: a library may do one in a better way than another. neighbour_bytes_per_second: the rate
    at which a rank sends to the next one, where that is another one.
    """

    algorithm: Algorithm
    bytes_per_second: float
    hop_seconds: float
    floor_seconds: float
    protocol: str = ""
    collectives: tuple[str, ...] = ()
    neighbour_bytes_per_second: float = 0.0

    @property
    def way(self) -> tuple[Algorithm, str, tuple[str, ...]]:
        """The key by which a regime inside a node and one between nodes belong together."""
        return self.algorithm, self.protocol, self.collectives

    def makes(self, kind: Collective) -> bool:
        """Return whether the regime can make the collective, and is for it."""
        able = self.algorithm.steps(kind, 2) is not None
        # What sends to all others can send to one.
        kinds = (kind, Collective.ALL_TO_ALL) if kind in _TO_NEIGHBOURS else (kind,)
        return able and (
            not self.collectives or any(each.value in self.collectives for each in kinds)
        )

    def rate(self, kind: Collective) -> float:
        """Return the bytes per second at which a rank sends in a collective."""
        return (kind in _TO_NEIGHBOURS and self.neighbour_bytes_per_second) or self.bytes_per_second


@dataclass(frozen=True)
class Link:
    """The connection of a mesh axis. A collective takes the fastest regime for its size."""

    regimes: tuple[Regime, ...]

    @staticmethod
    def ring(bytes_per_second: float, hop_seconds: float, floor_seconds: float) -> Link:
        """Return a link with rings alone, and direct exchange at the same rate."""
        return Link(
            tuple(
                Regime(algorithm, bytes_per_second, hop_seconds, floor_seconds)
                for algorithm in (Algorithm.RING, Algorithm.EXCHANGE)
            )
        )

    @cached_property
    def _makers(self) -> Mapping[Collective, tuple[tuple[Algorithm, tuple[Regime, ...]], ...]]:
        """Per collective the regimes that can make it, neighbours of one algorithm together."""
        return {
            kind: tuple(
                (algorithm, tuple(regimes))
                for algorithm, regimes in itertools.groupby(
                    (regime for regime in self.regimes if regime.makes(kind)),
                    key=lambda regime: regime.algorithm,
                )
            )
            for kind in Collective
        }

    def lines(self, kind: Collective, world_size: int) -> tuple[tuple[float, float], ...]:
        """Return (seconds, seconds per byte of the full tensor) of every regime that can make it.

        The time of each regime is a line over the size; the fastest at a size is the lowest line.
        """
        lines: list[tuple[float, float]] = []
        for algorithm, regimes in self._makers[kind]:
            steps = algorithm.steps(kind, world_size)
            assert steps is not None, (algorithm, kind)
            hops, sent = steps
            lines += [
                (
                    regime.floor_seconds + hops * regime.hop_seconds,
                    sent / regime.rate(kind),
                )
                for regime in regimes
            ]
        return tuple(lines)


def joined(near: Regime, far: Regime, size: int, members: int, nodes: int) -> Regime:
    """Return a regime over several nodes: the slower part's rate, a hop's mean latency.

    near, far: the regime inside a node and between nodes. size: ranks on the axis. members: of them
    in one node. nodes: how many nodes. A ring goes through each node once, entering by the network.
    A tree is a chain in each node and a tree between nodes. In an exchange a device's own share
    carries all that leaves its node.
    """
    # All members of a node send through their own network shares at once.
    rate, hop = far.bytes_per_second * members, near.hop_seconds
    if near.algorithm is Algorithm.TREE:
        hops = (members - 1) * near.hop_seconds + math.ceil(math.log2(nodes)) * far.hop_seconds
        # `Algorithm.steps` counts log2(size) hops each way: the mean latency makes these add up.
        hop = hops / math.ceil(math.log2(size))
    elif nodes > 1:
        hop = ((size - nodes) * near.hop_seconds + (nodes - 1) * far.hop_seconds) / (size - 1)
    if near.algorithm is Algorithm.EXCHANGE and nodes > 1:
        rate = far.bytes_per_second * (size - 1) / (size - members)
    floor = max(near.floor_seconds, far.floor_seconds)
    rate = min(rate, near.bytes_per_second)
    # The last member of a node sends to the next node by its own share of the network.
    next_rate = min(far.bytes_per_second, near.bytes_per_second) if nodes > 1 else 0.0
    return Regime(near.algorithm, rate, hop, floor, near.protocol, near.collectives, next_rate)
