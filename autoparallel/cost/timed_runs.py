"""Runs that are timed on a rank's device, and whose times all ranks agree on."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from autoparallel.runtime.groups import Group, ProcessGroup

__all__ = ["Effort", "TimedRuns"]

# A repeat that takes more than this many times the mean counts as this many times.
_LATE = 2.0


@dataclass(frozen=True, slots=True)
class Effort:
    """The number and the sizes of measurements.

    repeats: of each measurement, of which the median counts: disturbances of a measurement will
    disturb a training step too. least_seconds: of each repeat. product: side of the largest square
    product. move_nbytes, call_nbytes: of the largest array that is moved, and that is communicated.

    >>> Effort.quick(cuda=False).repeats
    3
    """

    repeats: int = 9
    least_seconds: float = 0.002
    product: int = 2048
    move_nbytes: int = 2**28
    call_nbytes: int = 2**26

    @staticmethod
    def quick(cuda: bool) -> Effort:
        """Return an effort of seconds on any machine."""
        return Effort(3, 0.0005, 2048 if cuda else 256, 2**24, 2**20)

    @staticmethod
    def full(cuda: bool) -> Effort:
        """Return an effort of a minute or two."""
        return Effort(15, 0.005, 8192, 2**32, 2**30) if cuda else Effort()


class TimedRuns:
    """Timings on this rank's device, agreed on by all ranks.

    relative: this rank's seconds for equal work over all ranks' mean, one per repeat.
    """

    def __init__(self, effort: Effort, clock: Callable[[], float]) -> None:
        self.effort, self.clock = effort, clock
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        running = dist.is_initialized()
        self.world: Group | None = ProcessGroup(dist.group.WORLD) if running else None
        self.ranks = self.world.world_size if self.world is not None else 1
        # LOCAL_WORLD_SIZE is set by torchrun; without it all ranks are taken to be on one node.
        self.local_ranks = min(int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks)), self.ranks)
        self.relative: list[float] = []

    def seconds(self, run: Callable[[], object], shared: bool = False) -> float:
        """Return the seconds of one run: the median of the repeats, the mean over the ranks.

        shared: all ranks take part in one run, as in a collective; then the slowest rank counts.
        """
        # The first runs allocate memory and compile kernels.
        for _ in range(2):
            run()
        once = self._largest(self._timed(run, 1))
        # Runs shorter than the clock can tell apart are timed many at once.
        calls = min(max(math.ceil(self.effort.least_seconds / once), 1), 10_000)
        times = []
        for _ in range(self.effort.repeats):
            self._meet()
            times.append(self._timed(run, calls))
        median = statistics.median(times)
        middle = self._largest(median) if shared else self._mean(median)
        if not shared:
            self.relative += [min(one / middle, _LATE) for one in times]
        return middle

    def _timed(self, run: Callable[[], object], calls: int) -> float:
        """Return the seconds of one of `calls` runs in a row."""
        clock = time.perf_counter if self.cuda else self.clock
        self._wait()
        start = clock()
        for _ in range(calls):
            run()
        self._wait()
        return max((clock() - start) / calls, 1e-9)

    def _wait(self) -> None:
        """Wait until the device has done all that was started."""
        if self.cuda:
            torch.cuda.synchronize()

    def _meet(self) -> None:
        """Wait for the other ranks, so that all measure at the same time."""
        if self.world is not None:
            dist.barrier()

    def _all(self, seconds: float) -> list[float]:
        """Return every rank's seconds."""
        if self.world is None:
            return [seconds]
        local = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        of_all_ranks: list[float] = self.world.all_gather(local).reshape(-1).tolist()
        return of_all_ranks

    def _largest(self, seconds: float) -> float:
        """Return the slowest rank's seconds."""
        return max(self._all(seconds))

    def _mean(self, seconds: float) -> float:
        """Return the mean of the ranks' seconds."""
        return statistics.fmean(self._all(seconds))

    def spread(self) -> float:
        """Return the standard deviation of the time of equal work, relative to its mean.

        Computed from the mean difference of two of the times (Gini's), which is how long one rank
        of two waits: sigma = mean difference * sqrt(pi) / 2 for a normal distribution.
        """
        local = torch.tensor(self.relative, dtype=torch.float64, device=self.device)
        times = local if self.world is None else self.world.all_gather(local).reshape(-1)
        times = times.sort().values.cpu()
        count = len(times)
        weights = 2 * torch.arange(1, count + 1, dtype=torch.float64) - count - 1
        difference = 2 * float(weights @ times) / (count * (count - 1))
        return difference * math.sqrt(math.pi) / 2
