"""Measures the machine at hand, on the process group at hand, for the cost model.

Every rank measures at the same time, because ranks that share a memory bus slow each other down.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from autoparallel.cost.fit import Call, Fit, Move, Product, Samples, fit
from autoparallel.cost.hardware import Hardware, Matmul, find_hardware
from autoparallel.placement import Collective, Partial, Placement, Replicate, Shard
from autoparallel.runtime.collectives import move
from autoparallel.runtime.groups import Group, ProcessGroup

__all__ = ["Effort", "calibrate", "started"]

_FLOAT = torch.float32
# Of a repeat: by how much it may be late and still be one of the rest.
_LATE = 2.0
_MOST_PAIRS = 32
_MOVES: dict[Collective, tuple[Placement, Placement]] = {
    Collective.ALL_REDUCE: (Partial(), Replicate()),
    Collective.ALL_GATHER: (Shard(1), Replicate()),
    Collective.REDUCE_SCATTER: (Partial(), Shard(1)),
    Collective.ALL_TO_ALL: (Shard(1), Shard(2)),
}


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. repeats: of each measurement, of which the median counts: what disturbs
    a measurement will disturb a training step too. least_seconds: of each repeat. product: side
    of the largest square product. move_nbytes, call_nbytes: of the largest array.
    """

    repeats: int = 9
    least_seconds: float = 0.002
    product: int = 2048
    move_nbytes: int = 2**28
    call_nbytes: int = 2**26

    @staticmethod
    def quick(cuda: bool) -> Effort:
        """Seconds on any machine."""
        return Effort(3, 0.0005, 2048 if cuda else 256, 2**24, 2**20)

    @staticmethod
    def full(cuda: bool) -> Effort:
        """A minute or two."""
        return Effort(15, 0.005, 8192, 2**32, 2**30) if cuda else Effort()


def calibrate(
    effort: Effort | None = None,
    *,
    name: str = "",
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = lambda text: None,
) -> Fit:
    """Measure and fit. A collective call under a process group, where all ranks get the same.

    Without a process group one process is measured, and the links are those of a preset.
    name: of the hardware. clock: what CPUs are timed by; `time.process_time` where others use the
    machine too and each process computes in one thread: it does not run while a process waits, for
    its turn or for other ranks. say: is told what is under way.
    """
    cuda = torch.cuda.is_available()
    effort = effort or Effort.full(cuda)
    bench = _Bench(effort, clock)
    with torch.no_grad():
        say("products")
        products = tuple(bench.products())
        spread = bench.spread()
        say("memory")
        launch, function = bench.launch(), bench.function()
        moves = tuple(bench.moves())
        say("collectives")
        calls = tuple(bench.calls())
    samples = Samples(products, moves, calls, launch, function, spread)
    base, matmul = _base(bench, name, samples)
    return fit(samples, base, matmul)


