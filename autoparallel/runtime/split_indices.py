"""Indices into a dim that is split: they are checked, and counted from this rank's part."""

from __future__ import annotations

import torch

from autoparallel.placement import part_bounds
from autoparallel.runtime.groups import Group
from autoparallel.support.torch_private import assert_on_device

__all__ = ["places_here", "require_below"]


def require_below(index: torch.Tensor, size: int, what: str) -> None:
    """Raise IndexError for an index outside of [0, size), as the unsplit op does.

    what: the index, for the message. Without this, the mask of a split table would turn it into
    zeros. On a GPU the check is made there, and the host does not wait; a compiled program has the
    check in its graph, and raises RuntimeError.

    >>> require_below(torch.tensor([0, 9]), 9, "token")
    Traceback (most recent call last):
        ...
    IndexError: token out of range: all must be in [0, 9)
    """
    if index.is_cuda or torch.compiler.is_compiling():
        inside = ((index >= 0) & (index < size)).all()
        assert_on_device(inside, f"{what} out of range: all must be in [0, {size})")
    elif index.device.type != "meta" and index.numel():
        least, most = torch.aminmax(index)
        if int(least) < 0 or int(most) >= size:
            raise IndexError(f"{what} out of range: all must be in [0, {size})")


def places_here(
    index: torch.Tensor, size: int, group: Group, what: str = "index"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices into a split dim as counted from this rank's part, and a mask of those outside
    it.

    index: counted from the start of the whole. size: of the whole dim. group: the ranks that split
    it. what: the index, for the message. Indices outside of the part are given as place 0.
    Raises IndexError for an index outside of [0, size).

    >>> from autoparallel.runtime.groups import thread_groups
    >>> second = thread_groups(2)[1]
    >>> places_here(torch.tensor([1, 3]), 4, second)
    (tensor([0, 1]), tensor([ True, False]))
    """
    require_below(index, size, what)
    start, stop = part_bounds(size, group.world_size, group.rank)
    local = index - start
    elsewhere = (local < 0) | (local >= stop - start)
    return local.masked_fill(elsewhere, 0), elsewhere
