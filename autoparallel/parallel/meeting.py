"""Ranks of one start meet, past what a start before them has left.

torchrun starts all ranks of a job again when one has died, and keeps the store through which they
find each other: a rank may read there the address of a process that is gone. On one machine the
number of the restart would tell the starts apart; on several each agent counts for itself. So the
ranks agree on a name: rank 0 makes one up and shows it, each other rank answers with one of its
own, and goes on when rank 0 has repeated it. What is left of an earlier start repeats no name of
this one.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from autoparallel.errors import AutoParallelError

__all__ = ["meet", "start_process_group"]

# Torch's own default for groups of processes on CPUs.
_PATIENCE = timedelta(minutes=30)
_LOOK_AGAIN_SECONDS = 0.05


def start_process_group(backend: str, timeout: timedelta | None = None) -> None:
    """Start torch's default group of the processes that a launcher has started.

    backend: "gloo" or "nccl". timeout: of meeting and of each collective, by default torch's own.
    Raises AutoParallelError that names the ranks that have not come.

    Example: `start_process_group("gloo")`
    """
    patience = timeout or _PATIENCE
    store, rank, world_size = next(rendezvous("env://", timeout=patience))
    store.set_timeout(patience)
    dist.init_process_group(
        backend,
        store=meet(store, rank, world_size, patience),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def meet(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return a part of the store that is of the ranks of this start alone.

    store: that of all starts. Raises AutoParallelError, on rank 0 and on those that have come, when
    some have not come in time; rank 0 names them.

    >>> meet(dist.HashStore(), 0, 1, timedelta(seconds=1)).num_keys()
    2
    """
    place, own = dist.PrefixStore("autoparallel/meeting", store), uuid.uuid4().hex
    end = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = own
        _lead(place, name, world_size, end)
    else:
        name = _join(place, own, rank, end)
    return dist.PrefixStore(f"autoparallel/start/{name}", store)


def _lead(place: dist.Store, name: str, world_size: int, end: float) -> None:
    """Show the name of this start, and repeat the names of those that come."""
    place.set("leader", name)
    waited = {rank: f"{name}/{rank}" for rank in range(1, world_size)}
    while missing := {rank: key for rank, key in waited.items() if not place.check([key])}:
        if time.monotonic() > end:
            listed = ", ".join(map(str, list(missing)[:8]))
            raise AutoParallelError(
                f"{len(missing)} of {world_size} ranks have not come: {listed}",
                why="they have not started, or cannot reach this one's machine",
                fix="see what these ranks say; give all machines the same launch options",
            )
        waited = missing
        time.sleep(_LOOK_AGAIN_SECONDS)
    come = {rank: place.get(f"{name}/{rank}").decode() for rank in range(1, world_size)}
    place.set(f"{name}/all", json.dumps(come))


def _join(place: dist.Store, own: str, rank: int, end: float) -> str:
    """Answer whoever leads until one has repeated this rank's own name; return the leader's."""
    answered = ""
    while time.monotonic() < end:
        leader = place.get("leader").decode() if place.check(["leader"]) else ""
        if leader and leader != answered:
            place.set(f"{leader}/{rank}", own)
            answered = leader
        if leader and place.check([f"{leader}/all"]):
            come = json.loads(place.get(f"{leader}/all").decode())
            if come.get(str(rank)) == own:
                return leader
        time.sleep(_LOOK_AGAIN_SECONDS)
    raise AutoParallelError(
        f"rank {rank} has not met the others",
        why="rank 0, or another one, has not come" if answered else "rank 0 has not come",
        fix="see what the other ranks say; give all machines the same launch options",
    )
