"""One rank's place on a mesh of several axes, and all ranks of a mesh as threads."""

from __future__ import annotations

import contextlib
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
    """How one rank reaches the others: along each mesh axis, and all of them.

    names, groups: per axis, outermost first. world: all ranks, numbered with the last axis
    innermost.
    """

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    world: Group

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of ranks along each axis."""
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
        """Number of all ranks."""
        return self.world.world_size

    @property
    def counts(self) -> dict[str, int]:
        """Simulated ranks: kind of collective -> how many this rank took part in."""
        found: dict[str, int] = {}
        for group in dict.fromkeys((self.world, *self.groups)):
            for kind, count in group.counts.items() if isinstance(group, LocalGroup) else ():
                found[kind] = found.get(kind, 0) + count
        return found


def single_rank(mesh: Mesh) -> Ranks:
    """The only rank of a mesh of one rank."""
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
    """A group as a mesh of one axis."""
    return Ranks((name,), (group,), group)


def process_ranks(world: ProcessGroup, mesh: DeviceMesh) -> Ranks:
    """This process's place on a mesh of all processes."""
    names = mesh.mesh_dim_names
    assert names is not None
    if len(names) == 1:
        return Ranks(names, (world,), world)
    groups = tuple(
        ProcessGroup(mesh.get_group(axis)) if mesh.size(axis) > 1 else SingleGroup()
        for axis in range(len(names))
    )
    return Ranks(names, groups, world)


def thread_ranks(mesh: Mesh, in_turn: bool = False) -> list[Ranks]:
    """All ranks of a mesh, to be run as threads of this process.

    in_turn: one rank works at a time, and the next where it must wait, so that ranks do not disturb
    each other's use of what is global in a process, like random generators.
    """
    names, sizes = tuple(zip(*mesh.axes, strict=True)) or ((), ())
    turn = threading.Lock() if in_turn else None
    world = thread_groups(math.prod(sizes), turn)
    if len(sizes) == 1:
        return [Ranks(names, (group,), group) for group in world]
    lines: dict[tuple[int, tuple[int, ...]], list[LocalGroup]] = {}
    found = []
    for rank, place in enumerate(itertools.product(*map(range, sizes))):
        groups = []
        for axis, size in enumerate(sizes):
            key = (axis, place[:axis] + place[axis + 1 :])
            if key not in lines:
                lines[key] = thread_groups(size, turn)
            groups.append(lines[key][place[axis]])
        found.append(Ranks(names, tuple(groups), world[rank]))
    return found


def run_ranks(ranks: Sequence[Ranks], work: Callable[[Ranks], Result]) -> list[Result]:
    """What `work` returns on each simulated rank, each in a thread of its own.

    Raises what the rank raised that failed first.
    """
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(own: Ranks) -> None:
        groups: Any = dict.fromkeys((own.world, *own.groups))
        turn = own.world.meeting.turn  # type: ignore[attr-defined]
        with turn if turn is not None else contextlib.nullcontext():
            try:
                results[own.rank] = work(own)
            except BaseException as error:
                errors.append(error)
                for group in groups:  # wakes all that wait, and they wake the others
                    group.abort()

    threads = [threading.Thread(target=run, args=(own,)) for own in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        first = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        raise (first or errors)[0]
    return [results[own.rank] for own in ranks]
