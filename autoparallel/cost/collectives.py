"""Predicted time of collectives and of conversions between placements."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.cost.hardware import Hardware, Link
from autoparallel.placement import Collective, Movement, Placement, gradient, movement

__all__ = ["collective_seconds", "conversion_seconds", "movement_seconds"]


def collective_seconds(kind: Collective, nbytes: float, link: Link, world_size: int) -> float:
    """Predicted time of one ring collective, in seconds.

    nbytes: size of the full tensor. An all-reduce passes the ring twice, all others once:
    steps (p-1) or 2 (p-1), each of nbytes / p bytes over the link and one hop's latency; in a step
    of an all-to-all a rank sends only what one other rank needs, nbytes / p**2.
    Raises ValueError if nbytes < 0 or world_size < 1.
    Source: Patarasuk & Yuan 2009, bandwidth-optimal all-reduce; nccl-tests' bus bandwidth.
    """
    if nbytes < 0 or world_size < 1:
        raise ValueError(f"{nbytes} bytes on {world_size} ranks")
    if world_size == 1:
        return 0.0
    steps = (2 if kind is Collective.ALL_REDUCE else 1) * (world_size - 1)
    part = nbytes / world_size
    if kind is Collective.ALL_TO_ALL:
        part /= world_size
    per_step = part / link.bytes_per_second + link.hop_seconds
    return link.floor_seconds + steps * per_step


def movement_seconds(move: Movement, nbytes: float, hardware: Hardware, world_size: int) -> float:
    """Predicted time of one move of a tensor of `nbytes` bytes in full, in seconds.

    A slice is a view. A pad or a keep-on-first writes the whole tensor once.
    """
    if move.collective is not None:
        return collective_seconds(move.collective, nbytes, hardware.link, world_size)
    if move in (Movement.PAD, Movement.KEEP_ON_FIRST):
        return nbytes / hardware.memory_bytes_per_second
    return 0.0


def conversion_seconds(
    source: Placement,
    target: Placement,
    nbytes: float,
    requires_grad: bool,
    hardware: Hardware,
    world_size: int,
    together: bool = False,
) -> float:
    """Predicted time, forward and backward, of converting a tensor from source to target.

    together: the collectives are made in one call with others, whose latency is not counted.
    """
    if together:
        free = Link(hardware.link.bytes_per_second, 0.0, 0.0)
        hardware = replace(hardware, link=free)
    seconds = movement_seconds(movement(source, target), nbytes, hardware, world_size)
    if requires_grad:
        back = movement(gradient(target), gradient(source))
        seconds += movement_seconds(back, nbytes, hardware, world_size)
    return seconds
