"""The place of a micro-batch on the axis in time of a pipeline's plan."""

from __future__ import annotations

from typing import NoReturn

from autoparallel.mesh import MICROBATCH
from autoparallel.runtime.groups import AbsentGroup, Group, SingleGroup
from autoparallel.runtime.ranks import Ranks

__all__ = ["MicrobatchGroup", "ranks_of_microbatch"]


class MicrobatchGroup(AbsentGroup):
    """The micro-batches of a step, seen from one of them: a program asks where its part begins.

    They are computed one after the other by the same rank, and exchange nothing.

    >>> MicrobatchGroup(1, 4).rank
    1
    """

    def _refuse(self) -> NoReturn:
        raise AssertionError(
            f"micro-batch {self.rank} of {self.world_size} would wait for a later one"
        )


def ranks_of_microbatch(ranks: Ranks, number: int, count: int) -> Ranks:
    """Return a rank's place on the mesh of a pipeline's plan while it computes a micro-batch.

    ranks: its place among the ranks of its stage. number: of the micro-batch, from 0 up to `count`.

    >>> from autoparallel.runtime.ranks import one_axis
    >>> ranks_of_microbatch(one_axis(SingleGroup(), "tp"), 2, 4).coordinates
    (2, 0)
    """
    group: Group = MicrobatchGroup(number, count) if count > 1 else SingleGroup()
    return Ranks((MICROBATCH, *ranks.names), (group, *ranks.groups), ranks.world)
