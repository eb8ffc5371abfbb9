"""Predicted time of collectives, and of moves between placements."""

from __future__ import annotations

from autoparallel.cost.hardware import Hardware, Link
from autoparallel.placement import Collective, Movement

__all__ = ["collective_seconds", "movement_seconds", "together_seconds"]


def collective_seconds(kind: Collective, nbytes: float, link: Link, world_size: int) -> float:
    """Predicted time of one collective over one mesh axis, in seconds.

    nbytes: size of the tensor if this axis did not split it. The library takes the fastest of the
    link's regimes for the size: of each, the hops that follow each other and the bytes that a rank
    sends (`Algorithm.steps`).
    Raises ValueError if nbytes < 0 or world_size < 1.
    """
    if nbytes < 0 or world_size < 1:
        raise ValueError(f"{nbytes} bytes on {world_size} ranks")
    if world_size == 1:
        return 0.0
    lines = link.lines(kind, world_size)
    return min(seconds + nbytes * per_byte for seconds, per_byte in lines)


def together_seconds(kind: Collective, nbytes: float, link: Link, world_size: int) -> float:
    """The same for a collective that is made in one call with others: no latency is counted."""
    if world_size == 1:
        return 0.0
    return nbytes * min(per_byte for _, per_byte in link.lines(kind, world_size))


def movement_seconds(
    move: Movement,
    nbytes: float,
    hardware: Hardware,
    link: Link,
    world_size: int,
    together: bool = False,
) -> float:
    """Predicted time of one move over one mesh axis, in one direction, in seconds.

    nbytes: size of the tensor if this axis did not split it. A slice is a view. A pad or a
    keep-on-first writes the whole tensor once. together: as for `together_seconds`.
    """
    if move.collective is not None:
        seconds = together_seconds if together else collective_seconds
        return seconds(move.collective, nbytes, link, world_size)
    if move in (Movement.PAD, Movement.KEEP_ON_FIRST):
        return nbytes / hardware.sustained_bytes_per_second
    return 0.0
