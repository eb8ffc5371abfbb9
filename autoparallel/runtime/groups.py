"""The ranks of a mesh axis, as a process group or as threads of one process."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from autoparallel.errors import PlanError
from autoparallel.support.rng_state import restore, snapshot
from autoparallel.support.torch_private import functional_collectives

__all__ = ["AbsentGroup", "Group", "LocalGroup", "ProcessGroup", "SingleGroup", "thread_groups"]


class Group(ABC):
    """Collectives of `world_size` ranks, seen from `rank`. None of them is differentiable."""

    rank: int
    world_size: int

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        """The sum (or "max") over ranks."""

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(n, *shape): the equal-shaped tensors of all ranks."""

    @abstractmethod
    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of row `rank` of (n, *shape) tensors."""

    @abstractmethod
    def all_to_all(
        self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        """tensors[q] goes to rank q; returns what each rank sent here, of the given shapes."""


class SingleGroup(Group):
    """One rank: nothing to exchange."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1

    def all_reduce(self, tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[0]

    def all_to_all(
        self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        return tensors


class AbsentGroup(Group):
    """A place among ranks that do not run: it tells where a rank stands and exchanges nothing."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def _refuse(self) -> NoReturn:
        raise PlanError(
            f"rank {self.rank} of {self.world_size} would exchange tensors, and no other rank runs",
            why="the program was emitted to be read, without devices",
            fix="run it under torchrun from the parallel module, or in one process by "
            "autoparallel.simulate",
        )

    def all_reduce(self, tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        self._refuse()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._refuse()

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        self._refuse()

    def all_to_all(
        self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        self._refuse()


class ProcessGroup(Group):
    """Functional collectives of a torch.distributed process group; torch.compile can trace them."""

    def __init__(self, group: Any) -> None:
        self.process_group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.name = group.group_name
        self.ops = functional_collectives()

    def all_reduce(self, tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        reduced = self.ops.all_reduce(tensor.contiguous(), operation, self.name)
        return self.ops.wait_tensor(reduced)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.contiguous().unsqueeze(0)
        gathered = self.ops.all_gather_into_tensor(flat, self.world_size, self.name)
        return self.ops.wait_tensor(gathered)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.contiguous()
        scattered = self.ops.reduce_scatter_tensor(flat, "sum", self.world_size, self.name)
        return self.ops.wait_tensor(scattered).squeeze(0)

    def all_to_all(
        self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        sent = [tensor.numel() for tensor in tensors]
        received = [torch.Size(shape).numel() for shape in shapes]
        made = self.ops.all_to_all_single(flat, received, sent, self.name)
        parts = self.ops.wait_tensor(made).split(received)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


_Made = TypeVar("_Made")


class _Meeting:
    """Where the threads of a simulated group exchange what they brought."""

    def __init__(self, world_size: int, turn: threading.Lock | None) -> None:
        self.barrier = threading.Barrier(world_size)
        self.brought: list[Any] = [None] * world_size
        self.turn = turn

    def exchange(self, rank: int, item: Any, use: Callable[[list[Any]], _Made]) -> _Made:
        """What `use` makes of all ranks' items. It is made before any rank goes on.

        Whose item it is may write to it as soon as the exchange is over.
        """
        self.brought[rank] = item
        self.wait()
        made = use(list(self.brought))
        self.wait()
        self.brought[rank] = None
        return made

    def wait(self) -> None:
        """Until all are here. Global random generators are then where this rank left them."""
        if self.turn is None:
            self.barrier.wait()
            return
        numbers = snapshot()
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()
            restore(numbers)


class LocalGroup(Group):
    """One thread's view of a group whose ranks are threads of this process."""

    def __init__(self, meeting: _Meeting, rank: int, world_size: int) -> None:
        self.meeting, self.rank, self.world_size = meeting, rank, world_size
        self.counts: dict[str, int] = {}

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def all_reduce(self, tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        self._count("all_reduce")
        stacked: torch.Tensor = self.meeting.exchange(self.rank, tensor, torch.stack)
        return stacked.sum(0) if operation == "sum" else stacked.amax(0)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._count("all_gather")
        return self.meeting.exchange(self.rank, tensor, torch.stack)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        self._count("reduce_scatter")

        def own(items: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack([item[self.rank] for item in items]).sum(0)

        return self.meeting.exchange(self.rank, tensor, own)

    def all_to_all(
        self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        self._count("all_to_all")

        def own(items: list[list[torch.Tensor]]) -> list[torch.Tensor]:
            return [item[self.rank].clone() for item in items]

        return self.meeting.exchange(self.rank, tensors, own)

    def abort(self) -> None:
        """Wake the others after a failure: they would wait for ever."""
        self.meeting.barrier.abort()


def thread_groups(world_size: int, turn: threading.Lock | None = None) -> list[LocalGroup]:
    """One group object per simulated rank.

    turn: held by the rank that works, where only one may at a time.
    """
    meeting = _Meeting(world_size, turn)
    return [LocalGroup(meeting, rank, world_size) for rank in range(world_size)]
