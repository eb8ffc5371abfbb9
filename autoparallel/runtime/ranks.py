"""One rank's place on a mesh of several axes, and all ranks of a mesh as threads."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch.distributed.device_mesh import DeviceMesh

from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.runtime.groups import (
    AbsentGroup,
    Group,
    LocalGroup,
    ProcessGroup,
    SingleGroup,
    thread_groups,
)

__all__ = [
    "Ranks",
    "absent_ranks",
    "one_axis",
    "process_ranks",
    "run_ranks",
    "single_rank",
    "thread_ranks",
]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The groups through which one rank reaches the others: one along each mesh axis, and one of
    all.

    names, groups: of the mesh axes, outermost first. world: the group of all ranks, which are
    numbered with the last axis innermost, as torch's DeviceMesh numbers them.

    >>> from autoparallel.mesh import Mesh
    >>> ranks = thread_ranks(Mesh(dp=2, tp=3))
    >>> [each.coordinates for each in ranks][:4], ranks[5].rank
    ([(0, 0), (0, 1), (0, 2), (1, 0)], 5)
    """

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    world: Group

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of ranks along each axis."""
        return tuple(group.world_size for group in self.groups)

    @cached_property
    def coordinates(self) -> tuple[int, ...]:
        """This rank's place along each axis."""
        return tuple(group.rank for group in self.groups)

    @property
    def rank(self) -> int:
        """This rank's number among all."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """The number of all ranks."""
        return self.world.world_size

    @property
    def counts(self) -> dict[str, int]:
        """The collectives that this rank took part in, by kind; empty for a rank that is a
        process.
        """
        totals: dict[str, int] = {}
        # On a mesh of one axis the world is the axis' group too, and must count once.
        for group in dict.fromkeys((self.world, *self.groups)):
            for kind, count in group.counts.items() if isinstance(group, LocalGroup) else ():
                totals[kind] = totals.get(kind, 0) + count
        return totals


def single_rank(mesh: Mesh) -> Ranks:
    """Return the only rank of a mesh of one rank, which has nobody to exchange with.

    mesh: every axis of size 1.

    >>> single_rank(Mesh(dp=1, tp=1)).sizes
    (1, 1)
    """
    alone = SingleGroup()
    return Ranks(tuple(name for name, _ in mesh.axes), (alone,) * len(mesh.axes), alone)


def absent_ranks(mesh: Mesh, rank: int) -> Ranks:
    """The place of one rank on a mesh whose other ranks do not run. Raises PlanError for a rank
    that the mesh does not have."""
    if not 0 <= rank < mesh.world_size:
        raise PlanError(
            f"rank {rank} of {mesh}",
            why=f"its ranks are numbered from 0 to {mesh.world_size - 1}",
            fix="pass one of these",
        )
    groups: list[Group] = []
    rest = rank
    for _, size in reversed(mesh.axes):
        groups.append(AbsentGroup(rest % size, size) if size > 1 else SingleGroup())
        rest //= size
    world = AbsentGroup(rank, mesh.world_size) if mesh.world_size > 1 else SingleGroup()
    return Ranks(tuple(name for name, _ in mesh.axes), tuple(reversed(groups)), world)


def one_axis(group: Group, name: str = "axis") -> Ranks:
    """Return a group as the ranks of a mesh of one axis with that name.

    >>> one_axis(SingleGroup(), "tp").names
    ('tp',)
    """
    return Ranks((name,), (group,), group)


def process_ranks(world: ProcessGroup, mesh: DeviceMesh) -> Ranks:
    """Return this process's place on a mesh of processes.

    world: of all processes on the mesh. mesh: torch's, with named axes.

    Example: `process_ranks(world, init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "tp")))`
    """
    names = mesh.mesh_dim_names
    assert names is not None
    # A group of its own would only make a second communicator of the same processes.
    if len(names) == 1:
        return Ranks(names, (world,), world)
    groups = tuple(
        ProcessGroup(mesh.get_group(axis)) if mesh.size(axis) > 1 else SingleGroup()
        for axis in range(len(names))
    )
    return Ranks(names, groups, world)


def thread_ranks(mesh: Mesh, in_turn: bool = False) -> list[Ranks]:
    """Return all ranks of a mesh, in the order of their numbers, to be run as threads of this
    process.

    in_turn: one rank works at a time, and the next where it must wait, so that ranks do not disturb
    each other's use of what is global in a process, like random generators.

    >>> run_ranks(thread_ranks(Mesh(tp=2)), lambda ranks: ranks.rank * 10)
    [0, 10]
    """
    names, sizes = tuple(zip(*mesh.axes, strict=True)) or ((), ())
    turn = threading.Lock() if in_turn else None
    world = thread_groups(math.prod(sizes), turn)
    if len(sizes) == 1:
        return [Ranks(names, (group,), group) for group in world]
    lines: dict[tuple[int, tuple[int, ...]], list[LocalGroup]] = {}
    all_ranks = []
    for rank, place in enumerate(itertools.product(*map(range, sizes))):
        groups = []
        for axis, size in enumerate(sizes):
            # Ranks whose coordinates differ on this axis alone are one group.
            key = (axis, place[:axis] + place[axis + 1 :])
            if key not in lines:
                lines[key] = thread_groups(size, turn)
            groups.append(lines[key][place[axis]])
        all_ranks.append(Ranks(names, tuple(groups), world[rank]))
    return all_ranks


def run_ranks(ranks: Sequence[Ranks], work: Callable[[Ranks], Result]) -> list[Result]:
    """Run `work` on each simulated rank, in a thread of its own, and return the results in rank
    order.

    ranks: all those of one mesh, from `thread_ranks`.
    Raises the exception of the rank that failed first; the others are woken and end.

    >>> def count(ranks: Ranks) -> float:
    ...     return float(ranks.world.all_reduce(torch.tensor([1.0])))
    >>> import torch
    >>> run_ranks(thread_ranks(Mesh(dp=2, tp=2)), count)
    [4.0, 4.0, 4.0, 4.0]
    """
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(each: Ranks) -> None:
        groups: Any = dict.fromkeys((each.world, *each.groups))
        turn = each.world.meeting.turn  # type: ignore[attr-defined]
        with turn if turn is not None else contextlib.nullcontext():
            try:
                results[each.rank] = work(each)
            except BaseException as error:
                errors.append(error)
                for group in groups:  # this wakes all that wait, and they wake the others
                    group.abort()

    # Each in a copy of this thread's context: what it holds, it holds for them.
    contexts = [contextvars.copy_context() for _ in ranks]
    threads = [
        threading.Thread(target=context.run, args=(run, each))
        for context, each in zip(contexts, ranks, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        # Ranks that were woken fail with a broken barrier, which is the consequence and not the
        # cause.
        first = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        raise (first or errors)[0]
    return [results[each.rank] for each in ranks]