class _Bench:
    """Timings on this rank's device, agreed on by all ranks."""

    def __init__(self, effort: Effort, clock: Callable[[], float]) -> None:
        self.effort, self.clock = effort, clock
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        running = dist.is_initialized()
        self.world: Group | None = ProcessGroup(dist.group.WORLD) if running else None
        self.ranks = self.world.world_size if self.world is not None else 1
        self.local_ranks = min(int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks)), self.ranks)
        # This rank's seconds for equal work, relative to all ranks' median: for the spread.
        self.relative: list[float] = []

    # -- timing

    def seconds(self, run: Callable[[], object], shared: bool = False) -> float:
        """Of one run, the median of the repeats; over the ranks the mean, or the slowest if they
        all take part in one run (shared)."""
        for _ in range(2):
            run()
        once = self._largest(self._timed(run, 1))
        calls = min(max(math.ceil(self.effort.least_seconds / once), 1), 10_000)
        found = []
        for _ in range(self.effort.repeats):
            self._meet()
            found.append(self._timed(run, calls))
        own = statistics.median(found)
        middle = self._largest(own) if shared else self._mean(own)
        if not shared:
            self.relative += [min(one / middle, _LATE) for one in found]
        return middle

    def _timed(self, run: Callable[[], object], calls: int) -> float:
        clock = time.perf_counter if self.cuda else self.clock
        self._wait()
        start = clock()
        for _ in range(calls):
            run()
        self._wait()
        return max((clock() - start) / calls, 1e-9)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _meet(self) -> None:
        if self.world is not None:
            dist.barrier()

    def _all(self, seconds: float) -> list[float]:
        if self.world is None:
            return [seconds]
        own = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        found: list[float] = self.world.all_gather(own).reshape(-1).tolist()
        return found

    def _largest(self, seconds: float) -> float:
        return max(self._all(seconds))

    def _mean(self, seconds: float) -> float:
        return statistics.fmean(self._all(seconds))

    # -- what is timed

    def products(self) -> Iterator[Product]:
        """Square ones, those that tensor parallelism makes narrow one way or another, and batches
        as in attention; the main type of element in all, the others in some."""
        side = self.effort.product
        main = torch.bfloat16 if self.cuda else _FLOAT
        squares = [(1, size, size, size) for size in _halves(side, 5)]
        narrow = []
        for size in _halves(side // 4, 5):
            narrow += [(1, side, size, side), (1, side, side, size), (1, size, side, side)]
        batches = [
            (32, rows, columns, depth)
            for rows, columns, depth in ((128, 128, 64), (256, 256, 64), (128, 64, 128))
        ]
        wide = [(1, side // 2, 4 * side, side // 2), (1, side // 2, side // 2, 2 * side)]
        for shape in (*squares, *narrow, *batches, *wide):
            yield self.product(shape, main)
        for dtype in (torch.bfloat16, _FLOAT, torch.float64):
            for shape in squares[:3] if dtype is not main else ():
                yield self.product(shape, dtype)

    def product(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Product:
        """Over the last dim of both factors, as a linear layer does it.

        Each time other factors, more than a cache holds, as in training.
        """
        batch, rows, columns, depth = shape
        made = Product(batch, rows, columns, depth, dtype.itemsize, 0.0)
        pairs = []
        for _ in range(min(max(self.effort.move_nbytes // made.nbytes, 2), _MOST_PAIRS)):
            left = torch.randn(batch, rows, depth, device=self.device).to(dtype)
            right = torch.randn(batch, columns, depth, device=self.device).to(dtype)
            last = right.transpose(1, 2)
            pairs.append((left[0], last[0]) if batch == 1 else (left, last))
        turns = itertools.cycle(pairs)
        return replace(made, seconds=self.seconds(lambda: torch.matmul(*next(turns))))

    def launch(self) -> float:
        """Of a kernel with next to nothing to do, in a recorded chain, forward or backward."""
        length = 64

        def chain() -> None:
            with torch.enable_grad():
                x = first
                for _ in range(length):
                    x = x + first
                x.sum().backward()

        first = torch.randn(8, device=self.device, requires_grad=True)
        return self.seconds(chain) / (2 * length + 2)

    def function(self) -> float:
        """Of one exponential beyond moving it, in arrays that stay in the cache; 0 if that is less
        than moving takes."""
        count = 2**22 if self.cuda else 2**16
        x = torch.randn(count, device=self.device)
        made = torch.empty_like(x)
        moving = self.seconds(lambda: torch.neg(x, out=made))
        computing = self.seconds(lambda: torch.exp(x, out=made))
        return (computing - moving) / count if computing > 2 * moving else 0.0

    def moves(self) -> Iterator[Move]:
        """Sums of two arrays, each into new memory that is kept, as results are in training."""
        for nbytes in _halves(self.effort.move_nbytes, 12, 4):
            if nbytes < 2**14:
                break
            count = nbytes // 12
            first = torch.randn(count, device=self.device)
            length = max(min(self.effort.move_nbytes // nbytes, 32), 2)

            def chain(first: torch.Tensor = first, length: int = length) -> None:
                kept = [first]
                for _ in range(length):
                    kept.append(kept[-1] + first)

            yield Move(3 * first.nbytes, self.seconds(chain) / length)

    def calls(self) -> Iterator[Call]:
        """Every collective as a split module makes it, among the ranks of a node and across."""
        if self.world is None:
            return
        for group, across in self._groups():
            for kind, (source, target) in _MOVES.items():
                for nbytes in _halves(self.effort.call_nbytes, 16, 4):
                    # (1, rows, columns), of which all ranks have equal parts.
                    rows = group.world_size * 8
                    columns = nbytes // (rows * _FLOAT.itemsize * group.world_size)
                    if columns == 0:
                        break
                    columns *= group.world_size
                    shape = [1, rows, columns]
                    if isinstance(source, Shard):
                        shape[1] //= group.world_size
                    x = torch.randn(shape, device=self.device)
                    seconds = self.seconds(
                        lambda x=x, group=group, source=source, target=target, rows=rows: move(  # type: ignore[misc]
                            x, group, source, target, rows
                        ),
                        shared=True,
                    )
                    full = rows * columns * _FLOAT.itemsize
                    yield Call(kind, full, group.world_size, across, seconds)

    def _groups(self) -> Iterator[tuple[Group, bool]]:
        """The ranks of each node, all nodes at a time; and one rank of each, likewise."""
        nodes = self.ranks // self.local_ranks
        if self.local_ranks > 1:
            mine = _own_group(
                [range(n * self.local_ranks, (n + 1) * self.local_ranks) for n in range(nodes)]
            )
            yield mine, False
        if nodes > 1:
            mine = _own_group(
                [range(r, self.ranks, self.local_ranks) for r in range(self.local_ranks)]
            )
            yield mine, True

    def spread(self) -> float:
        """Standard deviation, relative, of what equal work takes: on other ranks, at other times.

        By the mean difference of two of the times (Gini's), which is what one rank of two waits.
        """
        own = torch.tensor(self.relative, dtype=torch.float64, device=self.device)
        times = own if self.world is None else self.world.all_gather(own).reshape(-1)
        times = times.sort().values.cpu()
        count = len(times)
        weights = 2 * torch.arange(1, count + 1, dtype=torch.float64) - count - 1
        difference = 2 * float(weights @ times) / (count * (count - 1))
        return difference * math.sqrt(math.pi) / 2


def _own_group(members: Sequence[range]) -> Group:
    made, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in members])
    return ProcessGroup(made)


def _halves(largest: int, count: int, factor: int = 2) -> list[int]:
    return [largest // factor**power for power in range(count)]


def _base(bench: _Bench, name: str, samples: Samples) -> tuple[Hardware, Matmul]:
    """What is known without measuring: of a GPU its data sheet, of a CPU how many ranks share it.

    The preset's network and links stay where none was measured.
    """
    known = find_hardware("auto")
    if bench.cuda:
        properties = torch.cuda.get_device_properties(bench.device)
        device = properties.name
        count, memory = torch.cuda.device_count(), properties.total_memory
        tiles = known.matmul.tiles
        matmul = Matmul(processors=properties.multi_processor_count, tiles=tiles)
    else:
        device = f"{_processor()}, {torch.get_num_threads()} threads per rank"
        cores = (os.cpu_count() or 1) // torch.get_num_threads()
        count = max(bench.local_ranks, cores)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
        matmul = Matmul()
        # Of a CPU nothing but measurements is known.
        known = replace(known, flops_per_second=(), memory_bytes_per_second=1.0)
    backend = dist.get_backend() if bench.world is not None else "none"
    links = {call.across for call in samples.calls}
    source = (
        f"measured by `autoparallel calibrate` on {bench.ranks} x {device}, "
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, process group {backend}: "
        f"{len(samples.products)} products, {len(samples.moves)} sizes of arrays, "
        f"{len(samples.calls)} collectives. "
    )
    source += "" if False in links else "Links inside of nodes: not measured. "
    source += "" if True in links else "Network: not measured. "
    if links != {False, True}:
        source += f"What is not measured is that of the preset {known.name}: {known.source}"
    base = replace(
        known,
        name=name or device,
        source=source.strip(),
        devices_per_node=count,
        device_memory_bytes=memory,
    )
    return base, matmul


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def started() -> Iterator[int]:
    """This process's rank, in a process group where a launcher says so; ends what it started."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if launched:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank() if dist.is_initialized() else 0
    finally:
        if launched:
            dist.destroy_process_group()
