"""Measuring the machine at hand, on the process group at hand, for the cost model.

Every rank measures at the same time, because ranks that share a memory bus slow each other down.
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from autoparallel.cost.fit import Call, Fit, Move, Product, Samples, fit
from autoparallel.cost.hardware import Hardware, Matmul, find_hardware
from autoparallel.cost.timed_runs import Effort, TimedRuns
from autoparallel.placement import Collective, Partial, Placement, Replicate, Shard
from autoparallel.runtime.groups import Group, ProcessGroup
from autoparallel.runtime.moves import move

__all__ = ["calibrate", "started"]

_FLOAT = torch.float32
_MOST_PAIRS = 32
_MOVES: dict[Collective, tuple[Placement, Placement]] = {
    Collective.ALL_REDUCE: (Partial(), Replicate()),
    Collective.ALL_GATHER: (Shard(1), Replicate()),
    Collective.REDUCE_SCATTER: (Partial(), Shard(1)),
    Collective.ALL_TO_ALL: (Shard(1), Shard(2)),
}


def calibrate(
    effort: Effort | None = None,
    *,
    name: str = "",
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = lambda text: None,
) -> Fit:
    """Measure the machine and fit hardware to it.

    A collective call under a process group, where all ranks get the same result. Without a process
    group one process is measured, and the links are those of a preset.
    effort: by default the full one. name: of the hardware; by default the device's. clock: the
    timer on CPUs; `time.process_time` where others use the machine too and each process computes in
    one thread: it does not run while a process waits, for its turn or for other ranks. say: is told
    what is under way.

    Example: `write_hardware(calibrate(Effort.quick(cuda=False)).hardware, "mine.json")`
    """
    cuda = torch.cuda.is_available()
    effort = effort or Effort.full(cuda)
    bench = _Bench(effort, clock)
    with torch.no_grad():
        say("products")
        products = tuple(bench.products())
        # The spread is that of the products, which every rank repeats on its own.
        spread = bench.spread()
        say("memory")
        launch, function = bench.launch(), bench.function()
        moves = tuple(bench.moves())
        say("collectives")
        calls = tuple(bench.calls())
    samples = Samples(products, moves, calls, launch, function, spread)
    base, matmul = _base(bench, name, samples)
    return fit(samples, base, matmul)


class _Bench(TimedRuns):
    """The runs that the cost model is fitted to: products, moves through memory, collectives."""

    def products(self) -> Iterator[Product]:
        """Yield timed products: square ones, narrow ones and batches.

        Narrow are those that tensor parallelism shortens along one size or another, batches are as
        in attention. All are done in the main type of element, some in the others.
        """
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
        """Return a timed product over the last dim of both factors, as a linear layer does it.

        shape: batch, rows, columns, depth. Each run takes other factors, more than a cache holds,
        as in training.
        """
        batch, rows, columns, depth = shape
        product = Product(batch, rows, columns, depth, dtype.itemsize, 0.0)
        pairs = []
        for _ in range(min(max(self.effort.move_nbytes // product.nbytes, 2), _MOST_PAIRS)):
            left = torch.randn(batch, rows, depth, device=self.device).to(dtype)
            right = torch.randn(batch, columns, depth, device=self.device).to(dtype)
            last = right.transpose(1, 2)
            pairs.append((left[0], last[0]) if batch == 1 else (left, last))
        turns = itertools.cycle(pairs)
        return replace(product, seconds=self.seconds(lambda: torch.matmul(*next(turns))))

    def launch(self) -> float:
        """Return the seconds of a kernel with next to nothing to do, forward or backward.

        A chain of 64 additions is recorded and differentiated: so many kernels each way, and two
        more.
        """
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
        """Return the seconds of one exponential beyond moving it; 0 if moving takes longer.

        Arrays stay in the cache, where moving is cheapest and the function shows.
        """
        count = 2**22 if self.cuda else 2**16
        x = torch.randn(count, device=self.device)
        result = torch.empty_like(x)
        moving = self.seconds(lambda: torch.neg(x, out=result))
        computing = self.seconds(lambda: torch.exp(x, out=result))
        return (computing - moving) / count if computing > 2 * moving else 0.0

    def moves(self) -> Iterator[Move]:
        """Yield timed sums of two arrays, each into new memory that is kept.

        Results of training are kept for the backward pass, so they never land in the same memory.
        """
        for nbytes in _halves(self.effort.move_nbytes, 12, 4):
            if nbytes < 2**14:
                break
            count = nbytes // 12
            first = torch.randn(count, device=self.device)
            length = max(min(self.effort.move_nbytes // nbytes, 32), 2)

            def chain(first: torch.Tensor = first, length: int = length) -> None:
                sums = [first]
                for _ in range(length):
                    sums.append(sums[-1] + first)

            yield Move(3 * first.nbytes, self.seconds(chain) / length)

    def calls(self) -> Iterator[Call]:
        """Yield every collective as a split module does it, inside nodes and between them."""
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
        """Yield the groups to measure: the ranks of each node, and one rank of each node.

        All groups of a kind work at the same time. The bool says whether a group crosses nodes.
        """
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


def _own_group(members: Sequence[range]) -> Group:
    """Return the group that this rank belongs to, of groups that all ranks start together."""
    group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in members])
    return ProcessGroup(group)


def _halves(largest: int, count: int, factor: int = 2) -> list[int]:
    """Return `largest` divided by growing powers of `factor`, `count` numbers in all."""
    return [largest // factor**power for power in range(count)]


def _base(bench: _Bench, name: str, samples: Samples) -> tuple[Hardware, Matmul]:
    """Return what is known without measuring, and the device's matrix units.

    Of a GPU that is its data sheet, of a CPU how many ranks share it. The preset's network and
    links stay where none was measured.
    """
    preset = find_hardware("auto")
    if bench.cuda:
        properties = torch.cuda.get_device_properties(bench.device)
        device = properties.name
        count, memory = torch.cuda.device_count(), properties.total_memory
        tiles = preset.matmul.tiles
        matmul = Matmul(processors=properties.multi_processor_count, tiles=tiles)
    else:
        device = f"{_processor()}, {torch.get_num_threads()} threads per rank"
        cores = (os.cpu_count() or 1) // torch.get_num_threads()
        count = max(bench.local_ranks, cores)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
        matmul = Matmul()
        # Of a CPU nothing but measurements is known.
        preset = replace(preset, flops_per_second=(), memory_bytes_per_second=1.0)
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
        source += f"What is not measured is that of the preset {preset.name}: {preset.source}"
    base = replace(
        preset,
        name=name or device,
        source=source.strip(),
        devices_per_node=count,
        device_memory_bytes=memory,
    )
    return base, matmul


def _processor() -> str:
    """Return the name of this machine's processor."""
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
    """Yield this process's rank, in a process group where a launcher asks for one.

    A group that was started here is ended afterwards. Example: `with started() as rank: ...`
    """
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
