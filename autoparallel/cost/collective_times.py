"""Seconds of collectives, and of single steps between placements."""

from __future__ import annotations

from autoparallel.cost.hardware import Hardware, Link
from autoparallel.placement import Collective, Movement

__all__ = ["collective_seconds", "movement_seconds", "together_seconds"]


def collective_seconds(kind: Collective, nbytes: float, link: Link, world_size: int) -> float:
    """Return the predicted seconds of one collective over one mesh axis.

    kind: the collective. nbytes: size of the tensor if this axis did not split it. link: of the
    axis. world_size: ranks on the axis. The library takes the fastest of the link's regimes for the
    size: of each, latencies of the hops that follow each other plus the bytes that a rank sends
    (`Algorithm.steps`; the alpha-beta model of Hockney 1994).
    Raises ValueError if nbytes < 0 or world_size < 1.

    >>> link = Link.ring(bytes_per_second=1e9, hop_seconds=0.0, floor_seconds=0.0)
    >>> collective_seconds(Collective.ALL_REDUCE, 1e9, link, world_size=2)
    1.0
    """
    if nbytes < 0 or world_size < 1:
        raise ValueError(f"{nbytes} bytes on {world_size} ranks")
    if world_size == 1:
        return 0.0
    lines = link.lines(kind, world_size)
    return min(seconds + nbytes * per_byte for seconds, per_byte in lines)


def together_seconds(kind: Collective, nbytes: float, link: Link, world_size: int) -> float:
    """Return the seconds of a collective that is done in one call with others.

    Only its bytes count, no latency: a gradient bucket pays the latency once for all its gradients.
    Arguments as of `collective_seconds`.
    """
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
    """Return the predicted seconds of one step over one mesh axis, in one direction.

    move: what the step does. nbytes: size of the tensor if this axis did not split it. together:
    the collective is done in one call with others, see `together_seconds`. A slice is a view. A pad
    or a keep-on-first writes the whole tensor once.
    """
    if move.collective is not None:
        seconds = together_seconds if together else collective_seconds
        return seconds(move.collective, nbytes, link, world_size)
    if move in (Movement.PAD, Movement.KEEP_ON_FIRST):
        return nbytes / hardware.sustained_bytes_per_second
    return 0.0
