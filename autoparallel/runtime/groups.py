"""The ranks of a mesh axis, as a process group or as threads of one process."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from autoparallel.errors import PlanError
from autoparallel.runtime.faults import explained, is_lost
from autoparallel.support.rng_state import restore, snapshot
from autoparallel.support.torch_private import functional_collectives

__all__ = [
    "AbsentGroup",
    "Group",
    "LocalGroup",
    "ProcessGroup",
    "Result",
    "SingleGroup",
    "thread_groups",
]

# A function that waits for the result of a collective that was started, to be called once.
Result = Callable[[], torch.Tensor]

# What torch calls the collectives of one tensor in, one tensor out.
_TENSOR_OPS = {
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "all_to_all": "all_to_all_single",
}


class Group(ABC):
    """The collectives of `world_size` ranks, seen from rank number `rank`.

    None of them is differentiable: `collectives.convert` makes the backward of each from another.
    All ranks of a group must call the same collectives in the same order. Tensors are returned new,
    or as they came where there is one rank.

    Those that begin with "start" return at once, with a function that waits for the result: what is
    computed before it is called hides the collective. Here they do all at once, as ranks that are
    threads of one process do.
    """

    rank: int
    world_size: int

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        """Return the sum of the ranks' tensors, elementwise, or their maximum ("max")."""

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return (world_size, *shape): the tensors of all ranks, which must have equal shapes."""

    @abstractmethod
    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return (*shape): row `rank` of the sum over ranks of tensors of (world_size, *shape)."""

    @abstractmethod
    def all_to_all(
        self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        """Send tensors[q] to rank q, and return the tensors that each rank sent here.

        shapes: of those that come, by the rank that sends them; the sender's are not asked for.
        """

    def start_pass_on(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> Result:
        """Start sending a tensor to the next rank, the last one's to the first.

        shape: of the tensor that comes from the rank before. What is sent must not be written to
        until it came.
        """
        nothing = tensor.new_empty((0,))
        shapes: list[tuple[int, ...]] = [(0,)] * self.world_size
        sent = [nothing] * self.world_size
        sent[(self.rank + 1) % self.world_size] = tensor
        shapes[self.rank - 1] = shape
        return partial(_given, self.all_to_all(sent, shapes)[self.rank - 1])

    def start_all_reduce(self, tensor: torch.Tensor) -> Result:
        """Start `all_reduce` of a sum. The tensor must not be written to until the result came."""
        return partial(_given, self.all_reduce(tensor))

    def start_all_reduce_(self, tensor: torch.Tensor) -> Result:
        """Start adding up contiguous tensors, in place of each rank's."""
        return partial(_given, tensor.copy_(self.all_reduce(tensor)))

    def start_all_gather(self, tensor: torch.Tensor) -> Result:
        """Start `all_gather`. The tensor must not be written to until the result came."""
        return partial(_given, self.all_gather(tensor))

    def start_reduce_scatter(self, tensor: torch.Tensor) -> Result:
        """Start `reduce_scatter`. The tensor must not be written to until the result came."""
        return partial(_given, self.reduce_scatter(tensor))

    def start_gather_rows(self, tensor: torch.Tensor) -> Result:
        """Start gathering the rows of all ranks' tensors, rank by rank, along the first dim.

        The tensors must have equal shapes, and not be written to until the result came.
        """
        wait = self.start_all_gather(tensor)
        return lambda: wait().flatten(0, 1)

    def start_scatter_rows(self, tensor: torch.Tensor) -> Result:
        """Start adding up the ranks' tensors, of which each gets an equal part of the rows.

        The tensor must not be written to until the result came.
        """
        each = tensor.size(0) // self.world_size
        whole = tensor.reshape(self.world_size, each, *tensor.shape[1:])
        return self.start_reduce_scatter(whole)


def _given(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor."""
    return tensor


class SingleGroup(Group):
    """The group of a mesh axis of one rank, which has nobody to exchange with: tensors come back as
    they are.

    >>> group = SingleGroup()
    >>> group.all_reduce(torch.ones(2)), group.all_gather(torch.ones(2)).shape
    (tensor([1., 1.]), torch.Size([1, 2]))
    """

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
    """The functional collectives of a torch.distributed process group, which torch.compile can
    trace.

    group: torch's process group, on which this process is a rank.

    Example: `ProcessGroup(torch.distributed.group.WORLD)` after `init_process_group`.
    """

    def __init__(self, group: Any) -> None:
        self.process_group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.name = group.group_name
        self.ops = functional_collectives()

    def wait(self, collective: str, started: torch.Tensor) -> torch.Tensor:
        """Wait for the result of a collective. Raises AutoParallelError if a rank is gone."""
        try:
            return self.ops.wait_tensor(started)
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise explained(error, collective, self.process_group) from error

    def start(self, collective: str, *arguments: Any) -> torch.Tensor:
        """Start a collective. Raises AutoParallelError if a rank is gone."""
        try:
            op = getattr(self.ops, _TENSOR_OPS.get(collective, collective))
            return op(*arguments, self.name)
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise explained(error, collective.rstrip("_"), self.process_group) from error

    def all_reduce(self, tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        return self.wait("all_reduce", self.start("all_reduce", tensor.contiguous(), operation))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.start_all_gather(tensor)()

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.start_reduce_scatter(tensor)()

    def start_all_reduce(self, tensor: torch.Tensor) -> Result:
        started = self.start("all_reduce", tensor.contiguous(), "sum")
        return partial(self.wait, "all_reduce", started)

    def start_all_reduce_(self, tensor: torch.Tensor) -> Result:
        return partial(self.wait, "all_reduce", self.start("all_reduce_", tensor, "sum"))

    def start_all_gather(self, tensor: torch.Tensor) -> Result:
        flat = tensor.contiguous().unsqueeze(0)
        started = self.start("all_gather", flat, self.world_size)
        return partial(self.wait, "all_gather", started)

    def start_reduce_scatter(self, tensor: torch.Tensor) -> Result:
        flat = tensor.contiguous()
        started = self.start("reduce_scatter", flat, "sum", self.world_size)
        return lambda: self.wait("reduce_scatter", started).squeeze(0)

    def start_gather_rows(self, tensor: torch.Tensor) -> Result:
        started = self.start("all_gather", tensor.contiguous(), self.world_size)
        return partial(self.wait, "all_gather", started)

    def start_scatter_rows(self, tensor: torch.Tensor) -> Result:
        started = self.start("reduce_scatter", tensor.contiguous(), "sum", self.world_size)
        return partial(self.wait, "reduce_scatter", started)

    def start_pass_on(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> Result:
        sent, received = [0] * self.world_size, [0] * self.world_size
        sent[(self.rank + 1) % self.world_size] = tensor.numel()
        received[self.rank - 1] = torch.Size(shape).numel()
        # Of an all-to-all, ranks that get nothing are sent nothing.
        started = self.start("all_to_all", tensor.reshape(-1), received, sent)
        return lambda: self.wait("all_to_all", started).view(shape)

    def all_to_all(
        self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        # The parts may differ in every size, so they travel as one flat tensor with a length per
        # rank.
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        sent = [tensor.numel() for tensor in tensors]
        received = [torch.Size(shape).numel() for shape in shapes]
        started = self.start("all_to_all", flat, received, sent)
        exchanged = self.wait("all_to_all", started)
        parts = exchanged.split(received)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


_Made = TypeVar("_Made")


class _Meeting:
    """The place where the threads of a simulated group exchange tensors.

    turn: a lock that the thread that works holds, where only one may work at a time; None where all
    may.
    """

    def __init__(self, world_size: int, turn: threading.Lock | None) -> None:
        self.barrier = threading.Barrier(world_size)
        self.brought: list[Any] = [None] * world_size
        self.turn = turn

    def exchange(self, rank: int, item: Any, use: Callable[[list[Any]], _Made]) -> _Made:
        """Return what `use` makes of every rank's item, in the order of ranks.

        All ranks have brought theirs by then. It is made before any rank goes on: whose item it is
        may write to it as soon as the exchange is over.
        """
        self.brought[rank] = item
        self.wait()
        result = use(list(self.brought))
        # The second wait keeps a quick rank from writing to its item, or bringing its next one,
        # before a slow one has used these.
        self.wait()
        self.brought[rank] = None
        return result

    def wait(self) -> None:
        """Wait until all ranks are here. Torch's global generators are then where this rank left
        them.
        """
        if self.turn is None:
            self.barrier.wait()
            return
        # Other ranks work while this one waits, in the same process and with the same global
        # generators.
        numbers = snapshot()
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()
            restore(numbers)


def _sum(stacked: torch.Tensor) -> torch.Tensor:
    """Return the sum over dim 0, of complex numbers as of pairs of real ones, as collectives do:
    torch adds no complex numbers of half precision.
    """
    if stacked.is_complex():
        return torch.view_as_complex(torch.view_as_real(stacked).sum(0))
    return stacked.sum(0)


class LocalGroup(Group):
    """One thread's view of a group whose ranks are threads of this process.

    meeting: shared by all ranks of the group. counts: the number of calls of each collective that
    this rank took part in.
    """

    def __init__(self, meeting: _Meeting, rank: int, world_size: int) -> None:
        self.meeting, self.rank, self.world_size = meeting, rank, world_size
        self.counts: dict[str, int] = {}

    def _count(self, name: str) -> None:
        """Note one call."""
        self.counts[name] = self.counts.get(name, 0) + 1

    def all_reduce(self, tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        self._count("all_reduce")
        stacked: torch.Tensor = self.meeting.exchange(self.rank, tensor, torch.stack)
        return _sum(stacked) if operation == "sum" else stacked.amax(0)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._count("all_gather")
        return self.meeting.exchange(self.rank, tensor, _stacked)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        self._count("reduce_scatter")

        def own(items: list[torch.Tensor]) -> torch.Tensor:
            return _sum(torch.stack([item[self.rank] for item in items]))

        return self.meeting.exchange(self.rank, tensor, own)

    def all_to_all(
        self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        self._count("all_to_all")

        def own_items(items: list[list[torch.Tensor]]) -> list[torch.Tensor]:
            # A copy: two ranks must not hold the same memory, as two devices never do.
            return [item[self.rank].clone() for item in items]

        return self.meeting.exchange(self.rank, tensors, own_items)

    def abort(self) -> None:
        """Wake the ranks that wait, after this one has failed: they would wait for ever."""
        self.meeting.barrier.abort()


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the tensors one after another in memory, as processes get them.

    Torch would keep the order of dims that images have in memory (channels last).
    """
    return torch.stack(tensors).contiguous()


def thread_groups(world_size: int, turn: threading.Lock | None = None) -> list[LocalGroup]:
    """Return one group object per simulated rank, in the order of ranks, for threads of this
    process.

    turn: a lock that is held by the rank that works, where only one may at a time. Each object must
    be used by one thread only.

    >>> [group.rank for group in thread_groups(3)]
    [0, 1, 2]
    """
    meeting = _Meeting(world_size, turn)
    return [LocalGroup(meeting, rank, world_size) for rank in range(world_size)]
