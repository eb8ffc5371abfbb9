"""A group of gloo in which the hosts of ranks exchange what they know, beside NCCL.

It may not be possible: a host has no such network, or lets no connections through. That may be so
on one host alone, whose peers would wait for it, and later go another way than it. So the ranks
tell each other, in the group that they have, whether each could make such a group by itself, and
then whether each has made it; all of them have it, or none does.
"""

from __future__ import annotations

import logging
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autoparallel.parallel.launch import communication_device
from autoparallel.runtime.groups import ProcessGroup
from autoparallel.support.torch_private import default_store, gloo_ranks, set_patience

__all__ = ["host_group", "require_gloo"]

_log = logging.getLogger(__name__)
# How long connections are waited for. All ranks are there when they begin.
_CONNECTING = timedelta(minutes=5)
# Torch's own default for collectives of gloo.
_WAITING = timedelta(minutes=30)


def host_group(group: ProcessGroup) -> Any:
    """Return gloo's group of the same ranks, None on all of them where one cannot have it.

    A collective call. Collectives in it wait as long as those of the group do. Why there is none is
    logged by the ranks that cannot have it, and which these are by rank 0.

    Example: `host_group(ProcessGroup(torch.distributed.group.WORLD))`
    """
    trouble = None
    try:
        require_gloo()
    except Exception as error:
        trouble = error
    # The name is new, so that nothing in the store is of another group.
    rows = _told(group, trouble, uuid.uuid4().int >> 66)
    hosts = None
    if all(can for can, _ in rows):
        store = dist.PrefixStore(f"autoparallel/hosts/{rows[0][1]}", default_store())
        try:
            hosts = gloo_ranks(store, group.rank, group.world_size, _CONNECTING)
            set_patience(hosts, group.process_group, _WAITING)
        except Exception as error:  # no way between these hosts but that of the GPUs, say
            trouble = error
        rows = _told(group, trouble)
    without = [str(rank) for rank, (can, _) in enumerate(rows) if not can]
    if not without:
        return hosts
    what = "the ranks do not compare how they are called"
    if trouble is not None:
        _log.warning("%s: no gloo group on rank %d: %s", what, group.rank, trouble)
    elif group.rank == 0:
        _log.warning("%s: no gloo group on rank %s", what, ", ".join(without))
    return None


def require_gloo() -> None:
    """Raise what keeps this process from being in a group of gloo, if anything on its host does.

    >>> require_gloo()
    """
    gloo_ranks(dist.HashStore(), 0, 1, _CONNECTING)


def _told(group: ProcessGroup, trouble: Exception | None, word: int = 0) -> list[list[int]]:
    """Return whether each rank is without trouble, and its word. A collective call."""
    mine = torch.tensor([trouble is None, word], device=communication_device())
    rows: list[list[int]] = group.all_gather(mine).tolist()
    return rows
