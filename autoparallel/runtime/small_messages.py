"""A few whole numbers of each rank, which all ranks are to know.

A collective of gloo is handed to a thread of gloo's, which hands back the result: for a hundred
bytes, that is most of the time. Sends and receives are begun and waited for where they are called,
and take a fifth of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from autoparallel.runtime.faults import explained, is_lost
from autoparallel.runtime.groups import Group, ProcessGroup

__all__ = ["gather_numbers"]

# Of messages between these ranks no other have this number.
_TAG = 0x6175746F


def gather_numbers(group: Group, numbers: Sequence[int]) -> list[list[int]]:
    """Return the numbers of all ranks, rank by rank. A collective call.

    numbers: as many on each rank, each of 64 bits. Raises AutoParallelError if a rank is gone.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> gather_numbers(SingleGroup(), [3, 1])
    [[3, 1]]
    """
    if not isinstance(group, ProcessGroup) or not _is_gloo(group):
        rows: list[list[int]] = group.all_gather(torch.tensor(numbers)).tolist()
        return rows
    try:
        return _passed_on(group, numbers)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise explained(error, "all_gather", group.process_group) from error


def _is_gloo(group: ProcessGroup) -> bool:
    """Return whether gloo alone communicates."""
    return dist.get_backend(group.process_group) == "gloo"


def _passed_on(group: ProcessGroup, numbers: Sequence[int]) -> list[list[int]]:
    """Gather in as many rounds as the number of ranks has binary digits.

    In each, a rank gets of a later one all that this has, which doubles what it has: its own row,
    and those of the ranks that follow it. Source: J. Bruck et al., IEEE TPDS 8(11), 1997.
    """
    ranks, here, link = group.world_size, group.rank, group.process_group
    # Whatever device tensors lie on by default.
    table = torch.empty((ranks, len(numbers)), dtype=torch.int64, device="cpu")
    table[0] = torch.tensor(numbers, device="cpu")
    known = 1
    while known < ranks:
        more = min(known, ranks - known)
        coming = link.recv([table[known : known + more]], (here + known) % ranks, _TAG)
        link.send([table[:more]], (here - known) % ranks, _TAG).wait()
        coming.wait()
        known += more
    rows: list[list[int]] = table.tolist()
    return rows[ranks - here :] + rows[: ranks - here]
